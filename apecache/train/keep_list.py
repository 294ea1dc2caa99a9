"""Read and write a keep list: the pairs that a fit may train on.

It is a TSV file with the columns `image` (the key of the store's table) and `caption`, so that
`apecache extract` can read it as a table, too.
"""

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.errors import DataError, counted
from apecache.fingerprint import content_hash
from apecache.storage.replace import replace_text
from apecache.store.table import PairTable

COLUMNS = ("image", "caption")


def write_keep_list(path: Path, pairs: PairTable, kept: NDArray[np.bool_]) -> None:
    """Write the pairs to keep, in the order of the table.

    Args:
        path: File to write.
        pairs: Table of the store.
        kept: bool [n_texts], captions to keep with their images.
    """
    lines = io.StringIO()
    writer = csv.writer(lines, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in np.flatnonzero(kept).tolist():
        key = str(pairs.keys[pairs.image_rows[row]])
        writer.writerow((key, str(pairs.captions[row])))
    replace_text(path, lines.getvalue())


def digest_keep_list(path: Path) -> str:
    """Identify the content of a keep list. Raises DataError if it cannot be read."""
    return content_hash(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read as a keep list: {reason}") from None


def read_keep_list(path: Path, pairs: PairTable) -> NDArray[np.bool_]:
    """Read which captions of a store's table are kept.

    A pair that the table has twice is kept twice.

    Returns:
        bool [n_texts].

    Raises:
        DataError: The file cannot be read, is not a keep list, or names a pair that the table
            lacks.
    """
    text = _read_text(path)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a keep list: {error}") from None
    if not rows or tuple(rows[0]) != COLUMNS:
        raise DataError(
            f"{path} is not a keep list: expected a TSV file with the columns image and caption; "
            "make one with: apecache curate"
        )
    named: set[tuple[str, str]] = set()
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(COLUMNS):
            raise DataError(f"{path}, line {number}: expected 2 columns, found {len(row)}")
        named.add((row[0], row[1]))
    kept_captions = np.zeros(len(pairs.captions), dtype=bool)
    known_pairs: set[tuple[str, str]] = set()
    for row_number, image_row in enumerate(pairs.image_rows.tolist()):
        # By key and caption, and not by row: the store may have been made again since.
        pair = (str(pairs.keys[image_row]), str(pairs.captions[row_number]))
        if pair in named:
            kept_captions[row_number] = True
            known_pairs.add(pair)
    # A caption that is not there means another store, or one that has changed.
    unknown = named - known_pairs
    if unknown:
        key, caption = min(unknown)
        raise DataError(
            f"{path} names {counted(len(unknown), 'pair')} that the store does not have, such as "
            f"{key}: {caption[:60]!r}; make the list anew with: apecache curate"
        )
    return kept_captions
