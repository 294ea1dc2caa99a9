"""Divide a source among the segments of a store.

What the store holds already must be what it was made from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from apecache.data.pairs import PairSource
from apecache.data.recorded import options_to_record
from apecache.errors import DataError, MismatchError, counted
from apecache.fingerprint import shorten
from apecache.storage.files import Files
from apecache.store.layout import SEGMENTS, SOURCE, storable
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.writer import PairColumns, add_segment, create_store


def pair_columns(source: PairSource) -> PairColumns:
    """Return the table of a source as the store keeps it, column by column."""
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
        options=options_to_record(source),
    )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Pair a segment of a store with its part of the table."""

    store: Files
    folder: str
    """Empty for the first segment, which is the store itself."""
    part: PairSource

    @property
    def files(self) -> Files:
        return self.store.child(self.folder)


def split_source(source: PairSource, store: Files, append: bool = False) -> list[Segment]:
    """Divide the table among all segments of the store.

    Args:
        append: add a segment for rows that are new at the end of the table.

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
    new_rows = source.part(position)
    if not segments:
        return [Segment(store=store, folder="", part=source)]
    if len(new_rows) and not append:
        growth = (
            f"{source.origin} has {counted(len(new_rows), 'image')} more than "
            f"{store.place} was made from"
        )
        raise MismatchError(f"{growth}; add --append to encode them too")
    if len(new_rows):
        folder = f"{SEGMENTS}/{len(segments):04d}"
        segments.append(Segment(store=store, folder=folder, part=new_rows))
    return segments


def _claimed_folders(store: Files) -> list[str]:
    """List the folders of segments that belong to a table.

    A segment whose making was interrupted belongs to its table too.
    """
    if not store.exists(SOURCE):
        return []
    folders = [""]
    for name in store.list(SEGMENTS):
        folder = f"{SEGMENTS}/{name}"
        if store.exists(f"{folder}/{SOURCE}"):
            folders.append(folder)
    return folders


def _other_table(files: Files, table: PairSource, first_row: int) -> str:
    """Say where a table differs from the one that a segment was made from.

    Args:
        table: the rows that the segment should have.
        first_row: their first row in the whole table.
    """
    other = f"{files.place} was made from another table"
    remedy = (
        "a store belongs to one table (--append takes it with new rows at its end): choose "
        "another --store"
    )
    scale = read_record(files, SOURCE).get("options", {}).get("scale")
    scale_here = _scale_text(table.pixels.scale)
    if _scale_text(scale) != scale_here:
        return (
            f"{files.place} was made with --scale {_scale_text(scale)}, not {scale_here}; give the "
            "same --scale, or choose another --store"
        )
    # The table of a segment whose making was interrupted may not be readable.
    try:
        pairs = FeatureStore.at(files).pairs
    except DataError:
        return f"{other} than {table.origin}; {remedy}"
    captions: list[list[str]] = [[] for _ in pairs.keys]
    languages: list[list[str]] = [[] for _ in pairs.keys]
    for text, image in enumerate(pairs.image_rows):
        captions[image].append(str(pairs.captions[text]))
        languages[image].append(str(pairs.languages[text]))
    store_rows = zip(pairs.keys, pairs.splits, pairs.labels, captions, languages, strict=True)
    # Not strict: the shorter table may agree with the longer one as far as it goes.
    for row, (pair, store_row) in enumerate(zip(table, store_rows, strict=False)):
        key, split, label, store_captions, store_languages = store_row
        compared: list[tuple[str, str, str]] = [
            ("image", pair.key, key),
            ("split", pair.split, split),
            ("label", pair.label, label),
            ("number of captions", str(len(pair.captions)), str(len(store_captions))),
        ]
        # The store has U+FFFD for lone surrogates, so captions are compared in that form.
        table_captions = map(storable, pair.captions)
        for table_text, store_text in zip(table_captions, store_captions, strict=False):
            compared.append(("caption", table_text, store_text))
        for table_language, store_language in zip(pair.languages, store_languages, strict=False):
            compared.append(("language", table_language, store_language))
        for field_name, table_value, store_value in compared:
            if table_value != store_value:
                return (
                    f"{other}: row {first_row + row} has {field_name} {shorten(table_value)!r}, "
                    f"not {shorten(store_value)!r}; {remedy}"
                )
    return f"{other}: {counted(len(pairs.keys), 'image')} there, {len(table)} here; {remedy}"


def _scale_text(scale: Sequence[float] | None) -> str:
    return "auto" if scale is None else ",".join(f"{limit:g}" for limit in scale)


def make_segment(segment: Segment) -> None:
    """Make the store, or a later segment of it; what exists already stays.

    Raises as `create_store` does.
    """
    columns = pair_columns(segment.part)
    root = segment.part.media.place
    made_by = version("apecache")
    if segment.folder:
        name = segment.folder.rpartition("/")[2]
        add_segment(segment.store, segment=name, pairs=columns, root=root, version=made_by)
    else:
        create_store(segment.store, pairs=columns, root=root, version=made_by)
