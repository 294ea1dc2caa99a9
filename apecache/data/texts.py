"""Captions without images: a text file of one caption per line.

A store counts captions by the rows of images that they belong to, so each line is a row of its own,
with the line's number (from 1) as its key and no image. Blank lines are no captions.
"""

from pathlib import Path

from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import OpenSpec, require_only
from apecache.data.tables import not_utf8
from apecache.errors import ManifestError


def open_texts(path: Path, spec: OpenSpec) -> PairSource:
    """Raises:
    ManifestError: not UTF-8, or nothing but blank lines."""
    require_only(spec, path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(file, 1)]
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
    pairs = tuple(
        Pair(key=str(number), captions=(line,), languages=("",))
        for number, line in lines
        if line.strip()
    )
    if not pairs:
        raise ManifestError(f"{path}: no captions; expected one on each line")
    return PairSource(pairs, str(path), fields=SourceFields(caption="line"))
