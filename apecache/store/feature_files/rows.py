"""Define rows of features that are read block by block, wherever they are.

A row is one vector [dim], or [tokens, dim], [views, dim], [views, tokens, dim]. A file is never
loaded whole: `read` takes the numbers of the rows that are needed now.
"""

import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from apecache.errors import DataError

Rows = NDArray[np.int64]
Floats = NDArray[np.floating]
BFLOAT16 = "bfloat16"
READ_DTYPES = {"float16": "float16", "bfloat16": "float32", "float32": "float32"}
"""The dtype in which rows of each stored dtype are read; all others are read as float32."""
SPOOL_BYTES = 64 << 20


class FeatureRows(Protocol):
    """Give rows of features by their numbers."""

    @property
    def n_rows(self) -> int: ...

    @property
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of what `read` returns: float16 or float32."""

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Return the number of tokens of each row, int64 [n_rows]; None if all have the same."""

    @property
    def is_scattered(self) -> bool:
        """Return whether rows in any order cost about the same as rows in order."""

    def read(self, rows: Rows) -> Floats:
        """Read some rows.

        Args:
            rows: int64 [n], numbers of rows, in any order.

        Returns:
            [n, *row_shape], float16 or float32.
        """


def read_dtype(stored: np.dtype[Any] | str, origin: str) -> np.dtype[Any]:
    """Return the dtype in which features of a stored dtype are read.

    Raises:
        DataError: They are not floating-point numbers.
    """
    name = stored if isinstance(stored, str) else stored.name
    if name != BFLOAT16 and np.dtype(stored).kind != "f":
        raise DataError(
            f"{origin}: expected float16, bfloat16, float32 or float64 features, found {name}; "
            "convert them, e.g. array.astype('float32')"
        )
    return np.dtype(READ_DTYPES.get(name, "float32"))


def as_floats(block: NDArray[Any], stored: np.dtype[Any] | str) -> Floats:
    """Convert a block as it is stored to float16 or float32.

    Args:
        block: The numbers; bfloat16 as uint16.
        stored: Their dtype.
    """
    if stored == BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        widened = block.astype(np.uint32) << np.uint32(16)
        return widened.view(np.float32)
    read_as = np.dtype(READ_DTYPES.get(np.dtype(stored).name, "float32"))
    # float64 beyond float32 becomes infinity, which is reported by row.
    with np.errstate(over="ignore"):
        floats: Floats = np.ascontiguousarray(block, dtype=read_as)
    return floats


def is_range(rows: Rows) -> bool:
    """Return whether rows follow one another without a gap."""
    return len(rows) > 0 and bool((np.diff(rows) == 1).all())


def is_ascending(rows: Rows) -> bool:
    """Return whether each row comes after the one before it."""
    return bool((np.diff(rows) > 0).all())


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Read rows that stand in a file as plain bytes, in C order."""

    path: Path
    offset: int
    """First byte of the first row."""
    stored: np.dtype[Any] | str
    """Dtype in the file; the word `bfloat16` for what NumPy does not know."""
    shape: tuple[int, ...]
    fortran_order: bool = False

    def __post_init__(self) -> None:
        n_bytes = int(np.prod(self.shape, dtype=np.int64)) * self._raw_dtype.itemsize
        file_bytes = self.path.stat().st_size
        if self.offset + n_bytes > file_bytes:
            raise DataError(
                f"{self.path} is cut off: {self.offset + n_bytes:,} bytes expected, "
                f"{file_bytes:,} found; copy it again"
            )
        read_dtype(self.stored, str(self.path))

    @property
    def n_rows(self) -> int:
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return read_dtype(self.stored, str(self.path))

    @property
    def lengths(self) -> None:
        return None

    @property
    def is_scattered(self) -> bool:
        return True

    @property
    def _raw_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2") if self.stored == BFLOAT16 else np.dtype(self.stored)

    def read(self, rows: Rows) -> Floats:
        if self.fortran_order or not is_range(rows):
            order: Literal["C", "F"] = "F" if self.fortran_order else "C"
            mapped = np.memmap(
                self.path,
                dtype=self._raw_dtype,
                mode="r",
                offset=self.offset,
                shape=self.shape,
                order=order,
            )
            return as_floats(np.asarray(mapped[rows]), self.stored)
        row_numbers = int(np.prod(self.row_shape, dtype=np.int64))
        # Read and not mapped: mapped pages would count as memory of this process.
        block = np.fromfile(
            self.path,
            dtype=self._raw_dtype,
            count=len(rows) * row_numbers,
            offset=self.offset + int(rows[0]) * row_numbers * self._raw_dtype.itemsize,
        )
        return as_floats(block.reshape(len(rows), *self.row_shape), self.stored)


@dataclass(frozen=True, kw_only=True)
class ArrayRows:
    """Give rows of an array in memory, or of one that a library slices from disk."""

    values: Any
    """An array [n, …] that takes slices and arrays of rows: NumPy's, or an HDF5 data set."""
    stored: np.dtype[Any]
    origin: str
    """The array's name, for messages."""

    def __post_init__(self) -> None:
        read_dtype(self.stored, self.origin)

    @property
    def n_rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(int(count) for count in self.values.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return read_dtype(self.stored, self.origin)

    @property
    def lengths(self) -> None:
        return None

    @property
    def is_scattered(self) -> bool:
        return isinstance(self.values, np.ndarray)

    def read(self, rows: Rows) -> Floats:
        if is_range(rows):
            block = self.values[int(rows[0]) : int(rows[-1]) + 1]
            return as_floats(np.asarray(block), self.stored)
        # HDF5 takes rows in ascending order only, each once.
        unique_rows, unique_position = np.unique(rows, return_inverse=True)
        block = np.asarray(self.values[unique_rows]) if len(rows) else self._nothing()
        return as_floats(block[unique_position], self.stored)

    def _nothing(self) -> NDArray[Any]:
        return np.empty((0, *self.row_shape), self.dtype)


@dataclass(kw_only=True)
class StreamRows:
    """Read rows that can only be read from the beginning, such as those of Parquet.

    Rows in ascending order are read in one pass; a row before the last one begins a new pass.
    """

    n_rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[Floats]]
    """Begin a pass over all rows, as blocks [n, *row_shape]."""
    lengths: NDArray[np.int64] | None = None
    is_scattered: bool = False
    _pass: Iterator[Floats] | None = field(default=None, init=False)
    _block: Floats | None = field(default=None, init=False)
    _first_row: int = field(default=0, init=False)

    def read(self, rows: Rows) -> Floats:
        gathered = np.empty((len(rows), *self.row_shape), self.dtype)
        n_filled = 0
        # Rows of one block are taken together; the next row decides which block comes next.
        while n_filled < len(rows):
            block = self._block_with(int(rows[n_filled]))
            stop_row = self._first_row + len(block)
            behind = np.flatnonzero(
                (rows[n_filled:] >= stop_row) | (rows[n_filled:] < self._first_row)
            )
            n_stop = n_filled + int(behind[0]) if len(behind) else len(rows)
            gathered[n_filled:n_stop] = block[rows[n_filled:n_stop] - self._first_row]
            n_filled = n_stop
        return gathered

    def _block_with(self, row: int) -> Floats:
        """Return the block that holds a row, and read on to it."""
        if self._pass is None or row < self._first_row:
            self._pass = self.blocks()
            self._block = None
            self._first_row = 0
        while self._block is None or row >= self._first_row + len(self._block):
            self._first_row += 0 if self._block is None else len(self._block)
            self._block = next(self._pass)
        return self._block


@dataclass(frozen=True, kw_only=True)
class ChunkedRows:
    """Join the rows of several files, in order."""

    chunks: Sequence[FeatureRows]

    @property
    def n_rows(self) -> int:
        return sum(chunk.n_rows for chunk in self.chunks)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.chunks[0].row_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.result_type(*(chunk.dtype for chunk in self.chunks))

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        all_lengths = [chunk.lengths for chunk in self.chunks if chunk.lengths is not None]
        return np.concatenate(all_lengths) if all_lengths else None

    @property
    def is_scattered(self) -> bool:
        return all(chunk.is_scattered for chunk in self.chunks)

    def read(self, rows: Rows) -> Floats:
        starts = list(accumulate((chunk.n_rows for chunk in self.chunks), initial=0))
        gathered = np.empty((len(rows), *self.row_shape), self.dtype)
        n_filled = 0
        while n_filled < len(rows):
            number = bisect_right(starts, int(rows[n_filled])) - 1
            outside = (rows[n_filled:] < starts[number]) | (rows[n_filled:] >= starts[number + 1])
            behind = np.flatnonzero(outside)
            n_stop = n_filled + int(behind[0]) if len(behind) else len(rows)
            chunk_rows = rows[n_filled:n_stop] - starts[number]
            gathered[n_filled:n_stop] = self.chunks[number].read(chunk_rows)
            n_filled = n_stop
        return gathered


def join_rows_of(chunks: Sequence[FeatureRows], names: Sequence[str]) -> FeatureRows:
    """Return the rows of several files as one.

    Args:
        parts: The rows of each file.
        names: Their names, for messages.

    Raises:
        DataError: Their rows have different shapes.
    """
    for chunk, name in zip(chunks, names, strict=True):
        ragged_alike = (chunk.lengths is None) == (chunks[0].lengths is None)
        if chunk.row_shape != chunks[0].row_shape or not ragged_alike:
            raise DataError(
                f"{name} has rows of {shape_text(chunk.row_shape)}, {names[0]} of "
                f"{shape_text(chunks[0].row_shape)}; files that are imported together have rows of "
                "one shape"
            )
    return chunks[0] if len(chunks) == 1 else ChunkedRows(chunks=chunks)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text, such as `77 x 512`."""
    return " x ".join(map(str, shape)) or "one number"


@dataclass(frozen=True, kw_only=True)
class RaggedRows:
    """Read tokens of rows that differ in their number, from tokens that stand one after another."""

    tokens: FeatureRows
    """The tokens of all rows, [n_tokens, dim]."""
    lengths: NDArray[np.int64]
    """Tokens of each row."""

    @property
    def n_rows(self) -> int:
        return len(self.lengths)

    @property
    def row_shape(self) -> tuple[int, ...]:
        longest = int(self.lengths.max(initial=1))
        return (max(1, longest), *self.tokens.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tokens.dtype

    @property
    def is_scattered(self) -> bool:
        return self.tokens.is_scattered

    def read(self, rows: Rows) -> Floats:
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        gathered = np.zeros((len(rows), *self.row_shape), self.dtype)
        token_counts = self.lengths[rows]
        ranges = [np.arange(starts[row], starts[row + 1]) for row in rows.tolist()]
        token_rows = np.concatenate(ranges) if ranges else np.empty(0, np.int64)
        is_token = np.arange(gathered.shape[1]) < token_counts[:, None]
        gathered[is_token] = self.tokens.read(token_rows.astype(np.int64))
        return gathered


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Add the number of tokens of each row to rows that are padded to one length."""

    padded: FeatureRows
    lengths: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return self.padded.n_rows

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.padded.row_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.padded.dtype

    @property
    def is_scattered(self) -> bool:
        return self.padded.is_scattered

    def read(self, rows: Rows) -> Floats:
        return self.padded.read(rows)


def spooled(rows: FeatureRows) -> FeatureRows:
    """Copy rows that are slow in any order into a temporary file, where they are not."""
    row_bytes = max(1, int(np.prod(rows.row_shape)) * rows.dtype.itemsize)
    n_block_rows = max(1, SPOOL_BYTES // row_bytes)
    scratch = ScratchFolder()
    path = scratch.path / "rows"
    with path.open("wb") as file:
        for first in range(0, rows.n_rows, n_block_rows):
            stop = min(first + n_block_rows, rows.n_rows)
            rows.read(np.arange(first, stop)).tofile(file)
    spool = SpooledRows(
        path=path,
        offset=0,
        stored=rows.dtype,
        shape=(rows.n_rows, *rows.row_shape),
        scratch=scratch,
    )
    return spool if rows.lengths is None else PaddedRows(padded=spool, lengths=rows.lengths)


class ScratchFolder:
    """Hold a temporary folder, which is removed with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="apecache-import-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class SpooledRows(RawRows):
    """Read rows of a temporary file, which is removed with this object."""

    scratch: ScratchFolder
