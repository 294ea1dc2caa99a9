"""Read one encoder's features of a store: how complete they are, and all of them, checked."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from google_crc32c import extend as crc32c_extend
from numpy.typing import NDArray

from apecache.errors import DamagedError, IncompleteError
from apecache.fingerprint import content_hash
from apecache.storage.files import Files
from apecache.store.layout import (
    OK,
    QUARANTINED,
    ArrayRecord,
    array_folder,
    chunk_name,
    quarantine_name,
    records_folder,
)
from apecache.store.quantize import restore
from apecache.store.records import CommitRecord, digest_commits, read_commits, read_record
from apecache.store.wide_rows import as_wide
from apecache.store.writer import ArrayWriter

if TYPE_CHECKING:
    import torch

QUARANTINE_TYPES = {"row": int, "key": str, "reason": str, "detail": str}
"""Fields of a line in a quarantine list."""


@dataclass(frozen=True, kw_only=True)
class FeatureArray:
    """Read one encoder's features of one modality.

    They are `rows` rows of `row_shape` (dim, with views and tokens before it where there are any),
    not normalized. Their `dtype` when read is float16 or float32; int8 with scales is read as
    float16.
    """

    files: Files
    record: ArrayRecord
    """Record of the first segment, which `files` and `commits` belong to as well."""
    appended: tuple["FeatureArray", ...] = ()
    """Features of the later segments."""
    rows_to_come: int = 0
    """Number of rows in segments that have no features of this encoder yet."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def rows(self) -> int:
        n_appended = sum(array.rows for array in self.appended)
        return self.record.layout.rows + n_appended + self.rows_to_come

    @property
    def dim(self) -> int:
        return self.record.layout.dim

    @property
    def tokens(self) -> int | None:
        """Return the number of positions of each row, with padding; None for pooled features.

        In a ragged array it is that of the widest segment.
        """
        first_tokens = self.record.layout.tokens
        return (
            None
            if first_tokens is None
            else max(first_tokens, *(array.tokens or 0 for array in self.appended), 0)
        )

    @property
    def views(self) -> int | None:
        """Return the number of augmented views of each image; None for the image itself."""
        return self.record.layout.views

    @property
    def row_shape(self) -> tuple[int, ...]:
        return replace(self.record.layout, tokens=self.tokens).row_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.record.layout.read_dtype)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row's features as they are stored, with padding."""
        return replace(self.record.layout, tokens=self.tokens).row_bytes

    @cached_property
    def commits(self) -> Mapping[int, CommitRecord]:
        """Return the records of the first segment by shard, without their `content`."""
        return ArrayWriter(self.files, self.record).committed()

    @property
    def share_done(self) -> float:
        return self._rows_done / max(1, self.rows)

    @property
    def complete(self) -> bool:
        return (
            self._is_sealed
            and not self.rows_to_come
            and all(array.complete for array in self.appended)
        )

    @property
    def n_quarantined(self) -> int:
        n_first = sum(record.n_quarantined for record in self._known.values())
        return n_first + sum(array.n_quarantined for array in self.appended)

    def quarantined(self) -> list[dict[str, Any]]:
        """Return {row, key, reason, detail} of every row that could not be encoded, by row."""
        rows: list[dict[str, Any]] = []
        for commit in self._known.values():
            name = quarantine_name(self.record.modality, self.name, commit.shard)
            if name in commit.objects:
                rows += self._quarantine(commit, name)
        for array, first in self._later:
            rows += [{**row, "row": row["row"] + first} for row in array.quarantined()]
        return rows

    def content(self) -> list[str]:
        """Return the hash of each row's input; empty if it was unreadable or is not read yet."""
        hashes = [""] * self.record.layout.rows
        for commit in self._known_records():
            first, stop = commit.rows
            hashes[first:stop] = commit.content
        for array in self.appended:
            hashes += array.content()
        return hashes + [""] * self.rows_to_come

    def load(self, out: NDArray[Any] | None = None, threads: int | None = None) -> NDArray[Any]:
        """Read all rows in parallel into one buffer.

        Args:
            out: A buffer of the result's shape and dtype to fill, for instance pinned memory.
            threads: Number of parallel reads; None for as many as are worth it where the store is.

        Returns:
            [rows, *row_shape], not normalized; quarantined rows are NaN.

        Raises:
            IncompleteError: Extraction has not finished.
            DamagedError: A shard is not what was committed.
        """
        commits = self._sealed
        shape = (self.rows, *self.row_shape)
        # A wrong size shows here, before the buffer is allocated.
        self._require_sizes(commits)
        target = np.empty(shape, self.dtype) if out is None else out
        if target.shape != shape or target.dtype != self.dtype or not target.flags.carray:
            raise ValueError(f"out: expected contiguous, writable {shape} of {self.dtype}")
        layout = self.record.layout
        with as_wide(target[: layout.rows], layout.row_shape) as buffer:
            self._load_shards(commits, read=self._read_features, target=buffer, threads=threads)
        for array, first in self._later:
            segment_rows = target[first : first + array.rows]
            with as_wide(segment_rows, array.row_shape) as buffer:
                array.load(buffer, threads)
        return target

    def tensor(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Read all rows as a torch tensor on the CPU; `load` gives a NumPy array.

        Args:
            dtype: Type of the tensor; None: that of the store.

        Returns:
            [rows, *row_shape], not normalized; quarantined rows are NaN.

        Raises:
            IncompleteError, DamagedError: As `load` does.
        """
        # Only here: a store can be read without torch, which takes seconds to import.
        import torch

        return torch.from_numpy(self.load()).to(dtype)

    def load_shards(
        self,
        threads: int | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Read all rows shard by shard, some shards ahead and in parallel.

        Args:
            threads: Number of parallel reads; None for as many as are worth it where the store is.

        Yields:
            Rows of the array, int64 [n], and their features [n, *row_shape] as `load` gives them.

        Raises:
            IncompleteError, DamagedError: As `load` does.
        """
        for shard, features in self._read_ahead(self.stored_shards(), threads):
            yield np.arange(shard.first, shard.first + len(features)), features

    def stored_shards(self) -> list["StoredShard"]:
        """List the shards of all segments, in order; raises as `load` does."""
        self._require_sizes(self._sealed)
        shards = [
            StoredShard(array=self, commit=commit, first=commit.rows[0])
            for commit in self._sealed.values()
        ]
        for array, first in self._later:
            for shard in array.stored_shards():
                shards.append(replace(shard, first=shard.first + first))
        return shards

    def _read_ahead(
        self,
        shards: Iterable["StoredShard"],
        threads: int | None,
    ) -> Iterator[tuple["StoredShard", NDArray[Any]]]:
        """Read shards in order, some ahead and in parallel, as wide as the widest segment."""
        n_threads = threads or self.files.readers
        waiting: deque[tuple[StoredShard, Future[NDArray[Any]]]] = deque()
        with ThreadPoolExecutor(n_threads) as pool:
            for shard in shards:
                waiting.append((shard, pool.submit(self._read_wide, shard)))
                if len(waiting) > n_threads:
                    first, rows = waiting.popleft()
                    yield first, rows.result()
            for first, rows in waiting:
                yield first, rows.result()

    def _read_wide(self, shard: "StoredShard") -> NDArray[Any]:
        """Read the features of a shard of any segment, [n, *row_shape]."""
        wide = np.empty((shard.n_rows, *self.row_shape), self.dtype)
        self._read_into(shard, wide)
        return wide

    def _read_into(self, shard: "StoredShard", target: NDArray[Any]) -> None:
        array = shard.array
        with as_wide(target, array.record.layout.row_shape) as buffer:
            array._read_features(shard.commit, buffer)

    def load_ok(self) -> NDArray[np.bool_]:
        """Return bool [rows], True where the row has features; raises as `load` does."""
        commits = self._sealed
        self._require_sizes(commits)
        status = np.zeros(self.rows, np.uint8)
        self._load_shards(commits, partial(self._read_chunk, part_name="status"), status)
        for array, first in self._later:
            status[first : first + array.rows] = np.where(array.load_ok(), OK, QUARANTINED)
        ok: NDArray[np.bool_] = status == OK
        return ok

    def load_lengths(self) -> NDArray[np.uint16] | None:
        """Return the tokens of each row, uint16 [rows], 0 where quarantined.

        None means that all rows have the same number. Raises as `load` does.
        """
        if not self.record.layout.ragged:
            return None
        commits = self._sealed
        self._require_sizes(commits)
        lengths = np.zeros(self.rows, np.uint16)
        self._load_shards(commits, partial(self._read_chunk, part_name="length"), lengths)
        for array, first in self._later:
            # Segments are ragged like the first one, so this is not None.
            lengths[first : first + array.rows] = array.load_lengths()  # type: ignore[assignment]
        return lengths

    def load_shard(self, shard: int) -> NDArray[Any]:
        """Read the rows of one committed shard, even if the array is not complete.

        Raises:
            DamagedError: The shard is not what was committed.
            IncompleteError: The shard is not committed.
        """
        layout = self.record.layout
        n_rows = len(layout.shard(shard))
        target = np.empty((n_rows, *layout.row_shape), self.dtype)
        self._read_features(self._commit(shard), target)
        return target

    def rows_ok(self, shard: int) -> list[int]:
        """Return which rows of one committed shard have features, counted in the whole array."""
        rows = self.record.layout.shard(shard)
        status = np.zeros(len(rows), np.uint8)
        self._read_chunk(self._commit(shard), status, "status")
        return [rows.start + int(i) for i in np.flatnonzero(status == OK)]

    @cached_property
    def _sealed(self) -> Mapping[int, CommitRecord]:
        """Return all records of the first segment.

        Raises:
            IncompleteError: A segment is not complete.
        """
        if not self.complete:
            array_name = f"{self.record.modality}/{self.name}"
            raise IncompleteError(
                f"{array_name} is {self.share_done:.0%} done; resume with the same apecache extract"
            )
        return self._own_sealed

    @cached_property
    def _own_sealed(self) -> Mapping[int, CommitRecord]:
        """Return the sealed records of the first segment by shard, without their `content`."""
        # Not from `commits`, which may have been read before the seal was written.
        return {record.shard: record.without_content() for record in self._sealed_records()}

    def _sealed_records(self) -> Iterator[CommitRecord]:
        """Yield the records one by one.

        Raises:
            DamagedError: After the last record, if they are not those that were sealed.
        """
        array_name = f"{self.record.modality}/{self.name}"
        name = f"{records_folder(self.record.modality, self.name)}/seal.json"
        sealed_digest = read_record(self.files, name).get("digest")
        commit_hashes = []
        for record, record_hash in read_commits(self.files, self.record):
            commit_hashes.append(record_hash)
            yield record
        if (
            len(commit_hashes) != self.record.layout.n_shards
            or digest_commits(commit_hashes) != sealed_digest
        ):
            have = f"{len(commit_hashes)} of {self.record.layout.n_shards} commit records found"
            raise DamagedError(
                f"{array_name} is not what was sealed ({have}); restore "
                f"{self.files.where(name.rpartition('/')[0])}"
            )

    @property
    def _is_sealed(self) -> bool:
        return self.files.exists(f"{records_folder(self.record.modality, self.name)}/seal.json")

    @property
    def _later(self) -> list[tuple["FeatureArray", int]]:
        """Return the appended segments, each with its first row."""
        starts = accumulate(
            (array.rows for array in self.appended),
            initial=self.record.layout.rows,
        )
        return list(zip(self.appended, starts, strict=False))

    @property
    def _rows_done(self) -> int:
        n_first = sum(commit.rows[1] - commit.rows[0] for commit in self._known.values())
        return n_first + sum(array._rows_done for array in self.appended)

    @property
    def _known(self) -> Mapping[int, CommitRecord]:
        """Return all records of a complete array, else those that exist by now."""
        return self._own_sealed if self._is_sealed else self.commits

    def _known_records(self) -> Iterator[CommitRecord]:
        """Return the same records, read again with their `content`."""
        if self._is_sealed:
            return self._sealed_records()
        return (record for record, _ in read_commits(self.files, self.record))

    def _commit(self, shard: int) -> CommitRecord:
        if shard not in self.commits:
            raise IncompleteError(
                f"shard {shard} of {self.record.modality}/{self.name} is not committed"
            )
        return self.commits[shard]

    def _require_sizes(self, commits: Mapping[int, CommitRecord]) -> None:
        """Check that files are as long as their records say, before memory is allocated."""
        size_by_name = self.files.sizes(array_folder(self.record.modality, self.name))
        for commit in commits.values():
            for part_name in self.record.layout.parts:
                name = chunk_name(self.record, part_name, commit.shard)
                if size_by_name.get(name) != commit.objects[name].bytes:
                    problem = (
                        "differs from its commit record" if name in size_by_name else "is missing"
                    )
                    raise self._damaged(commit.shard, name, problem)

    def _load_shards(
        self,
        commits: Mapping[int, CommitRecord],
        read: Callable[[CommitRecord, NDArray[Any]], None],
        target: NDArray[Any],
        threads: int | None = None,
    ) -> None:
        """Read every shard, in parallel, to where its rows are in `target`."""

        def read_shard(commit: CommitRecord) -> None:
            first, stop = commit.rows
            read(commit, target[first:stop])

        with ThreadPoolExecutor(threads or self.files.readers) as pool:
            # The list asks for every result, which raises what a read raised.
            list(pool.map(read_shard, commits.values()))

    def _can_be_read_in_pieces(self, shard: "StoredShard") -> bool:
        """Return whether `_read_pieces` can read a shard: rows are stored as they are read."""
        layout = shard.array.record.layout
        return not layout.scaled and layout.row_shape == self.row_shape

    def _read_pieces(self, shard: "StoredShard", pieces: Sequence[NDArray[Any]]) -> None:
        """Read the rows of a shard, in order, into several buffers that hold all of them."""
        views = [piece.data.cast("B") for piece in pieces]
        shard.array._read_parts(shard.commit, views, "features")

    def _read_features(self, commit: CommitRecord, target: NDArray[Any]) -> None:
        if not self.record.layout.scaled:
            self._read_chunk(commit, target, "features")
            return
        values = np.empty(target.shape, np.int8)
        scales = np.empty(target.shape[:-1], np.float32)
        self._read_scaled(commit, values, scales)
        restore(values, scales, target)

    def _read_scaled(
        self,
        commit: CommitRecord,
        values: NDArray[np.int8],
        scales: NDArray[np.float32],
    ) -> None:
        """Read the integers of a shard and their scales, as they are stored."""
        self._read_chunk(commit, values, "features")
        self._read_chunk(commit, scales, "scale")

    def _read_chunk(self, commit: CommitRecord, target: NDArray[Any], part_name: str) -> None:
        """Read one chunk file into `target`, and check it."""
        self._read_parts(commit, [target.data.cast("B")], part_name)

    def _read_parts(
        self,
        commit: CommitRecord,
        views: Sequence[memoryview],
        part_name: str,
    ) -> None:
        """Read one chunk file into buffers, one after another, and check it."""
        name = chunk_name(self.record, part_name, commit.shard)
        expected = commit.objects[name]
        # The chunk of the last shard is padded; the padding goes to a buffer of its own.
        # The last 4 bytes of a chunk are its crc32c.
        n_data = sum(view.nbytes for view in views)
        padding = memoryview(bytearray(expected.bytes - n_data - 4))
        ending = memoryview(bytearray(4))
        check = 0
        summed = 0

        def add(block: memoryview) -> None:
            nonlocal check, summed
            # No block extends over two buffers, so none has both data and its checksum.
            if summed < expected.bytes - 4:
                check = crc32c_extend(check, np.frombuffer(block, np.uint8))
            summed += block.nbytes

        try:
            count = self.files.read_into(name, [*views, padding, ending], add)
        except FileNotFoundError:
            raise self._damaged(commit.shard, name, "is missing") from None
        stored = int.from_bytes(ending, "little")
        if count != expected.bytes or check != expected.crc32c or stored != check:
            raise self._damaged(commit.shard, name, "differs from its commit record")

    def _quarantine(self, commit: CommitRecord, name: str) -> list[dict[str, Any]]:
        try:
            rows = [json.loads(line) for line in self._read_checked(commit, name).splitlines()]
            if all(_field_types(row) == QUARANTINE_TYPES for row in rows):
                return rows
        except (ValueError, AttributeError, RecursionError):
            pass
        raise self._damaged(commit.shard, name, "is not a list of rows")

    def _read_checked(self, commit: CommitRecord, name: str) -> bytes:
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            raise self._damaged(commit.shard, name, "is missing") from None
        if content_hash(data) != commit.objects[name].blake3:
            raise self._damaged(commit.shard, name, "differs from its commit record")
        return data

    def _damaged(self, shard: int, name: str, problem: str) -> DamagedError:
        return DamagedError(
            f"{self.files.where(name)} (shard {shard}) {problem}; "
            "repair with: apecache repair STORE"
        )


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """Locate a committed shard among the rows of all segments."""

    array: FeatureArray
    """The segment's own array."""
    commit: CommitRecord
    first: int
    """Its first row."""

    @property
    def n_rows(self) -> int:
        first, stop = self.commit.rows
        return stop - first


def _field_types(row: Mapping[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in row.items()}
