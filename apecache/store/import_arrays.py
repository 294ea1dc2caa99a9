"""Write the arrays of imported sides into every segment of a store, and describe them."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.store.array import FeatureArray
from apecache.store.import_identity import (
    KnownEncoder,
    import_environment,
    import_fingerprint,
    layout_of,
)
from apecache.store.import_rows import (
    ArrayImport,
    ImportProgress,
    ImportState,
    described,
    write_array,
)
from apecache.store.import_sides import NamedRows
from apecache.store.import_spec import ImportSpec
from apecache.store.import_table import ImportTable, RowMap
from apecache.store.layout import ArrayLayout, ArrayRecord

logger = logging.getLogger(__name__)

FIRST_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ImportedArray:
    """Describe one array after an import."""

    modality: Modality
    name: str
    rows: int
    dim: int
    dtype: str
    n_imported: int
    """Rows that were committed by this run."""
    n_quarantined: int
    reasons: dict[str, int]
    examples: tuple[str, ...]
    """The first quarantined rows, with their reasons."""
    encoder: str | None
    """None: it is not known, and new inputs cannot be encoded."""
    n_compared: int
    """Rows that were encoded again and compared."""
    seconds: float
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class SegmentRows:
    """Name a segment of the store, and which rows of the table it has."""

    files: Files
    table: str
    """Digest of the segment's own table."""
    rows: range | NDArray[np.int64]
    """Row of the imported table for each row of the segment; -1 where it has none."""


@dataclass(frozen=True, kw_only=True)
class PlannedArray:
    """Hold one array to import, with its identity."""

    modality: Modality
    named: NamedRows
    encoder: KnownEncoder
    source_digest: str
    n_compared: int = 0
    """Rows that were encoded again and compared."""


def import_arrays(
    arrays: Sequence[PlannedArray],
    segments: Mapping[Modality, Sequence[SegmentRows]],
    table: ImportTable,
    spec: ImportSpec,
    progress: ImportProgress,
) -> list[ImportedArray]:
    """Write arrays into every segment of a store, and describe them.

    Raises:
        MismatchError: There are other features of a name; nothing is written then.
        StoreError: The operating system or the storage refused.
    """
    # A list, not an iterator: every mismatch is found before the first row is written.
    planned = [(array, _tasks(array, segments[array.modality], table, spec)) for array in arrays]
    return [_import_array(array, tasks, spec, progress) for array, tasks in planned]


def _tasks(
    array: PlannedArray,
    segments: Sequence[SegmentRows],
    table: ImportTable,
    spec: ImportSpec,
) -> list[ArrayImport]:
    """Return what each segment gets of an array."""
    is_image = array.modality == "image"
    row_map = table.image_map if is_image else table.text_map
    assert row_map is not None
    names = table.columns.keys if is_image else table.columns.captions
    tasks: list[ArrayImport] = []
    for segment in segments:
        rows = segment.rows
        segment_map, keys = _part_of_table(rows, row_map, names)
        layout = layout_of(array.named, len(rows), spec.storage_dtype, spec.shard_rows)
        fingerprint = import_fingerprint(array.encoder, layout, array.source_digest, segment_map)
        record = ArrayRecord(
            modality=array.modality,
            name=array.named.name,
            spec=array.encoder.spec,
            fingerprint=fingerprint,
            layout=layout,
            metadata={},
            environment=import_environment(),
            table=segment.table,
        )
        task = ArrayImport(
            files=segment.files,
            record=record,
            source=array.named.rows,
            row_map=segment_map,
            keys=keys,
        )
        tasks.append(replace(task, record=described(task)))
    return tasks


def _part_of_table(
    rows: range | NDArray[np.int64],
    row_map: RowMap,
    names: Sequence[str],
) -> tuple[RowMap, Sequence[str]]:
    """Return the source's row of each row of a segment, and what each is called."""
    if isinstance(rows, range):
        return row_map[rows.start : rows.stop], names[rows.start : rows.stop]
    # The last entry stands for rows that the table does not have.
    padded = np.append(row_map, -1)
    return padded[rows], [names[row] if row >= 0 else "" for row in rows.tolist()]


def _import_array(
    array: PlannedArray,
    tasks: Sequence[ArrayImport],
    spec: ImportSpec,
    progress: ImportProgress,
) -> ImportedArray:
    """Write one array, and describe it."""
    begin = time.perf_counter()
    layout = tasks[0].record.layout
    n_rows = sum(len(task.row_map) for task in tasks)
    array_name = f"{array.modality} features {array.named.name}"
    logger.info("%s: importing %d rows", array_name, n_rows)
    tally = _Tally(modality=array.modality, rows=n_rows, row_bytes=layout.row_bytes)

    def advance(n_more: int, n_bad: int) -> None:
        tally.done += n_more
        tally.n_bad += n_bad
        progress(tally.state)

    n_imported = sum(write_array(task, spec.recheck, advance) for task in tasks)
    logger.info("%s: %d rows imported, the others were there", array_name, n_imported)
    segment_arrays = [FeatureArray(files=task.files, record=task.record) for task in tasks]
    # What this run has written itself need not be read again to be counted.
    is_sound = n_imported == n_rows and tally.n_bad == 0
    described_array = _describe(
        replace(segment_arrays[0], appended=tuple(segment_arrays[1:])),
        is_sound=is_sound,
        layout=layout,
        n_imported=n_imported,
        seconds=time.perf_counter() - begin,
    )
    return replace(described_array, n_compared=array.n_compared)


@dataclass(kw_only=True)
class _Tally:
    """Count the rows of one array, over all segments."""

    modality: Modality
    rows: int
    row_bytes: int
    done: int = 0
    n_bad: int = 0

    @property
    def state(self) -> ImportState:
        return ImportState(
            modality=self.modality,
            done=self.done,
            rows=self.rows,
            n_bad=self.n_bad,
            n_bytes=self.done * self.row_bytes,
        )


def _describe(
    array: FeatureArray,
    is_sound: bool,
    layout: ArrayLayout,
    n_imported: int,
    seconds: float,
) -> ImportedArray:
    bad_rows = [] if is_sound or not array.n_quarantined else array.quarantined()
    reasons = Counter(row["reason"] for row in bad_rows)
    examples = [
        f"row {row['row']} ({row['key']}): {row['reason']}: {row['detail']}"
        for row in bad_rows[:FIRST_EXAMPLES]
    ]
    spec = array.record.spec
    return ImportedArray(
        modality=array.record.modality,
        name=array.name,
        rows=array.rows,
        dim=array.dim,
        dtype=layout.dtype,
        n_imported=n_imported,
        n_quarantined=len(bad_rows),
        reasons=dict(reasons),
        examples=tuple(examples),
        encoder=None if spec.is_imported else str(spec),
        n_compared=0,
        seconds=seconds,
        n_bytes=n_imported * layout.row_bytes,
    )
