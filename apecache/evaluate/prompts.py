"""Prompts of zero-shot classification: one template or an ensemble, by name or from a file."""

from collections.abc import Iterable
from pathlib import Path

from apecache.errors import MissingExtraError, OptionError, nearest, one_line

TEMPLATES = ("a photo of {}",)
"""LilT's single prompt."""
NUMBER_TEMPLATES = ("a photo of the number {}",)
"""The same for digits (SVHN, MNIST)."""
ENSEMBLES = {"clip-7": "SIMPLE_IMAGENET_TEMPLATES", "clip-80": "OPENAI_IMAGENET_TEMPLATES"}
"""CLIP's ensembles (Radford et al. 2021, section 3.1.4), by their names in open_clip."""


def find_templates(name: str) -> tuple[str, ...]:
    """`single`, `clip-7` or `clip-80`, else a file.

    Raises:
        MissingExtraError: CLIP's ensembles without open_clip. OptionError: no such file, or as `read_templates` does.
    """
    if name == "single":
        return TEMPLATES
    if name in ENSEMBLES:
        return clip_templates(name)
    if not Path(name).is_file():
        known = ("single", *ENSEMBLES)
        raise OptionError(f"templates {name}: no such file; give one, or {', '.join(known)}{nearest(name, known)}")
    return read_templates(Path(name))


def clip_templates(name: str) -> tuple[str, ...]:
    """Raises MissingExtraError without open_clip, whose lists they are."""
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    return tuple(template("{}") for template in getattr(zero_shot_metadata, ENSEMBLES[name]))


def read_templates(path: Path) -> tuple[str, ...]:
    """One on each line, `{}` or `{c}` for the class name; empty lines do not count.

    Raises:
        OptionError: not UTF-8, no template, or a line without a place for the class name, by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read ({one_line(error)}); save the file as UTF-8") from None
    return checked_templates(((line.strip(), f"{path}, line {n}") for n, line in enumerate(lines, 1)), str(path))


def checked_templates(lines: Iterable[tuple[str, str]], where: str) -> tuple[str, ...]:
    """Pairs of a template and of where it stands, with `{c}` as `{}`. Raises OptionError as `read_templates` does."""
    found = []
    for line, place in lines:
        if not line:
            continue
        template = line.replace("{c}", "{}")
        if "{}" not in template:
            raise OptionError(f"{place}: template {one_line(line)!r} has no {{}} for the class name")
        found.append(template)
    if not found:
        raise OptionError(f"{where}: no template; expected one on each line, with {{}} for the class name")
    return tuple(found)
