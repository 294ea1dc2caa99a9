"""Import features that exist already into a store, as if they had been extracted."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_place, require_spec, require_type
from apecache.data.media import Media, NoMedia, media_at
from apecache.data.pairs import PairSource
from apecache.errors import ApecacheError, BadRowsError, MismatchError, counted
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.import_arrays import (
    ImportedArray,
    PlannedArray,
    SegmentRows,
    import_arrays,
)
from apecache.store.import_identity import KnownEncoder, digest_source, unknown_encoder
from apecache.store.import_rows import ImportProgress
from apecache.store.import_sides import NamedRows, Sides, open_sides
from apecache.store.import_spec import ImportSpec
from apecache.store.import_table import (
    ImportTable,
    columns_of,
    columns_of_table,
    join_with,
    make_table,
)
from apecache.store.layout import PAIRS
from apecache.store.reader import FeatureStore
from apecache.store.writer import create_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Describe an import."""

    store: str | Path
    arrays: tuple[ImportedArray, ...]
    n_images: int
    n_texts: int
    has_captions: bool
    """Whether captions are known; else they are placeholders that name rows."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of the source that are not in the store, by reason."""
    seconds: float = 0.0

    @property
    def nothing_to_do(self) -> bool:
        return not any(array.n_imported for array in self.arrays)


def import_features(
    store: AnyPath,
    spec: ImportSpec,
    pairs: PairSource | None = None,
    progress: ImportProgress = lambda _: None,
) -> ImportReport:
    """Make features that exist already a store, or add them to one.

    Rows are joined by key with `pairs`, with the table of the store if it exists, or with what the
    source itself says. Interrupt at any time; the same call resumes. A store that has all of it is
    left unchanged.

    Args:
        store: A folder, or a location on object storage.
        spec: What to import.
        pairs: The table: images, captions, splits, labels, languages.
        progress: Called after every shard.

    Raises:
        OptionError: Nothing to import, or options that exclude one another.
        DataError: A file cannot be read, or its rows do not fit the table.
        MismatchError: The store belongs to another table, holds other features of that name, or an
            encoder gives other features.
        BadRowsError: More than `max_bad` of an array's rows are missing or not finite; all others
            are in the store.
    """
    store_place = as_place(store, "store")
    require_spec(spec, ImportSpec, "spec")
    require_type(pairs, PairSource, "pairs", optional=True)
    begin = time.perf_counter()
    files = open_files(store_place, spec.single_writer)
    sides = open_sides(spec)
    # Hashing leaves the interpreter to the thread that makes the table.
    with ThreadPoolExecutor(1) as pool:
        hashing = _begin_hashing(pool, sides)
        table, media = _table_of(files, sides, spec, pairs)
        _require_few_missing(table, spec, sides)
        encoders = _encoders(sides, table, media, spec)
        _make_store(files, table, media)
        digests = {key: result.result() for key, result in hashing.items()}
    arrays: list[PlannedArray] = []
    for (side, _), (named, encoder, n_compared) in encoders.items():
        array = PlannedArray(
            modality=side,
            named=named,
            encoder=encoder,
            source_digest=digests[side, named.name],
            n_compared=n_compared,
        )
        arrays.append(array)
    # After the store is made: each segment has its part of the rows.
    segments = {side: _segments(files, side) for side in sides}
    reports = import_arrays(
        arrays,
        segments=segments,
        table=table,
        spec=spec,
        progress=progress,
    )
    _require_few_bad(reports, spec.max_bad)
    _log_left_out(table)
    return ImportReport(
        store=files.place,
        arrays=tuple(reports),
        n_images=len(table.columns.keys),
        n_texts=len(table.columns.captions),
        has_captions=table.has_captions,
        left_out=table.left_out,
        seconds=time.perf_counter() - begin,
    )


def _log_left_out(table: ImportTable) -> None:
    """Log a warning for each reason why rows of the source are not in the store."""
    for reason, n_rows in table.left_out.items():
        if n_rows:
            logger.warning("left out of the store: %s: %d", reason, n_rows)


# --- the table ------------------------------------------------------------------------------------


def _table_of(
    files: Files,
    sides: Sides,
    spec: ImportSpec,
    pairs: PairSource | None,
) -> tuple[ImportTable, Media]:
    """Return the table with the rows of both sides, and where its images are."""
    if pairs is not None:
        return join_with(columns_of(pairs), sides, spec), pairs.media
    if not files.exists(PAIRS):
        return make_table(sides, spec), NoMedia()
    opened = FeatureStore.at(files)
    try:
        imported_table = make_table(sides, spec)
    except ApecacheError:
        # Without keys and without the store's table these sides cannot be paired.
        imported_table = None
    if imported_table is not None and imported_table.columns.digest == opened.digest:
        return imported_table, NoMedia()
    columns = columns_of_table(opened.pairs, f"the table of {opened.path}")
    media = media_at(opened.source["root"]) if opened.source["root"] else NoMedia()
    return join_with(columns, sides, spec), media


def _make_store(files: Files, table: ImportTable, media: Media) -> None:
    """Make the store, or find that it belongs to this table."""
    if files.exists(PAIRS):
        opened = FeatureStore.at(files)
        # A table that is a view, or has appended rows, is not that of the first block.
        is_one_block = opened.view is None and not opened.segments
        if not is_one_block and opened.digest == table.columns.digest:
            return
    # Also removes what a killed import has left.
    create_store(files, pairs=table.columns, root=media.place, version=version("apecache"))


def _require_few_missing(table: ImportTable, spec: ImportSpec, sides: Sides) -> None:
    """Refuse features that lack too many rows of the table, before anything is written."""
    maps = (("image", table.image_map, table.columns.keys),)
    text_keys: Sequence[str] = table.columns.captions
    for side, row_map, names in (*maps, ("text", table.text_map, text_keys)):
        if row_map is None or not len(row_map):
            continue
        missing = np.flatnonzero(row_map < 0)
        if len(missing) > spec.max_bad * len(row_map):
            opened_side = sides["image" if side == "image" else "text"]
            raise BadRowsError(
                f"{opened_side.origin} has no features of {len(missing):,} of "
                f"{counted(len(row_map), f'{side} row')} of the table (the first: "
                f"{names[int(missing[0])]}); add them, or accept with --max-bad "
                f"{len(missing) / len(row_map) + 0.005:.2f}"
            )


# --- arrays ---------------------------------------------------------------------------------------


def _encoders(
    sides: Sides,
    table: ImportTable,
    media: Media,
    spec: ImportSpec,
) -> dict[tuple[Modality, str], tuple[NamedRows, KnownEncoder, int]]:
    """Return the identity of each array's encoder, and the number of rows it was compared on."""
    encoders: dict[tuple[Modality, str], tuple[NamedRows, KnownEncoder, int]] = {}
    for side, opened_side in sides.items():
        for named in opened_side.arrays:
            n_compared = 0
            if named.encoder is None:
                encoder = unknown_encoder(named, side)
            else:
                # Only here: torch takes seconds to import.
                from apecache.store.import_encoder import known_encoder

                encoder, n_compared = known_encoder(named, table, media, spec.device)
            encoders[side, named.name] = (named, encoder, n_compared)
    return encoders


def _begin_hashing(
    pool: ThreadPoolExecutor,
    sides: Sides,
) -> dict[tuple[Modality, str], Future[str]]:
    """Hash the source of every array in the background, each file once."""
    of_paths: dict[tuple[Path, ...], Future[str]] = {}
    hashing: dict[tuple[Modality, str], Future[str]] = {}
    for side, opened_side in sides.items():
        for named in opened_side.arrays:
            future = of_paths.get(opened_side.paths) if opened_side.paths else None
            if future is None:
                future = pool.submit(digest_source, opened_side.paths, named.rows)
                of_paths[opened_side.paths] = future
            hashing[side, named.name] = future
    return hashing


def _segments(files: Files, side: Modality) -> list[SegmentRows]:
    """Return the segments of a store in order, each with its rows of one side."""
    opened = FeatureStore.at(files)
    count = "n_images" if side == "image" else "n_texts"
    n_rows = [int(block.block_source[count]) for block in opened.blocks]
    index = None if opened.view is None else opened.view.index(side)
    n_without = 0 if index is None else int((index < 0).sum())
    if n_without:
        raise MismatchError(
            f"{opened.path} has no place for {counted(n_without, f'{side} row')} of its newest "
            f"view, which no encoder has seen; extract with --{side} first, or import with "
            "--pairs into another --store"
        )
    table_rows = None if index is None else _first_rows(index, sum(n_rows))
    segments: list[SegmentRows] = []
    first = 0
    for block, n_block_rows in zip(opened.blocks, n_rows, strict=True):
        stop = first + n_block_rows
        rows = range(first, stop) if table_rows is None else table_rows[first:stop]
        segment = SegmentRows(
            # Each block is a store of its own.
            files=block.files,
            table=str(block.block_source["digest"]),
            rows=rows,
        )
        segments.append(segment)
        first = stop
    return segments


def _first_rows(index: NDArray[np.int64], n_block_rows: int) -> NDArray[np.int64]:
    """Return the first row of a view that shows each row of the blocks; -1 where none does."""
    first_rows = np.full(n_block_rows, -1, np.int64)
    shown = np.flatnonzero(index >= 0)
    # Backwards, so that the first of several rows is what stays.
    first_rows[index[shown[::-1]]] = shown[::-1]
    return first_rows


def _require_few_bad(arrays: Sequence[ImportedArray], max_bad: float) -> None:
    for array in arrays:
        if array.n_quarantined > max_bad * array.rows:
            reasons = ", ".join(
                f"{count:,} {reason}" for reason, count in sorted(array.reasons.items())
            )
            raise BadRowsError(
                f"{array.n_quarantined:,} of {counted(array.rows, f'{array.modality} row')} have "
                f"no features ({reasons}; the first: {array.examples[0]}); all others are in the "
                "store: mend the source, or accept with --max-bad"
            )
