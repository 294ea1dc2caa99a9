"""One encoder's features in a store: how complete they are, and whole into memory, checked."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

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
from apecache.store.writer import ArrayWriter


@dataclass(frozen=True, kw_only=True)
class FeatureArray:
    """One encoder's features of one modality. `rows` of `row_shape` ([views,] [tokens,] dim), not
    normalised; `dtype` float16 or float32 when they are read (float16 also where the store keeps
    int8 and scales).

    `files`, `record` and `commits` are those of the first segment; `appended` are the later ones.
    `rows_to_come`: rows of segments that have nothing of this encoder yet.
    """

    files: Files
    record: ArrayRecord
    appended: tuple["FeatureArray", ...] = ()
    rows_to_come: int = 0

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def rows(self) -> int:
        return (
            self.record.layout.rows + sum(array.rows for array in self.appended) + self.rows_to_come
        )

    @property
    def dim(self) -> int:
        return self.record.layout.dim

    @property
    def tokens(self) -> int | None:
        """Positions of each row, padding included (of the widest segment, if ragged); None for
        pooled features."""
        own = self.record.layout.tokens
        return None if own is None else max(own, *(array.tokens or 0 for array in self.appended), 0)

    @property
    def views(self) -> int | None:
        """Augmentations of each image; None for the image as it is."""
        return self.record.layout.views

    @property
    def row_shape(self) -> tuple[int, ...]:
        return replace(self.record.layout, tokens=self.tokens).row_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.record.layout.read_dtype)

    @property
    def row_bytes(self) -> int:
        """Of features as they are stored, padding included."""
        return replace(self.record.layout, tokens=self.tokens).row_bytes

    @cached_property
    def commits(self) -> Mapping[int, CommitRecord]:
        """Records by shard, without their `content`."""
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
        own = sum(record.n_quarantined for record in self._known.values())
        return own + sum(array.n_quarantined for array in self.appended)

    def quarantined(self) -> list[dict[str, Any]]:
        """{row, key, reason, detail} of every row that could not be encoded, by row."""
        commits = self._known.values()
        names = [
            quarantine_name(self.record.modality, self.name, commit.shard) for commit in commits
        ]
        rows = [
            row
            for commit, name in zip(commits, names, strict=True)
            if name in commit.objects
            for row in self._quarantine(commit, name)
        ]
        later = (
            ({**row, "row": row["row"] + first})
            for array, first in self._later
            for row in array.quarantined()
        )
        return [*rows, *later]

    def content(self) -> list[str]:
        """Hash of every row's input, as it was read; empty where it could not be, or has not been
        yet."""
        hashes = [""] * self.record.layout.rows
        for commit in self._known_records():
            hashes[commit.rows[0] : commit.rows[1]] = commit.content
        for array in self.appended:
            hashes += array.content()
        return hashes + [""] * self.rows_to_come

    def load(self, out: NDArray[Any] | None = None, threads: int | None = None) -> NDArray[Any]:
        """All rows [rows, *row_shape], read in parallel into one buffer; quarantined rows are NaN.

        Args:
            out: a buffer of that shape and of the array's dtype to fill (pinned memory, for
                instance).
            threads: that read side by side; None for as many as pay where the store is.

        Raises:
            IncompleteError: extraction has not finished; DamagedError: a shard is not what was
                committed.
        """
        commits = self._sealed
        shape = (self.rows, *self.row_shape)
        self._require_sizes(commits)
        target = np.empty(shape, self.dtype) if out is None else out
        if target.shape != shape or target.dtype != self.dtype or not target.flags.carray:
            raise ValueError(f"out: expected contiguous, writable {shape} of {self.dtype}")
        shape = self.record.layout.row_shape
        with _as_wide(target[: self.record.layout.rows], shape) as own:
            self._load_shards(commits, read=self._read_features, target=own, threads=threads)
        for array, first in self._later:
            with _as_wide(target[first : first + array.rows], array.row_shape) as own:
                array.load(own, threads)
        return target

    def load_ok(self) -> NDArray[np.bool_]:
        """[rows], True where the row has features. Raises as `load` does."""
        commits = self._sealed
        self._require_sizes(commits)
        status = np.zeros(self.rows, np.uint8)
        self._load_shards(commits, partial(self._read_chunk, part="status"), status)
        for array, first in self._later:
            status[first : first + array.rows] = np.where(array.load_ok(), OK, QUARANTINED)
        ok: NDArray[np.bool_] = status == OK
        return ok

    def load_lengths(self) -> NDArray[np.uint16] | None:
        """[rows], tokens of each row (0 where quarantined); None if all rows have the same. Raises
        as `load` does."""
        if not self.record.layout.ragged:
            return None
        commits = self._sealed
        self._require_sizes(commits)
        lengths = np.zeros(self.rows, np.uint16)
        self._load_shards(commits, partial(self._read_chunk, part="length"), lengths)
        for array, first in self._later:
            lengths[first : first + array.rows] = array.load_lengths()  # type: ignore[assignment]  # ragged, as we are
        return lengths

    def load_shard(self, shard: int) -> NDArray[Any]:
        """Rows of one committed shard, complete or not. Raises DamagedError as `load` does,
        IncompleteError if it is not committed."""
        target = np.empty(
            (len(self.record.layout.shard(shard)), *self.record.layout.row_shape),
            self.dtype,
        )
        self._read_features(self._commit(shard), target)
        return target

    def rows_ok(self, shard: int) -> list[int]:
        """Rows of one committed shard that have features, counted from the start of the array."""
        rows = self.record.layout.shard(shard)
        status = np.zeros(len(rows), np.uint8)
        self._read_chunk(self._commit(shard), status, "status")
        return [rows.start + int(i) for i in np.flatnonzero(status == OK)]

    def require_complete(self) -> None:
        """Raises IncompleteError, or DamagedError if the records are not all of those that were
        sealed."""
        _ = self._sealed

    @cached_property
    def _sealed(self) -> Mapping[int, CommitRecord]:
        """All records of the first segment. Raises IncompleteError unless all segments are
        complete."""
        if not self.complete:
            what = f"{self.record.modality}/{self.name}"
            raise IncompleteError(
                f"{what} is {self.share_done:.0%} done; resume with the same apecache extract"
            )
        return self._own_sealed

    @cached_property
    def _own_sealed(self) -> Mapping[int, CommitRecord]:
        """Read anew: `commits` may be older than the seal."""
        return {record.shard: record.without_content() for record in self._sealed_records()}

    def _sealed_records(self) -> Iterator[CommitRecord]:
        """One by one; raises DamagedError, after the last, unless they are those that were
        sealed."""
        what = f"{self.record.modality}/{self.name}"
        name = f"{records_folder(self.record.modality, self.name)}/seal.json"
        wanted = read_record(self.files, name).get("digest")
        found = []
        for record, of in read_commits(self.files, self.record):
            found.append(of)
            yield record
        if len(found) != self.record.layout.n_shards or digest_commits(found) != wanted:
            have = f"{len(found)} of {self.record.layout.n_shards} commit records found"
            raise DamagedError(
                f"{what} is not what was sealed ({have}); restore "
                f"{self.files.where(name.rpartition('/')[0])}"
            )

    @property
    def _is_sealed(self) -> bool:
        return self.files.exists(f"{records_folder(self.record.modality, self.name)}/seal.json")

    @property
    def _later(self) -> list[tuple["FeatureArray", int]]:
        """Appended segments, each with its first row."""
        starts = accumulate(
            (array.rows for array in self.appended),
            initial=self.record.layout.rows,
        )
        return list(zip(self.appended, starts, strict=False))

    @property
    def _rows_done(self) -> int:
        own = sum(commit.rows[1] - commit.rows[0] for commit in self._known.values())
        return own + sum(array._rows_done for array in self.appended)

    @property
    def _known(self) -> Mapping[int, CommitRecord]:
        """What can be relied on: all records of a complete array, else those that are there."""
        return self._own_sealed if self._is_sealed else self.commits

    def _known_records(self) -> Iterator[CommitRecord]:
        """The same, read anew and with their `content`."""
        return (
            self._sealed_records()
            if self._is_sealed
            else (r for r, _ in read_commits(self.files, self.record))
        )

    def _commit(self, shard: int) -> CommitRecord:
        if shard not in self.commits:
            raise IncompleteError(
                f"shard {shard} of {self.record.modality}/{self.name} is not committed"
            )
        return self.commits[shard]

    def _require_sizes(self, commits: Mapping[int, CommitRecord]) -> None:
        """Files as long as their records say, before memory is allocated for what is in them."""
        sizes = self.files.sizes(array_folder(self.record.modality, self.name))
        for commit in commits.values():
            for part in self.record.layout.parts:
                name = chunk_name(self.record, part, commit.shard)
                if sizes.get(name) != commit.objects[name].bytes:
                    what = "differs from its commit record" if name in sizes else "is missing"
                    raise self._damaged(commit.shard, name, what)

    def _load_shards(
        self,
        commits: Mapping[int, CommitRecord],
        read: Callable[[CommitRecord, NDArray[Any]], None],
        target: NDArray[Any],
        threads: int | None = None,
    ) -> None:
        """Every shard, side by side, to where its rows are in `target`."""
        with ThreadPoolExecutor(threads or self.files.readers) as pool:
            list(
                pool.map(lambda commit: read(commit, target[slice(*commit.rows)]), commits.values())
            )

    def _read_features(self, commit: CommitRecord, target: NDArray[Any]) -> None:
        if not self.record.layout.scaled:
            self._read_chunk(commit, target, "features")
            return
        values = np.empty(target.shape, np.int8)
        scales = np.empty(target.shape[:-1], np.float32)
        self._read_chunk(commit, values, "features")
        self._read_chunk(commit, scales, "scale")
        restore(values, scales, target)

    def _read_chunk(self, commit: CommitRecord, target: NDArray[Any], part: str) -> None:
        """Read one chunk file into `target`; the padding of the last shard goes to a scratch
        buffer."""
        name = chunk_name(self.record, part, commit.shard)
        expected = commit.objects[name]
        view = target.data.cast("B")
        padding = memoryview(bytearray(expected.bytes - view.nbytes - 4))
        ending = memoryview(bytearray(4))
        check = 0
        summed = 0

        def add(block: memoryview) -> None:
            nonlocal check, summed
            if summed < expected.bytes - 4:  # blocks never reach from the data into its checksum
                check = crc32c_extend(check, np.frombuffer(block, np.uint8))
            summed += block.nbytes

        try:
            count = self.files.read_into(name, [view, padding, ending], add)
        except FileNotFoundError:
            raise self._damaged(commit.shard, name, "is missing") from None
        stored = int.from_bytes(ending, "little")
        if count != expected.bytes or check != expected.crc32c or stored != check:
            raise self._damaged(commit.shard, name, "differs from its commit record")

    def _quarantine(self, commit: CommitRecord, name: str) -> list[dict[str, Any]]:
        try:
            rows = [json.loads(line) for line in self._read_checked(commit, name).splitlines()]
            kinds = {"row": int, "key": str, "reason": str, "detail": str}
            if all({key: type(value) for key, value in row.items()} == kinds for row in rows):
                return rows
        except (ValueError, AttributeError, RecursionError):
            pass
        raise self._damaged(commit.shard, name, "is no list of rows")

    def _read_checked(self, commit: CommitRecord, name: str) -> bytes:
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            raise self._damaged(commit.shard, name, "is missing") from None
        if content_hash(data) != commit.objects[name].blake3:
            raise self._damaged(commit.shard, name, "differs from its commit record")
        return data

    def _damaged(self, shard: int, name: str, what: str) -> DamagedError:
        return DamagedError(
            f"{self.files.where(name)} (shard {shard}) {what}; repair with: apecache repair STORE"
        )


@contextmanager
def _as_wide(target: NDArray[Any], row_shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """A buffer for rows of `row_shape`: the target itself, or one whose rows are then laid into its
    first tokens."""
    if target.shape[1:] == row_shape:
        yield target
        return
    narrow = np.empty((len(target), *row_shape), target.dtype)
    yield narrow
    target[:] = 0
    target[:, : row_shape[0]] = narrow
