"""Read several arrays of one store as one, with their features side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.encoders.spec import join_fingerprints, join_specs
from apecache.errors import OptionError
from apecache.fingerprint import Fingerprint
from apecache.store.array import FeatureArray
from apecache.store.gather import ViewArray

BLOCK_ROWS = 4096
"""Rows of a block that is given where the arrays are read whole."""
BETWEEN_NAMES = ","
"""Stands between the names of joined arrays. No name of an array has it."""


@dataclass(frozen=True, kw_only=True)
class JoinedArray(FeatureArray):
    """Read the pooled features of several encoders of one modality as one array.

    `files` and `record` describe the first one, but for names, encoders and width. A row has
    features where all of them have.
    """

    arrays: tuple[FeatureArray, ...]
    """The arrays, in order."""

    @property
    def rows(self) -> int:
        # Of a view, which may show a stored row twice; the record counts stored rows.
        return self.arrays[0].rows

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the width of each array's features."""
        return tuple(array.dim for array in self.arrays)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.result_type(*(array.dtype for array in self.arrays))

    @property
    def row_bytes(self) -> int:
        return sum(array.row_bytes for array in self.arrays)

    @property
    def share_done(self) -> float:
        return min(array.share_done for array in self.arrays)

    @property
    def complete(self) -> bool:
        return all(array.complete for array in self.arrays)

    @property
    def n_quarantined(self) -> int:
        return len(self.quarantined())

    def quarantined(self) -> list[dict[str, Any]]:
        """Return {row, key, reason, detail} of every row that an encoder could not encode."""
        by_row: dict[int, dict[str, Any]] = {}
        for array in self.arrays:
            for row in array.quarantined():
                # A row that several encoders failed on counts once.
                by_row.setdefault(row["row"], row)
        return [by_row[number] for number in sorted(by_row)]

    def content(self) -> list[str]:
        """Return the hash of each row's input, which the encoders share."""
        return self.arrays[0].content()

    def load(self, out: NDArray[Any] | None = None, threads: int | None = None) -> NDArray[Any]:
        """Read all rows; see `FeatureArray.load`. A row that one array lacks is NaN there."""
        shape = (self.rows, self.dim)
        target = np.empty(shape, self.dtype) if out is None else out
        if target.shape != shape or target.dtype != self.dtype or not target.flags.carray:
            raise ValueError(f"out: expected contiguous, writable {shape} of {self.dtype}")
        first_column = 0
        for array in self.arrays:
            columns = slice(first_column, first_column + array.dim)
            target[:, columns] = array.load(threads=threads)
            first_column += array.dim
        return target

    def load_shards(
        self,
        threads: int | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Read all rows in blocks; see `FeatureArray.load_shards`.

        A block ends where a shard of any array ends: encoders differ in the rows of a shard. The
        arrays of a view can give their rows in any order, so those are read whole before.
        """
        if any(isinstance(array, ViewArray) for array in self.arrays):
            features = self.load(threads=threads)
            for begin in range(0, self.rows, BLOCK_ROWS):
                rows = np.arange(begin, min(begin + BLOCK_ROWS, self.rows))
                yield rows, features[begin : begin + BLOCK_ROWS]
            return
        readers = [array.load_shards(threads) for array in self.arrays]
        held = [next(reader, None) for reader in readers]
        begin = 0
        while begin < self.rows:
            shards = [shard for shard in held if shard is not None]
            end = min(int(rows[-1]) + 1 for rows, _ in shards)
            blocks = []
            for rows, features in shards:
                first = int(rows[0])
                blocks.append(features[begin - first : end - first])
            yield np.arange(begin, end), np.concatenate(blocks, axis=1, dtype=self.dtype)
            # Only what is used up is read further, so one shard of each array is in memory.
            for number, (rows, _) in enumerate(shards):
                if int(rows[-1]) + 1 == end:
                    held[number] = next(readers[number], None)
            begin = end

    def load_ok(self) -> NDArray[np.bool_]:
        """Return bool [rows], True where the row has features of all encoders."""
        ok = self.arrays[0].load_ok()
        for array in self.arrays[1:]:
            ok = ok & array.load_ok()
        return ok

    def load_lengths(self) -> None:
        """Return None: joined features are pooled."""
        return None


def join_arrays(arrays: Sequence[FeatureArray]) -> FeatureArray:
    """Return one array with the features of several side by side; a single one as it is.

    Raises:
        OptionError: an array is named twice, or holds tokens or views.
    """
    if len(arrays) == 1:
        return arrays[0]
    names = [array.name for array in arrays]
    if len(set(names)) < len(names):
        raise OptionError(f"features {', '.join(names)}: one is named twice; name each once")
    for array in arrays:
        if array.tokens is not None or array.views is not None:
            held_values = "tokens" if array.tokens is not None else "views"
            raise OptionError(
                f"features {array.name} are {held_values}; only pooled features of one view can be "
                "joined"
            )
    first = arrays[0]
    encoder = join_fingerprints([array.record.encoder for array in arrays])
    layout = replace(
        first.record.layout,
        dim=sum(array.dim for array in arrays),
        dtype=str(np.result_type(*(array.dtype for array in arrays))),
    )
    record = replace(
        first.record,
        name=BETWEEN_NAMES.join(names),
        spec=join_specs([array.record.spec for array in arrays]),
        # The fingerprint of the joined encoders: a head asks for exactly these, in order.
        fingerprint=Fingerprint(fields={"encoder": encoder.fields}),
        layout=layout,
    )
    return JoinedArray(
        files=first.files,
        record=record,
        appended=first.appended,
        rows_to_come=first.rows_to_come,
        arrays=tuple(arrays),
    )


def widths_of(array: FeatureArray) -> tuple[int, ...]:
    """Return the widths of the encoders' features that stand side by side in an array."""
    return array.widths if isinstance(array, JoinedArray) else (array.dim,)
