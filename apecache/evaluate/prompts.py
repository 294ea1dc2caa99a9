"""Choose the prompts of zero-shot classification: one template or an ensemble."""

from pathlib import Path

from apecache.arguments import AnyPath, as_place, require_type
from apecache.errors import OptionError, nearest, one_line, raise_if_refused
from apecache.evaluate.benchmark_names import ENSEMBLES, Benchmark, clip_templates

TEMPLATES = ("a photo of {}",)
"""LilT's single prompt."""
NUMBER_TEMPLATES = ("a photo of the number {}",)
"""The same where classes are digits."""
OF_DIGITS = ("svhn", "mnist")
"""Benchmarks whose classes are digits."""


def find_templates(
    name: AnyPath | None = None,
    benchmark: Benchmark | None = None,
) -> tuple[str, ...]:
    """Return templates by name or from a file.

    Args:
        name: `single`, `clip-7`, `clip-80`, or a file. None: the templates of the benchmark, or
            `single` without one.
        benchmark: the benchmark, if it is known.

    Raises:
        MissingExtraError: CLIP's ensembles without open_clip.
        OptionError: no such file, or as `read_templates` does.
    """
    name = None if name is None else str(as_place(name, "name"))
    require_type(benchmark, Benchmark, "benchmark", optional=True)
    if name is None and benchmark is not None:
        return benchmark.templates
    if name is None or name == "single":
        has_digits = benchmark is not None and benchmark.name in OF_DIGITS
        return NUMBER_TEMPLATES if has_digits else TEMPLATES
    # Names come before files, so a file in the working folder cannot replace an ensemble.
    if name in ENSEMBLES:
        return clip_templates(name)
    if not Path(name).is_file():
        known_names = ("single", *ENSEMBLES)
        hint = nearest(name, known_names)
        raise OptionError(
            f"templates {name}: no such file; give one, or {', '.join(known_names)}{hint}"
        )
    return read_templates(Path(name))


def read_templates(path: Path) -> tuple[str, ...]:
    """Read a template from each line; `{}` or `{c}` stands for the class name.

    Empty lines are skipped.

    Raises:
        OptionError: not UTF-8, no template, or a line without a placeholder, with its number.
    """
    try:
        # `utf-8-sig`: editors on Windows put a byte order mark at the start.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise_if_refused(path)
        raise OptionError(
            f"{path}: cannot be read ({one_line(error)}); save the file as UTF-8"
        ) from None
    templates = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            templates.append(check_template(line.strip(), f"{path}, line {number}: "))
    if not templates:
        raise OptionError(
            f"{path}: no template; expected one on each line, with {{}} for the class name"
        )
    return tuple(templates)


def check_template(template: str, where: str = "") -> str:
    """Return the template with `{}` for the class name.

    Args:
        template: with `{}` or `{c}` for the class name.
        where: put before the error message, to say where the template is.

    Raises:
        OptionError: the template has no placeholder.
    """
    prompt = template.replace("{c}", "{}")
    if "{}" not in prompt:
        raise OptionError(f"{where}template {one_line(template)!r} has no {{}} for the class name")
    return prompt
