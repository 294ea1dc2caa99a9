"""Write imported rows into arrays of a store: shard by shard, by the store's commit protocol."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.errors import MismatchError
from apecache.fingerprint import Modality, describe_difference
from apecache.storage.files import Files
from apecache.store.feature_files.rows import FeatureRows, Floats, is_ascending, spooled
from apecache.store.import_table import RowMap
from apecache.store.layout import ArrayRecord, records_folder, with_metadata
from apecache.store.records import read_record
from apecache.store.writer import ArrayWriter, QuarantinedRow, create_array

WRITERS = 2
"""Shards that are prepared and committed side by side."""
CACHED_BYTES = 1 << 18
MAX_ROW_WORDS = 1 << 32
"""More than any row has: both halves of a hash take other factors."""
FLOAT_BITS = {"float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
"""The integer of the same width, and the bits that are all set in NaN and in infinities."""


@dataclass(frozen=True, kw_only=True)
class ImportState:
    """Say how far the import of one side is."""

    modality: Modality
    done: int
    rows: int
    n_bad: int
    n_bytes: int


ImportProgress = Callable[[ImportState], None]


@dataclass(frozen=True, kw_only=True)
class ArrayImport:
    """Say what one array of one segment gets."""

    files: Files
    record: ArrayRecord
    source: FeatureRows
    row_map: RowMap
    """[rows of the array]: rows of the source; -1 where it has none."""
    keys: Sequence[str]
    """What each row is called in quarantine lists."""


def described(task: ArrayImport) -> ArrayRecord:
    """Return the record of the array: the one that exists, or a new one.

    Raises:
        MismatchError: There are features of that name from another source.
    """
    record = task.record
    name = f"{records_folder(record.modality, record.name)}/fingerprint.json"
    if not task.files.exists(name):
        return with_metadata(record)
    value = read_record(task.files, name)
    existing = ArrayRecord.from_json(record.modality, record.name, value)
    differences = record.fingerprint.difference(existing.fingerprint)
    if differences:
        raise MismatchError(
            f"{task.files.place} holds {record.modality} features {record.name} of another source "
            f"or setting: {describe_difference(differences)}; import under another name with "
            f"--{record.modality}-name, or first: apecache remove {task.files.place} "
            f"{record.modality}/{record.name}",
            differences,
        )
    return existing


def write_array(task: ArrayImport, recheck: bool, advance: Callable[[int, int], None]) -> int:
    """Commit the shards that are not committed yet, then seal the array.

    Args:
        task: The array; its record is one of `described`.
        recheck: Compare committed shards with the source, and write damaged ones again.
        advance: Called with the number of rows and of quarantined rows after every shard.

    Returns:
        Number of rows that were committed now.

    Raises:
        MismatchError: A shard is committed with other bytes.
        StoreError: The operating system or the storage refused.
    """
    create_array(task.files, task.record)
    writer = ArrayWriter(task.files, task.record)
    layout = writer.layout
    pending = list(range(layout.n_shards)) if recheck else writer.pending()
    # Rows of an earlier run count as done at once, so that progress begins where it ended.
    n_standing = layout.rows - sum(len(layout.shard(shard)) for shard in pending)
    advance(n_standing, 0)
    source = _readable_in_order(task)
    waiting: deque[tuple[int, Future[int]]] = deque()

    def finish_first() -> None:
        shard, result = waiting.popleft()
        advance(len(layout.shard(shard)), result.result())

    n_written = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for shard in pending:
            shard_range = layout.shard(shard)
            source_rows = task.row_map[shard_range.start : shard_range.stop]
            # Read here and not in the pool: some sources can only be read in order.
            features = read_mapped(source, source_rows)
            lengths = None if source.lengths is None else source.lengths[source_rows]
            result = pool.submit(
                _commit,
                writer,
                shard=shard,
                source_rows=source_rows,
                features=features,
                lengths=lengths,
                keys=task.keys[shard_range.start : shard_range.stop],
            )
            waiting.append((shard, result))
            n_written += len(shard_range)
            # Few shards are in memory at a time, however many there are.
            if len(waiting) > WRITERS:
                finish_first()
        while waiting:
            finish_first()
    writer.seal()
    return n_written


def _readable_in_order(task: ArrayImport) -> FeatureRows:
    """Return the source, copied first if its rows are wanted in an order that is slow to read."""
    used_rows = task.row_map[task.row_map >= 0]
    return (
        task.source if task.source.is_scattered or is_ascending(used_rows) else spooled(task.source)
    )


def read_mapped(source: FeatureRows, source_rows: RowMap) -> Floats:
    """Read rows of the source; NaN where it has none."""
    present = source_rows >= 0
    if present.all():
        return source.read(source_rows)
    features = np.full((len(source_rows), *source.row_shape), np.nan, source.dtype)
    if present.any():
        features[present] = source.read(source_rows[present])
    return features


def _commit(
    writer: ArrayWriter,
    shard: int,
    source_rows: RowMap,
    features: Floats,
    lengths: NDArray[np.int64] | None,
    keys: Sequence[str],
) -> int:
    """Commit one shard, and return how many of its rows are quarantined."""
    layout = writer.layout
    hashes = hash_rows(features)
    is_finite = finite_rows(features)
    # Beyond float16 a value becomes infinity, which is reported by row.
    with np.errstate(over="ignore"):
        stored = features.astype(layout.read_dtype, copy=False)
    fits = is_finite if stored is features else finite_rows(stored)
    first_row = layout.shard(shard).start
    quarantined: list[QuarantinedRow] = []
    for row_in_shard in np.flatnonzero(~fits).tolist():
        reason, detail = _fault(source_rows[row_in_shard] >= 0, bool(is_finite[row_in_shard]))
        bad_row = QuarantinedRow(
            row=first_row + row_in_shard,
            key=keys[row_in_shard],
            reason=reason,
            detail=detail,
        )
        quarantined.append(bad_row)
        # No input, no hash: rows without features are nobody's copies.
        if reason == "missing":
            hashes[row_in_shard] = ""
    if lengths is not None:
        lengths = np.where(source_rows >= 0, lengths, 0)
    writer.commit(
        shard,
        features=stored,
        content=hashes,
        quarantined=quarantined,
        lengths=lengths,
    )
    return len(quarantined)


def _fault(is_present: bool, is_finite: bool) -> tuple[str, str]:
    if not is_present:
        return "missing", "the source has no features of this key"
    if not is_finite:
        return "not-finite", "NaN or infinity in the source"
    return "overflow", "a value is beyond float16; use --storage float32"


def finite_rows(features: Floats) -> NDArray[np.bool_]:
    """Return bool [n]: rows without NaN and infinities.

    All bits of the exponent are set in those; looking at bits is several times as fast as
    `isfinite` for float16.
    """
    integer, exponent = FLOAT_BITS[features.dtype.name]
    flat = features.reshape(len(features), -1).view(integer)
    finite = np.empty(len(flat), np.bool_)
    for rows in _cached_blocks(flat):
        bits = flat[rows] & integer(exponent)
        finite[rows] = bits.max(axis=1) != exponent
    return finite


def _cached_blocks(flat: NDArray[Any]) -> Iterator[slice]:
    """Yield ranges of rows that fit the processor's cache, so that temporaries stay in it."""
    n_rows = max(1, CACHED_BYTES // max(1, flat.shape[1] * flat.itemsize))
    for first in range(0, len(flat), n_rows):
        yield slice(first, first + n_rows)


def hash_rows(features: Floats) -> list[str]:
    """Return a hash of 128 bits of each row's bytes, 32 hexadecimal digits.

    Equal rows have equal hashes, so that copies in two splits are found. Each half is a sum of the
    row's 64-bit words times fixed odd numbers: a million rows take a second, where a call of BLAKE3
    for each would take ten. It guards against accidents, and not against people who make
    collisions: the hash of the whole source is BLAKE3.
    """
    flat = np.ascontiguousarray(features).reshape(len(features), -1)
    raw = flat.view(np.uint8)
    if raw.shape[1] % 8:
        raw = np.pad(raw, ((0, 0), (0, 8 - raw.shape[1] % 8)))
    words = raw.view("<u8")
    sums = np.empty((len(words), 2), "<u8")
    halves = [_factors(half * MAX_ROW_WORDS, words.shape[1]) for half in range(2)]
    for rows in _cached_blocks(words):
        for half, factors in enumerate(halves):
            sums[rows, half] = np.einsum("ij,j->i", words[rows], factors)
    digits = sums.tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def _factors(first: int, count: int) -> NDArray[np.uint64]:
    """Return fixed odd 64-bit numbers, by SplitMix64 (Steele et al. 2014, figure 16).

    NumPy's own generators may give other numbers in another version.
    """
    numbers = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    state = numbers * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)
