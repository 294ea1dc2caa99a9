"""A source divided among the segments of a store: what is there already must be what the store was
made from."""

from dataclasses import dataclass
from importlib.metadata import version

from apecache.data.pairs import PairSource
from apecache.errors import DataError, MismatchError
from apecache.fingerprint import shorten
from apecache.storage.files import Files
from apecache.store.layout import SEGMENTS, SOURCE, storable
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.writer import PairColumns, add_segment, create_store


def pair_columns(source: PairSource) -> PairColumns:
    splits = [pair.split for pair in source]
    labels = [pair.label for pair in source]
    return PairColumns(
        keys=source.keys,
        splits=splits,
        labels=labels,
        captions=source.captions,
        languages=source.languages,
        image_rows=source.image_rows,
        digest=source.digest,
        origin=source.origin,
    )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The store's own first one (`folder` is empty), or one that was appended, and its part of the
    table."""

    store: Files
    folder: str
    part: PairSource

    @property
    def files(self) -> Files:
        return self.store.child(self.folder)


def split_source(source: PairSource, store: Files, append: bool = False) -> list[Segment]:
    """Every segment; with `append`, a new one for what is new at the end of the table.

    Raises:
        MismatchError: the table is not that of the store, or has grown without `append`.
    """
    segments = list[Segment]()
    position = 0
    for folder in _claimed_folders(store):
        record = read_record(store.child(folder), SOURCE)
        segment = Segment(
            store=store,
            folder=folder,
            part=source.part(position, position + record["n_images"]),
        )
        if segment.part.digest != record["digest"]:
            raise MismatchError(_other_table(segment.files, segment.part, position))
        segments.append(segment)
        position += record["n_images"]
    rest = source.part(position)
    if not segments:
        return [Segment(store=store, folder="", part=source)]
    if len(rest) and not append:
        found = f"{source.origin} has {len(rest)} images more than {store.place} was made from"
        raise MismatchError(f"{found}; add --append to encode them too")
    return (
        [*segments, Segment(store=store, folder=f"{SEGMENTS}/{len(segments):04d}", part=rest)]
        if len(rest)
        else segments
    )


def _claimed_folders(store: Files) -> list[str]:
    """Of segments that are claimed for a table, whether or not they were finished being made."""
    if not store.exists(SOURCE):
        return []
    folders = (f"{SEGMENTS}/{name}" for name in store.list(SEGMENTS))
    return ["", *(folder for folder in folders if store.exists(f"{folder}/{SOURCE}"))]


def _other_table(files: Files, part: PairSource, first_row: int) -> str:
    """Where a table departs from the one that a segment was made from."""
    other = f"{files.place} was made from another table"
    remedy = (
        "a store belongs to one table (--append takes it with new rows at its end): choose "
        "another --store"
    )
    try:
        pairs = FeatureStore.at(files).pairs
    except DataError:
        return f"{other} than {part.origin}; {remedy}"
    captions: list[list[str]] = [[] for _ in pairs.keys]
    languages: list[list[str]] = [[] for _ in pairs.keys]
    for text, image in enumerate(pairs.image_rows):
        captions[image].append(str(pairs.captions[text]))
        languages[image].append(str(pairs.languages[text]))
    there = zip(pairs.keys, pairs.splits, pairs.labels, captions, languages, strict=True)
    for row, (pair, (key, split, label, texts, tongues)) in enumerate(
        zip(part, there, strict=False)
    ):
        compared: list[tuple[str, str, str]] = [
            ("image", pair.key, key),
            ("split", pair.split, split),
        ]
        compared += [
            ("label", pair.label, label),
            ("number of captions", str(len(pair.captions)), str(len(texts))),
        ]
        compared += [
            ("caption", *both) for both in zip(map(storable, pair.captions), texts, strict=False)
        ]
        compared += [("language", *both) for both in zip(pair.languages, tongues, strict=False)]
        for what, a, b in compared:
            if a != b:
                return (
                    f"{other}: row {first_row + row} has {what} {shorten(a)!r}, not "
                    f"{shorten(b)!r}; {remedy}"
                )
    return f"{other}: {len(pairs.keys)} images there, {len(part)} here; {remedy}"


def make_segment(segment: Segment) -> None:
    """Makes the store, or a later segment of it; what is there already stays. Raises as
    `create_store` does."""
    about = (pair_columns(segment.part), segment.part.media.place, version("apecache"))
    if segment.folder:
        add_segment(segment.store, segment.folder.rpartition("/")[2], *about)
    else:
        create_store(segment.store, *about)
