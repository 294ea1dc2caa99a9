"""Read the features of a view."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.fingerprint import Modality
from apecache.store.array import FeatureArray, StoredShard
from apecache.store.views import View
from apecache.store.wide_rows import as_wide

ROWS_OF_RUN = 8
"""Mean length of a run of rows from which on runs are read straight to their places."""
MISSING_ROWS = 4096
"""Rows without features that are given at once."""


@dataclass(frozen=True, kw_only=True)
class OrderedViewArray(FeatureArray):
    """Read the features of a view whose rows are those of its blocks in order."""

    view: View

    def quarantined(self) -> list[dict[str, Any]]:
        rows = super().quarantined()
        # The keys that were recorded are those of the table that the block was made for.
        keys = [view_key(self.view, self.record.modality, row["row"]) for row in rows]
        return [{**row, "key": key} for row, key in zip(rows, keys, strict=True)]


def view_key(view: View, modality: Modality, row: int) -> str:
    """Return the key of an image, or that of a caption's image."""
    table = view.table
    return str(table.keys[row if modality == "image" else table.image_rows[row]])


@dataclass(frozen=True, kw_only=True)
class ViewArray(FeatureArray):
    """Read one encoder's features by the rows of a view.

    `commits`, `load_shard` and `rows_ok` are those of the view's first block.
    """

    view: View
    index: NDArray[np.int64]
    """Row in the blocks of each row of the view; -1 where it has none."""

    @property
    def rows(self) -> int:
        return len(self.index)

    @cached_property
    def stored(self) -> FeatureArray:
        """Return the rows of the blocks, in order."""
        return FeatureArray(
            files=self.files,
            record=self.record,
            appended=self.appended,
            rows_to_come=self.rows_to_come,
        )

    @property
    def share_done(self) -> float:
        return self.stored.share_done

    @property
    def n_quarantined(self) -> int:
        n_missing = int((self.index < 0).sum())
        if not self.stored.n_quarantined:
            return n_missing
        bad_rows = [row["row"] for row in self.stored.quarantined()]
        return n_missing + int(np.isin(self.index, bad_rows).sum())

    def quarantined(self) -> list[dict[str, Any]]:
        by_row = {row["row"]: row for row in self.stored.quarantined()}
        rows: list[dict[str, Any]] = []
        for row in np.flatnonzero((self.index < 0) | np.isin(self.index, list(by_row))).tolist():
            # A content may have several keys: the view's own is shown.
            described = by_row.get(int(self.index[row])) or self._problem(row)
            key = view_key(self.view, self.record.modality, row)
            rows.append({**described, "row": row, "key": key})
        return rows

    def _problem(self, row: int) -> dict[str, Any]:
        """Return why a row has no place in the blocks."""
        problem = str(self.view.problems[row]) if self.record.modality == "image" else ""
        reason, _, detail = problem.partition(": ")
        return {"reason": reason or "missing", "detail": detail}

    def content(self) -> list[str]:
        # One more for rows of the index -1.
        hashes = [*self.stored.content(), ""]
        return [hashes[row] for row in self.index.tolist()]

    def load(self, out: NDArray[Any] | None = None, threads: int | None = None) -> NDArray[Any]:
        # A wrong size shows here, before the buffer is allocated.
        shards = self.stored.stored_shards()
        shape = (self.rows, *self.row_shape)
        target = np.empty(shape, self.dtype) if out is None else out
        if target.shape != shape or target.dtype != self.dtype or not target.flags.carray:
            raise ValueError(f"out: expected contiguous, writable {shape} of {self.dtype}")
        target[self._without] = np.nan

        # One buffer for each thread: a new one for each shard would cost page faults.
        buffers = threading.local()

        def read(shard: StoredShard) -> None:
            rows, offsets = self._taken(shard)
            if len(rows) and not self._read_runs(shard, offsets, target, rows):
                buffer = vars(buffers).get("rows")
                if buffer is None or len(buffer) < shard.n_rows:
                    buffer = np.empty((shard.n_rows, *self.row_shape), self.dtype)
                    buffers.rows = buffer
                source = buffer[: shard.n_rows]
                self.stored._read_into(shard, source)
                target[rows] = source if _is_range(offsets, 0, len(source)) else source[offsets]

        with ThreadPoolExecutor(threads or self.files.readers) as pool:
            # The list asks for every result, which raises what a read raised.
            list(pool.map(read, shards))
        return target

    def _read_runs(
        self,
        shard: StoredShard,
        offsets: NDArray[np.int64],
        target: NDArray[Any],
        rows: NDArray[np.int64],
    ) -> bool:
        """Read `shard[offsets]` straight to `target[rows]`, if most rows stand in order.

        Args:
            shard: The shard that is read.
            offsets: Ascending rows of the shard; a row may be there several times.
            target: Rows of the view.
            rows: Where each offset goes.

        Returns:
            False, where nothing was read: the rows are scattered, or stored in another form.
        """
        # A content that the view has several times is read to its first place.
        is_first = np.append(True, np.diff(offsets) > 0)
        first_offsets = offsets[is_first]
        first_rows = rows[is_first]
        is_break = (np.diff(first_rows) != 1) | (np.diff(first_offsets) != 1)
        begins = np.append(0, np.flatnonzero(is_break) + 1)
        if len(begins) > max(1, len(first_rows) // ROWS_OF_RUN):
            return False
        if not self.stored._can_be_read_in_pieces(shard):
            return False
        ends = np.append(begins[1:], len(first_rows))
        starts = first_offsets[begins]
        stops = starts + ends - begins
        gaps = np.append(starts, shard.n_rows) - np.append(0, stops)
        # Rows that the view lacks are read as well, for the checksum, and dropped.
        dropped = np.empty((int(gaps.max()), *self.row_shape), self.dtype)
        pieces: list[NDArray[Any]] = []
        for gap, row, n_rows in zip(gaps, first_rows[begins], ends - begins, strict=False):
            pieces += [dropped[:gap], target[row : row + n_rows]]
        pieces.append(dropped[: gaps[-1]])
        self.stored._read_pieces(shard, [piece for piece in pieces if len(piece)])
        if len(first_rows) < len(rows):
            repeated = rows[~is_first]
            target[repeated] = target[first_rows[np.cumsum(is_first)[~is_first] - 1]]
        return True

    def load_shards(
        self,
        threads: int | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        used = [shard for shard in self.stored.stored_shards() if len(self._taken(shard)[0])]
        for shard, features in self.stored._read_ahead(used, threads):
            rows, offsets = self._taken(shard)
            yield rows, features if _is_range(offsets, 0, len(features)) else features[offsets]
        for begin in range(0, len(self._without), MISSING_ROWS):
            rows = self._without[begin : begin + MISSING_ROWS]
            yield rows, np.full((len(rows), *self.row_shape), np.nan, self.dtype)

    def load_ok(self) -> NDArray[np.bool_]:
        ok = np.append(self.stored.load_ok(), False)
        ok_of_rows: NDArray[np.bool_] = ok[self.index]
        return ok_of_rows

    def load_lengths(self) -> NDArray[np.uint16] | None:
        lengths = self.stored.load_lengths()
        if lengths is None:
            return None
        lengths_of_rows: NDArray[np.uint16] = np.append(lengths, np.uint16(0))[self.index]
        return lengths_of_rows

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Return the view's rows in the order of the blocks."""
        return np.argsort(self.index, kind="stable")

    @cached_property
    def _sorted(self) -> NDArray[np.int64]:
        return self.index[self._order]

    @cached_property
    def _without(self) -> NDArray[np.int64]:
        """Return the rows of the view that have no place in the blocks."""
        return np.flatnonzero(self.index < 0)

    def _taken(self, shard: StoredShard) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the view's rows that a shard has, and where in the shard each of them lies."""
        bounds = (shard.first, shard.first + shard.n_rows)
        begin, end = np.searchsorted(self._sorted, bounds).tolist()
        return self._order[begin:end], self._sorted[begin:end] - shard.first


def gathered_rows(array: FeatureArray, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Read some rows of an array, each at least 0, in this order, [n, *row_shape].

    Raises:
        IncompleteError, DamagedError: As `FeatureArray.load` does.
    """
    features = np.empty((len(rows), *array.row_shape), array.dtype)
    if isinstance(array, ViewArray):
        # Counted through the blocks, since a view may have its rows in any order.
        rows = array.index[rows]
        array = array.stored
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    for shard in array.stored_shards():
        bounds = (shard.first, shard.first + shard.n_rows)
        begin, end = np.searchsorted(sorted_rows, bounds).tolist()
        if begin < end:
            offsets = sorted_rows[begin:end] - shard.first
            features[order[begin:end]] = array._read_wide(shard)[offsets]
    return features


def gathered_scaled(
    array: FeatureArray,
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Read some rows of an int8 array as they are stored: integers and their scales.

    Args:
        array: The array, not of a view.
        rows: Rows of the array, ascending.

    Returns:
        int8 [n, *row_shape] and float32 [n, *row_shape without dim].

    Raises:
        IncompleteError, DamagedError: As `FeatureArray.load` does.
    """
    shape = array.row_shape
    values = np.empty((len(rows), *shape), np.int8)
    scales = np.empty((len(rows), *shape[:-1]), np.float32)
    for shard in array.stored_shards():
        begin, end = np.searchsorted(rows, (shard.first, shard.first + shard.n_rows)).tolist()
        if begin == end:
            continue
        offsets = rows[begin:end] - shard.first
        shard_values = np.empty((shard.n_rows, *shape), np.int8)
        shard_scales = np.empty((shard.n_rows, *shape[:-1]), np.float32)
        stored_shape = shard.array.record.layout.row_shape
        # A segment of a ragged array may have fewer tokens than the widest one.
        with (
            as_wide(shard_values, stored_shape) as own_values,
            as_wide(shard_scales, stored_shape[:-1]) as own_scales,
        ):
            shard.array._read_scaled(shard.commit, own_values, own_scales)
        values[begin:end] = shard_values[offsets]
        scales[begin:end] = shard_scales[offsets]
    return values, scales


def _is_range(rows: NDArray[np.int64], first: int, count: int) -> bool:
    return len(rows) == count and bool((rows == np.arange(first, first + count)).all())
