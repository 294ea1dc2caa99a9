"""Open captions without images: a text file of one caption per line.

A store counts captions by the rows of their images. So each line is a row of its own without an
image, whose key is the 1-based line number. Blank lines are skipped.
"""

from pathlib import Path

from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import OpenSpec, require_only
from apecache.data.tables import not_utf8
from apecache.errors import ManifestError


def open_texts(path: Path, spec: OpenSpec) -> PairSource:
    """Open a text file of captions.

    Raises:
        ManifestError: The file is not UTF-8, or has only blank lines.
    """
    require_only(spec, path)
    try:
        # "utf-8-sig" also reads files with a byte order mark.
        with path.open(encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            pairs.append(Pair(key=str(number), captions=(line,), languages=("",)))
    if not pairs:
        raise ManifestError(f"{path}: no captions; expected one on each line")
    return PairSource(tuple(pairs), origin=str(path), fields=SourceFields(caption="line"))
