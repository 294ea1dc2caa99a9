"""Read features of tensors: `.safetensors` in place, and `.pt` with weights only."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apecache.errors import DataError
from apecache.store.feature_files.opened import (
    Column,
    FeatureFile,
    ReadColumn,
    unreadable,
    with_lengths,
)
from apecache.store.feature_files.rows import (
    BFLOAT16,
    ArrayRows,
    FeatureRows,
    RawRows,
)

SAFETENSORS_DTYPES = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": BFLOAT16,
    "I32": "<i4",
    "I64": "<i8",
    "I16": "<i2",
    "U8": "|u1",
    "I8": "|i1",
}
MAX_HEADER_BYTES = 100 << 20
"""The longest header that the format allows."""
MIN_KEYED_VECTORS = 2


def open_safetensors(path: Path) -> FeatureFile:
    """Open a `.safetensors` file; it is read in place.

    Raises:
        DataError: It is damaged.
    """
    header, data_offset = _read_header(path)
    vectors: dict[str, Any] = {}
    features: dict[str, FeatureRows] = {}
    columns: dict[str, ReadColumn] = {}
    for name, entry in header.items():
        stored = SAFETENSORS_DTYPES.get(entry["dtype"])
        if name == "__metadata__" or stored is None:
            continue
        shape = tuple(entry["shape"])
        offset = data_offset + int(entry["data_offsets"][0])
        is_float = stored == BFLOAT16 or np.dtype(stored).kind == "f"
        if len(shape) >= 2 and is_float:
            dtype = stored if stored == BFLOAT16 else np.dtype(stored)
            features[name] = RawRows(path=path, offset=offset, stored=dtype, shape=shape)
        elif len(shape) == 1 and is_float:
            vectors[name] = RawRows(path=path, offset=offset, stored=stored, shape=(1, *shape))
        elif len(shape) == 1:
            columns[name] = partial(_load_integers, path, offset, stored, shape[0])
    # Many vectors and no array: one vector under each key.
    if not features:
        features = _keyed(vectors, columns, str(path))
    features = with_lengths(features, columns, str(path))
    return FeatureFile(origin=str(path), paths=(path,), features=features, columns=columns)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a `.safetensors` file, and where its data begin."""
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        raw = file.read(n_bytes) if n_bytes <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        if not all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in entries):
            raise ValueError("an entry without dtype, shape or offsets")
    except (ValueError, AttributeError) as error:
        raise unreadable(path, error, "write it again with safetensors") from None
    return header, 8 + n_bytes


def _load_integers(path: Path, offset: int, stored: str, n_rows: int) -> Column:
    return np.fromfile(path, dtype=stored, count=n_rows, offset=offset)


def open_torch(path: Path) -> FeatureFile:
    """Open a `.pt` of a tensor, or of a dictionary of tensors and lists. Nothing is unpickled.

    Raises:
        DataError: It holds other objects, or is damaged.
    """
    content = _load_tensors(path)
    entries = content if isinstance(content, dict) else {path.stem: content}
    features: dict[str, FeatureRows] = {}
    vectors: dict[str, Any] = {}
    columns: dict[str, ReadColumn] = {}
    for entry_name, value in entries.items():
        name = str(entry_name)
        if isinstance(value, list | tuple):
            column = _column_of(value)
            if column is not None:
                columns[name] = partial(_same, column)
            continue
        if not hasattr(value, "detach"):
            continue
        tensor = value.detach()
        if tensor.ndim >= 2 and tensor.is_floating_point():
            features[name] = _tensor_rows(tensor, f"{path}: {name}")
        elif tensor.ndim == 1 and tensor.is_floating_point():
            vectors[name] = _tensor_rows(tensor[None], f"{path}: {name}")
        elif tensor.ndim == 1:
            columns[name] = partial(_same, tensor.numpy())
    if not features:
        features = _keyed(vectors, columns, str(path))
    features = with_lengths(features, columns, str(path))
    return FeatureFile(origin=str(path), paths=(path,), features=features, columns=columns)


def _load_tensors(path: Path) -> Any:
    import pickle

    import torch

    try:
        # Mapped, so that rows are read from disk when they are needed.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds Python objects other than tensors, lists and dictionaries, and nothing "
            "is unpickled; save tensors, e.g. torch.save({'image': image, 'text': text}, path)"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise unreadable(path, error, "write it again with torch.save") from None


def _tensor_rows(tensor: Any, origin: str) -> FeatureRows:
    import torch

    if tensor.dtype == torch.bfloat16:
        return _BFloat16Rows(
            values=tensor.view(torch.uint16).numpy(),
            stored=np.dtype("float32"),
            origin=origin,
        )
    values = tensor.numpy()
    return ArrayRows(values=values, stored=values.dtype, origin=origin)


class _BFloat16Rows(ArrayRows):
    """Give rows of bfloat16 numbers, which are held as uint16."""

    def read(self, rows: Any) -> Any:
        widened = self.values[rows].astype(np.uint32) << np.uint32(16)
        return widened.view(np.float32)


def _column_of(values: list[Any] | tuple[Any, ...]) -> Column | None:
    """Return a list of texts or of whole numbers as a column; None for another list."""
    if values and all(isinstance(value, str) for value in values):
        return np.array(values, dtype=object)
    if values and all(type(value) is int for value in values):
        return np.array(values, dtype=np.int64)
    return None


def _same(column: Column) -> Column:
    return column


def _keyed(
    vectors: dict[str, Any],
    columns: dict[str, ReadColumn],
    origin: str,
) -> dict[str, FeatureRows]:
    """Read one vector a key as rows with a column of keys."""
    shapes = {rows.row_shape for rows in vectors.values()}
    if len(vectors) < MIN_KEYED_VECTORS or len(shapes) > 1:
        return {}
    columns["key"] = partial(_same, np.array(list(vectors), dtype=object))
    blocks = [rows.read(np.zeros(1, np.int64)) for rows in vectors.values()]
    values = np.concatenate(blocks)
    return {"features": ArrayRows(values=values, stored=values.dtype, origin=origin)}
