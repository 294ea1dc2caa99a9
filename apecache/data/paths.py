"""Expand braces and wildcards to the paths of files, and name files that belong together."""

import glob
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from apecache.errors import ManifestError, counted

MAX_FILES = 100_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_paths(pattern: str) -> list[Path] | None:
    """Return the paths that braces (`{00000..00012}`, `{a,b}`) or wildcards (`*.tar`) stand for.

    Braces keep their order; files of a wildcard are sorted. None if the pattern has neither.

    Raises:
        ManifestError: A range runs backwards, no file matches, or there are far too many paths.
    """
    choices: list[list[str]] = []
    for text in BRACES.findall(pattern):
        choice = _choices(text, pattern)
        # Braces with other text are part of a file's name.
        if choice is None:
            return None
        choices.append(choice)
    is_wild = glob.has_magic(BRACES.sub("", pattern))
    if not (choices or is_wild):
        return None
    count = 1
    for choice in choices:
        count *= len(choice)
    _require_count(count, pattern)
    literals = BRACES.split(pattern)[::2]
    paths: list[Path] = []
    for texts in product(*choices):
        # There is one literal more than braces: the text behind the last one.
        pieces = zip(literals, [*texts, ""], strict=True)
        text = "".join(literal + choice for literal, choice in pieces)
        paths += map(Path, sorted(glob.glob(text))) if is_wild else [Path(text)]
    if not paths:
        raise ManifestError(
            f"{pattern}: no file matches; expected a pattern such as 'shards/*.tar'"
        )
    return paths


def _require_count(count: int, pattern: str) -> None:
    if not 0 < count <= MAX_FILES:
        raise ManifestError(
            f"{pattern}: {counted(count, 'file')}; expected 1 to {MAX_FILES:,}, written as "
            "{00000..00012}.tar"
        )


def _choices(text: str, pattern: str) -> list[str] | None:
    """Return what a pair of braces stands for; None if it is only text."""
    match = RANGE.fullmatch(text)
    if match:
        width = len(match[1])
        numbers = range(int(match[1]), int(match[2]) + 1)
        # Before they are listed: there may be billions.
        _require_count(len(numbers), pattern)
        return [f"{number:0{width}d}" for number in numbers]
    return text.split(",") if "," in text else None


def part_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own, with its folders where two files have one name."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([path.absolute().parent for path in paths])
    below = [path.absolute().relative_to(common) for path in paths]
    return [path.with_suffix("").as_posix() for path in below]
