"""Prompts of zero-shot classification: one template or an ensemble, by name or from a file."""

from pathlib import Path

from apecache.arguments import AnyPath, as_place, require_type
from apecache.errors import OptionError, nearest, one_line
from apecache.evaluate.benchmark_names import ENSEMBLES, Benchmark, clip_templates

TEMPLATES = ("a photo of {}",)
"""LilT's single prompt."""
NUMBER_TEMPLATES = ("a photo of the number {}",)
"""The same where classes are digits."""
OF_DIGITS = ("svhn", "mnist")


def find_templates(
    name: AnyPath | None = None,
    benchmark: Benchmark | None = None,
) -> tuple[str, ...]:
    """`single`, `clip-7`, `clip-80`, else a file. Without a name those of the benchmark; without
    both, `single`.

    Raises:
        MissingExtraError: CLIP's ensembles without open_clip. OptionError: no such file, or as
            `read_templates` does.
    """
    name = None if name is None else str(as_place(name, "name"))
    require_type(benchmark, Benchmark, "benchmark", optional=True)
    if name is None and benchmark is not None:
        return benchmark.templates
    if name is None or name == "single":
        return (
            NUMBER_TEMPLATES if benchmark is not None and benchmark.name in OF_DIGITS else TEMPLATES
        )
    if name in ENSEMBLES:
        return clip_templates(name)
    if not Path(name).is_file():
        known = ("single", *ENSEMBLES)
        raise OptionError(
            f"templates {name}: no such file; give one, or {', '.join(known)}{nearest(name, known)}"
        )
    return read_templates(Path(name))


def read_templates(path: Path) -> tuple[str, ...]:
    """One on each line, `{}` or `{c}` for the class name; empty lines do not count.

    Raises:
        OptionError: not UTF-8, no template, or a line without a place for the class name, by its
            number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path}: cannot be read ({one_line(error)}); save the file as UTF-8"
        ) from None
    found = [
        check_template(line.strip(), f"{path}, line {n}: ")
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise OptionError(
            f"{path}: no template; expected one on each line, with {{}} for the class name"
        )
    return tuple(found)


def check_template(template: str, where: str = "") -> str:
    """The template with `{}` for the class name. Raises OptionError if it has no place for it."""
    plain = template.replace("{c}", "{}")
    if "{}" not in plain:
        raise OptionError(f"{where}template {one_line(template)!r} has no {{}} for the class name")
    return plain
