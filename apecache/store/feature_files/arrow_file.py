"""Read features of Parquet and Arrow files (extra `parquet`): a column of lists, block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apecache.errors import DataError, MissingExtraError
from apecache.store.feature_files.opened import Column, FeatureFile, ReadColumn, unreadable
from apecache.store.feature_files.rows import FeatureRows, Floats, StreamRows, as_floats, read_dtype

BATCH_ROWS = 8192
Batches = Callable[[str], Iterator[Any]]
"""Begin a pass over one column, as Arrow arrays."""


@dataclass(frozen=True, kw_only=True)
class ArrowTable:
    """Hold what all kinds of Arrow files have in common."""

    schema: Any
    n_rows: int
    batches: Batches


def open_arrow(path: Path) -> FeatureFile:
    """Open a `.parquet`, `.arrow` or `.feather` file.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: The file is damaged, or its lists differ in length.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
    try:
        # By its ending: Arrow's own formats have none in common.
        is_parquet = path.suffix.lower() == ".parquet"
        table = _open_parquet(path) if is_parquet else _open_ipc(path)
        features: dict[str, FeatureRows] = {}
        columns: dict[str, ReadColumn] = {}
        for field in table.schema:
            # Tensors of `datasets` are extension types over lists.
            storage = getattr(field.type, "storage_type", field.type)
            if _is_list(storage) and _leaf(storage) is not None:
                features[field.name] = _list_rows(table, field.name, storage, path)
            elif _is_scalar(storage):
                columns[field.name] = partial(_load_column, table, field.name)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error, "write it again with pyarrow") from None
    return FeatureFile(origin=str(path), paths=(path,), features=features, columns=columns)


def _open_parquet(path: Path) -> ArrowTable:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        n_rows = file.metadata.num_rows

    def batches(name: str) -> Iterator[Any]:
        # Opened anew for each reading, so that no file stays open in between.
        with pq.ParquetFile(path) as again:
            for batch in again.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
                yield batch.column(0)

    return ArrowTable(schema=schema, n_rows=n_rows, batches=batches)


def _open_ipc(path: Path) -> ArrowTable:
    """Open Arrow's file or stream format, as `datasets` and Feather write them; mapped."""
    import pyarrow as pa

    def record_batches() -> Iterator[Any]:
        source = pa.memory_map(str(path))
        # The two formats of IPC have one ending; only the file format has a footer.
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        for number in range(file.num_record_batches):
            yield file.get_batch(number)

    n_rows = 0
    # A stream says how many rows it has by its end only.
    schema = None
    for batch in record_batches():
        n_rows += batch.num_rows
        schema = batch.schema
    if schema is None:
        raise DataError(f"{path} has no rows; expected a table with a column of lists")

    def batches(name: str) -> Iterator[Any]:
        for batch in record_batches():
            for first in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.column(name).slice(first, BATCH_ROWS)

    return ArrowTable(schema=schema, n_rows=n_rows, batches=batches)


def _is_list(arrow_type: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_list(arrow_type)
        or pa.types.is_large_list(arrow_type)
        or pa.types.is_fixed_size_list(arrow_type)
    )


def _is_scalar(arrow_type: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_string(arrow_type)
        or pa.types.is_large_string(arrow_type)
        or pa.types.is_string_view(arrow_type)
        or pa.types.is_integer(arrow_type)
        or pa.types.is_boolean(arrow_type)
        or pa.types.is_dictionary(arrow_type)
    )


def _leaf(arrow_type: Any) -> Any:
    """Return the type of the numbers in lists, or in lists of lists; None without numbers."""
    import pyarrow as pa

    while _is_list(arrow_type):
        arrow_type = arrow_type.value_type
    # Lists of integers are ids of tokens, and not features.
    return arrow_type if pa.types.is_floating(arrow_type) else None


def _list_rows(table: ArrowTable, name: str, storage: Any, path: Path) -> FeatureRows:
    """Return the rows of a column of lists, of one length, or of lists of tokens."""
    origin = f"{path}: {name}"
    dtype = read_dtype(np.dtype(_leaf(storage).to_pandas_dtype()), origin)
    is_tokens = _is_list(storage.value_type)
    if is_tokens:
        return _token_rows(table, name, dtype, origin)
    dim = _dim(table, name, origin)

    def blocks() -> Iterator[Floats]:
        first = 0
        for batch in table.batches(name):
            yield _pooled_block(batch, dim, dtype, f"{origin}, row {first}")
            first += len(batch)

    return StreamRows(n_rows=table.n_rows, row_shape=(dim,), dtype=dtype, blocks=blocks)


def _dim(table: ArrowTable, name: str, origin: str) -> int:
    """Return the length of the first list that is not null."""
    import pyarrow.compute as pc

    for batch in table.batches(name):
        lengths = pc.list_value_length(_storage(batch)).drop_null()
        if len(lengths):
            return int(lengths[0].as_py())
    raise DataError(f"{origin} has only null rows; expected lists of numbers")


def _storage(batch: Any) -> Any:
    """Return the plain lists of a column of an extension type, such as a tensor's."""
    return getattr(batch, "storage", batch)


def _pooled_block(batch: Any, dim: int, dtype: np.dtype[Any], origin: str) -> Floats:
    """Return a block of lists as [n, dim]; null rows are NaN."""
    import pyarrow.compute as pc

    lists = _storage(batch)
    valid = np.asarray(lists.is_valid())
    # A null row has no length: it counts as one of the right length.
    lengths = np.asarray(pc.list_value_length(lists).fill_null(dim))
    if (lengths != dim).any():
        bad_row = int(np.flatnonzero(lengths != dim)[0])
        raise DataError(
            f"{origin} + {bad_row}: a list of {lengths[bad_row]:,} numbers, the first has {dim:,}; "
            "expected lists of one length"
        )
    # Not `values`: those of a slice are of the whole column, and null rows may have some.
    present = lists.drop_null().flatten()
    numbers = present.to_numpy(zero_copy_only=False)
    block = np.full((len(lists), dim), np.nan, dtype)
    block[valid] = as_floats(numbers, numbers.dtype).reshape(-1, dim)
    return block


def _token_rows(table: ArrowTable, name: str, dtype: np.dtype[Any], origin: str) -> FeatureRows:
    """Return rows of tokens, [tokens, dim], padded with zeros to the longest row."""
    import pyarrow.compute as pc

    all_lengths = []
    dim = 0
    for batch in table.batches(name):
        lists = _storage(batch)
        all_lengths.append(np.asarray(pc.list_value_length(lists).fill_null(0), np.int64))
        vectors = pc.list_value_length(lists.drop_null().flatten()).drop_null()
        dim = dim or (int(vectors[0].as_py()) if len(vectors) else 0)
    lengths = np.concatenate(all_lengths)
    if not dim:
        raise DataError(f"{origin} has no tokens; expected lists of lists of numbers")
    n_tokens = int(lengths.max())

    def blocks() -> Iterator[Floats]:
        first = 0
        for batch in table.batches(name):
            token_counts = lengths[first : first + len(batch)]
            vectors = _storage(batch).drop_null().flatten()
            block = np.zeros((len(batch), n_tokens, dim), dtype)
            is_token = np.arange(n_tokens) < token_counts[:, None]
            block[is_token] = _pooled_block(vectors, dim, dtype, f"{origin}, row {first}")
            # A row without tokens is a missing one, which NaN marks.
            block[token_counts == 0] = np.nan
            yield block
            first += len(batch)

    all_alike = bool((lengths == n_tokens).all())
    return StreamRows(
        n_rows=table.n_rows,
        row_shape=(n_tokens, dim),
        dtype=dtype,
        blocks=blocks,
        lengths=None if all_alike else lengths,
    )


def _load_column(table: ArrowTable, name: str) -> Column:
    values: list[Any] = []
    for batch in table.batches(name):
        values += _storage(batch).to_pylist()
    # By type, because True is an int to Python.
    if all(type(value) is int for value in values):
        return np.array(values, dtype=np.int64)
    # A missing caption, split or label is an empty text, as in tables.
    return np.array(["" if value is None else str(value) for value in values], dtype=object)
