"""Splits that do not come with the source: from a file, or as shares that a hash deals out.

Shares are dealt out by a hash of each image's key, so images that are added move no other. Images
of equal content go to one split: that of the one that stands first in the table. A copy that is
appended later follows the earlier image. Only the order of equal images among one another matters.
A rule that ignores order and moves nothing could use nothing but the content: every file would be
read, and stores of earlier versions would have other splits.
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
from apecache.data.tables import not_utf8
from apecache.errors import ManifestError, OptionError, RowError, nearest
from apecache.fingerprint import content_hash

HEADERS = (["key", "split"], ["image", "split"])
READERS = 8
"""Threads that read images side by side."""


def parse_fractions(text: str) -> tuple[tuple[str, float], ...]:
    """`train=.9,val=.1`.

    Raises:
        OptionError: no shares, or shares that do not sum to 1.
    """
    try:
        parts = [part.split("=") for part in text.split(",")]
        fractions = tuple((name.strip(), float(share)) for name, share in parts)
    except ValueError:
        raise OptionError(
            f"--split-fraction {text}: expected shares like train=.9,val=.1"
        ) from None
    require_fractions(fractions)
    return fractions


def require_fractions(fractions: tuple[tuple[str, float], ...]) -> None:
    names = [name for name, _ in fractions]
    if (
        not all(names)
        or len(set(names)) < len(names)
        or not all(0 < share <= 1 for _, share in fractions)
    ):
        raise OptionError(
            f"split fractions {fractions}: expected different names, each with a share above 0"
        )
    if abs(sum(share for _, share in fractions) - 1) > 1e-6:
        total = sum(share for _, share in fractions)
        raise OptionError(f"split fractions sum to {total:g}; expected 1, like train=.9,val=.1")


def resplit(source: PairSource, spec: OpenSpec) -> PairSource:
    """The source with the splits that the spec gives in place of its own.

    Raises:
        OptionError: splits from two places. ManifestError: the split file.
    """
    if (
        sum((spec.split_column is not None, spec.split_file is not None, bool(spec.split_fraction)))
        > 1
    ):
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
        pairs = tuple(
            replace(pair, split=split_of(originals.get(pair.key, pair.key), spec))
            for pair in source
        )
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
    candidates = [key for keys in by_size.values() if len(keys) > 1 for key in keys]
    order = {key: row for row, key in enumerate(source.keys)}
    candidates.sort(key=order.__getitem__)  # of a Parquet file each row group is then decoded once

    def digest(key: str) -> str:
        try:
            return content_hash(source.media.read(key))
        except RowError:
            return ""

    first: dict[str, str] = {}
    copies: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for key, found in zip(candidates, pool.map(digest, candidates), strict=True):
            original = first.setdefault(found, key) if found else key
            if original != key:
                copies[key] = original
    return copies


def split_of(key: str, spec: OpenSpec) -> str:
    """The split that a key falls into, whatever other keys there are: its hash is a number from 0
    to 1."""
    at = int(content_hash(f"{spec.split_seed}:{key}")[:13], 16) / 16**13
    below = 0.0
    for name, share in spec.split_fraction:
        below += share
        if at < below:
            return name
    return spec.split_fraction[-1][0]


def read_split_file(path: Path, source: PairSource) -> dict[str, str]:
    """Key -> split, from a TSV of both (a header `key split` may stand above) or a folder of lists
    of keys.

    Raises:
        ManifestError: missing, not UTF-8, a ragged line, a key twice or not in the source.
    """
    splits: dict[str, str] = {}
    known = set(source.keys)
    for where, key, split in _entries(path):
        if key not in known:
            hint = nearest(key, source.keys[:10_000])
            raise ManifestError(
                f"{where}: {key!r} is no key of {source.origin}{hint or '; take the line out'}"
            )
        if key in splits:
            raise ManifestError(
                f"{where}: {key!r} has a split already ({splits[key]}); name each key once"
            )
        splits[key] = split
    if not splits:
        raise ManifestError(
            f"{path}: no splits; expected lines of key and split, or lists like train.txt"
        )
    return splits


def _entries(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, key, split)"""
    if not path.is_dir():
        yield from _table_entries(path)
        return
    for file in sorted(path.glob("*.txt")):
        for number, key in enumerate(_read(file).splitlines(), 1):
            if key.strip():
                yield f"{file}, line {number}", key.strip(), SPLITS.get(file.stem, file.stem)


def _table_entries(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, cells in enumerate(csv.reader(_read(path).split("\n"), "excel-tab"), 1):
        cells = [cell.removesuffix("\r") for cell in cells]
        if not cells or (number == 1 and cells in HEADERS):
            continue
        if len(cells) != 2 or not all(cells):
            raise ManifestError(
                f"{path}, line {number}: {len(cells)} columns; expected key and split, with a "
                "tab between"
            )
        yield f"{path}, line {number}", cells[0], cells[1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ManifestError(f"{path}: no such split file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
