"""Assign splits that do not come with the source: from a file, or as shares by a hash.

A hash of each image's key chooses its split, so images that are added later move no other image.
Images of equal content go to one split: that of the first of them in the table, which a copy that
is appended later follows too. A rule that ignores the order of equal images would have to hash the
content of every file, and stores of earlier versions would have other splits.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from apecache.arguments import as_path
from apecache.data.pairs import PairSource
from apecache.data.spec import SPLITS, OpenSpec
from apecache.data.text_files import open_text
from apecache.errors import (
    ManifestError,
    OptionError,
    RowError,
    counted,
    nearest,
    nearest_sibling,
)
from apecache.fingerprint import content_hash

HEADERS = (["key", "split"], ["image", "split"])
EXAMPLE = "train=.8,val=.2"
READERS = 8
"""Threads that read images side by side."""


def parse_fractions(text: str) -> tuple[tuple[str, float], ...]:
    """Parse shares like `train=.9,val=.1`.

    Raises:
        OptionError: The text has no shares, or they do not add to 1.
    """
    try:
        assignments = [assignment.split("=") for assignment in text.split(",")]
        fractions = tuple((name.strip(), float(share)) for name, share in assignments)
    except ValueError:
        raise OptionError(
            f"--split-fraction {text}: expected fractions that add to 1, like {EXAMPLE}"
        ) from None
    require_fractions(fractions)
    return fractions


def require_fractions(fractions: tuple[tuple[str, float], ...]) -> None:
    """Check shares of splits.

    Raises:
        OptionError: A name is empty or twice, a share is out of range, or they do not add to 1.
    """
    names = [name for name, _ in fractions]
    shares = [share for _, share in fractions]
    fractions_text = ",".join(f"{name}={share:g}" for name, share in fractions)
    if not all(names) or len(set(names)) < len(names):
        raise OptionError(
            f"split fractions {fractions_text}: expected different names, like {EXAMPLE}"
        )
    total = sum(shares)
    # Decimal fractions such as 0.1 have no exact float.
    if not all(share > 0 for share in shares) or abs(total - 1) > 1e-6:
        raise OptionError(
            f"split fractions {fractions_text} add to {total:g}; "
            f"expected fractions above 0 that add to 1, like {EXAMPLE}"
        )


def resplit(source: PairSource, spec: OpenSpec) -> PairSource:
    """Return the source with the splits of the spec in place of its own.

    Raises:
        OptionError: Splits come from two places.
        ManifestError: The split file is wrong.
    """
    origins = (
        spec.split_column is not None,
        spec.split_file is not None,
        bool(spec.split_fraction),
    )
    if sum(origins) > 1:
        raise OptionError(
            "splits from several places; give one of --split, --split-file and --split-fraction"
        )
    if not spec.resplits:
        return source
    if spec.split_file is not None:
        splits = read_split_file(as_path(spec.split_file, "split_file"), source)
        pairs = tuple(replace(pair, split=splits.get(pair.key, "")) for pair in source)
        taken_from = f"--split-file {spec.split_file}"
    else:
        require_fractions(spec.split_fraction)
        originals = first_of_equal(source)
        new_pairs = []
        for pair in source:
            # A copy of an image gets the split of the first one.
            original = originals.get(pair.key, pair.key)
            new_pairs.append(replace(pair, split=split_of(original, spec)))
        pairs = tuple(new_pairs)
        taken_from = "--split-fraction"
    return replace(source, pairs=pairs, fields=replace(source.fields, split=taken_from))


def first_of_equal(source: PairSource) -> dict[str, str]:
    """Find copies of images: the key of each one -> the key of the first image with the same bytes.

    Only images of equal size are read. One that cannot be read is a copy of none.
    """
    by_size = defaultdict[int, list[str]](list)
    for key, size in zip(source.keys, source.media.sizes(source.keys), strict=True):
        if size:
            by_size[size].append(key)
    candidates: list[str] = []
    for keys in by_size.values():
        if len(keys) > 1:
            candidates += keys
    # In the order of the table, so that each row group of a Parquet file is decoded once.
    order = {key: row for row, key in enumerate(source.keys)}
    candidates.sort(key=order.__getitem__)

    def digest(key: str) -> str:
        try:
            return content_hash(source.media.read(key))
        except RowError:
            return ""

    first: dict[str, str] = {}
    copies: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for key, content_digest in zip(candidates, pool.map(digest, candidates), strict=True):
            original = first.setdefault(content_digest, key) if content_digest else key
            if original != key:
                copies[key] = original
    return copies


def split_of(key: str, spec: OpenSpec) -> str:
    """Return the split of a key, which does not depend on any other key."""
    # 13 hexadecimal digits are 52 bits, which a float holds exactly: a number from 0 to 1.
    key_hash = content_hash(f"{spec.split_seed}:{key}")
    position = int(key_hash[:13], 16) / 16**13
    below = 0.0
    for name, share in spec.split_fraction:
        below += share
        if position < below:
            return name
    # The shares may sum to slightly less than 1.
    return spec.split_fraction[-1][0]


def read_split_file(path: Path, source: PairSource) -> dict[str, str]:
    """Read the split of each key.

    Args:
        path: A TSV of key and split, with or without a header `key split`, or a folder of lists of
            keys.
        source: The source that has the keys.

    Returns:
        Split by key.

    Raises:
        ManifestError: The file is missing, not UTF-8 or ragged, or a key is twice in it or not in
            the source.
    """
    splits: dict[str, str] = {}
    source_keys = set(source.keys)
    for location, key, split in _entries(path):
        if key not in source_keys:
            hint = nearest(key, source.keys[:10_000])
            raise ManifestError(
                f"{location}: {key!r} is not a key of {source.origin}"
                f"{hint or '; take the line out'}"
            )
        if key in splits:
            raise ManifestError(
                f"{location}: {key!r} has a split already ({splits[key]}); name each key once"
            )
        splits[key] = split
    if not splits:
        raise ManifestError(
            f"{path}: no splits; expected lines of key and split, or lists like train.txt"
        )
    return splits


def _entries(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (location, key, split) of every line."""
    if not path.is_dir():
        yield from _table_entries(path)
        return
    for file in sorted(path.glob("*.txt")):
        # Split at "\n" alone, as in `_table_entries`; `strip` removes the "\r" of "\r\n".
        for number, key in enumerate(_read(file).split("\n"), 1):
            if key.strip():
                yield f"{file}, line {number}", key.strip(), SPLITS.get(file.stem, file.stem)


def _table_entries(path: Path) -> Iterator[tuple[str, str, str]]:
    # Split at "\n" alone: `splitlines` would also split at characters that a key may have.
    for number, cells in enumerate(csv.reader(_read(path).split("\n"), "excel-tab"), 1):
        cells = [cell.removesuffix("\r") for cell in cells]
        if not cells or (number == 1 and cells in HEADERS):
            continue
        if len(cells) != 2 or not all(cells):
            raise ManifestError(
                f"{path}, line {number}: {counted(len(cells), 'column')}; expected key and split, "
                "with a tab between"
            )
        yield f"{path}, line {number}", cells[0], cells[1]


def _read(path: Path) -> str:
    try:
        with open_text(path, newline=None) as file:
            return file.read()
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such split file{nearest_sibling(path)}") from None
