"""A source divided among the segments of a store: what is there already must be what the store was made from."""

from importlib.metadata import version
from pathlib import Path

from apecache.data.pairs import PairSource
from apecache.errors import DataError, MismatchError
from apecache.fingerprint import shorten
from apecache.store.commit import read_record
from apecache.store.files import LocalFiles
from apecache.store.layout import SEGMENTS, SOURCE, storable
from apecache.store.reader import FeatureStore
from apecache.store.writer import PairColumns, add_segment, create_store


def pair_columns(source: PairSource) -> PairColumns:
    splits, labels = [pair.split for pair in source], [pair.label for pair in source]
    return PairColumns(
        source.keys, splits, labels, source.captions, source.languages, source.image_rows, source.digest, source.origin
    )


def split_source(source: PairSource, store: Path, append: bool = False) -> list[tuple[Path, PairSource]]:
    """Each segment's folder and its part of the table; with `append`, a new segment for what is new at its end.

    Raises:
        MismatchError: the table is not that of the store, or has grown without `append`.
    """
    segments, position = [], 0
    for path in _begun_segments(store):
        record = read_record(LocalFiles(path), SOURCE)
        part = source.part(position, position + record["n_images"])
        if part.digest != record["digest"]:
            raise MismatchError(_other_table(path, part, position))
        segments.append((path, part))
        position += record["n_images"]
    rest = source.part(position)
    if not segments:
        return [(store, source)]
    if len(rest) and not append:
        raise MismatchError(
            f"{source.origin} has {len(rest)} images more than {store} was made from; add --append to encode them too"
        )
    return [*segments, (store / SEGMENTS / f"{len(segments):04d}", rest)] if len(rest) else segments


def _begun_segments(store: Path) -> list[Path]:
    """Folders that are claimed for a table, whether or not they were finished being made."""
    if not LocalFiles(store).exists(SOURCE):
        return []
    return [store, *sorted(path.parents[1] for path in (store / SEGMENTS).glob(f"*/{SOURCE}"))]


def _other_table(path: Path, part: PairSource, first_row: int) -> str:
    """Where a table departs from the one that a segment was made from."""
    other = f"{path} was made from another table"
    remedy = "a store belongs to one table (--append takes it with new rows at its end): choose another --store"
    try:
        pairs = FeatureStore.open(path).pairs
    except DataError:
        return f"{other} than {part.origin}; {remedy}"
    captions: list[list[str]] = [[] for _ in pairs.keys]
    languages: list[list[str]] = [[] for _ in pairs.keys]
    for text, image in enumerate(pairs.image_rows):
        captions[image].append(str(pairs.captions[text]))
        languages[image].append(str(pairs.languages[text]))
    there = zip(pairs.keys, pairs.splits, pairs.labels, captions, languages, strict=True)
    for row, (pair, (key, split, label, texts, tongues)) in enumerate(zip(part, there, strict=False)):
        compared: list[tuple[str, str, str]] = [("image", pair.key, key), ("split", pair.split, split)]
        compared += [("label", pair.label, label), ("number of captions", str(len(pair.captions)), str(len(texts)))]
        compared += [("caption", *both) for both in zip(map(storable, pair.captions), texts, strict=False)]
        compared += [("language", *both) for both in zip(pair.languages, tongues, strict=False)]
        for what, a, b in compared:
            if a != b:
                return f"{other}: row {first_row + row} has {what} {shorten(a)!r}, not {shorten(b)!r}; {remedy}"
    return f"{other}: {len(pairs.keys)} images there, {len(part)} here; {remedy}"


def make_segment(path: Path, part: PairSource) -> None:
    """The store, or a segment of one, that is at `path`; what is there already stays. Raises as `create_store` does."""
    about = (pair_columns(part), part.media.place, version("apecache"))
    if path.parent.name == SEGMENTS:
        add_segment(LocalFiles(path.parents[1]), path.name, *about)
    else:
        create_store(LocalFiles(path), *about)
