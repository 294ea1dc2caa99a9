"""Read features of HDF5 files (extra `hdf5`): data sets of rows, or one vector for each key."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apecache.errors import DataError, MissingExtraError
from apecache.store.feature_files.opened import (
    Column,
    FeatureFile,
    ReadColumn,
    as_strings,
    unreadable,
    with_lengths,
)
from apecache.store.feature_files.rows import ArrayRows, FeatureRows, Floats, Rows, as_floats

MIN_KEYED_VECTORS = 2


def open_hdf5(path: Path) -> FeatureFile:
    """Open an HDF5 file. Links to other files are not followed.

    Raises:
        MissingExtraError: h5py is not installed.
        DataError: The file is damaged.
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtraError("h5py", "hdf5") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise unreadable(path, error, "write it again with h5py") from None
    features: dict[str, FeatureRows] = {}
    vectors: dict[str, Any] = {}
    columns: dict[str, ReadColumn] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        is_float = item.dtype.kind == "f"
        if is_float and len(item.shape) >= 2:
            origin = f"{path}: {name}"
            features[name] = ArrayRows(values=item, stored=item.dtype, origin=origin)
        elif is_float and len(item.shape) == 1:
            vectors[name] = item
        elif len(item.shape) == 1:
            columns[name] = partial(_load_column, item, path, name)

    # Soft and external links are not visited: a file must not name another one.
    file.visititems(visit)
    keyed = _keyed(vectors, str(path))
    if keyed is not None and not features:
        columns["key"] = keyed.read_keys
        features["features"] = keyed
    features = with_lengths(features, columns, str(path))
    return FeatureFile(origin=str(path), paths=(path,), features=features, columns=columns)


def _load_column(item: Any, path: Path, name: str) -> Column:
    import h5py

    if h5py.check_string_dtype(item.dtype) is not None:
        try:
            return np.array(item.asstr()[:], dtype=object)
        except UnicodeDecodeError as error:
            raise unreadable(path, f"{name} is not UTF-8 ({error.reason})", "save texts") from None
    return as_strings(np.asarray(item[:]))


class KeyedRows:
    """Read rows that are data sets of their own, each under its key."""

    lengths = None
    is_scattered = True

    def __init__(self, vectors: dict[str, Any]) -> None:
        self.vectors = list(vectors.values())
        self.keys = list(vectors)

    @property
    def n_rows(self) -> int:
        return len(self.vectors)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.vectors[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("float16" if self.vectors[0].dtype == np.float16 else "float32")

    def read(self, rows: Rows) -> Floats:
        gathered = np.empty((len(rows), *self.row_shape), self.dtype)
        for position, row in enumerate(rows.tolist()):
            vector = self.vectors[row]
            gathered[position] = as_floats(vector[:], vector.dtype)
        return gathered

    def read_keys(self) -> Column:
        """Return the keys, in the order of the rows."""
        return np.array(self.keys, dtype=object)


def _keyed(vectors: dict[str, Any], origin: str) -> KeyedRows | None:
    if len(vectors) < MIN_KEYED_VECTORS:
        return None
    shapes = {tuple(vector.shape) for vector in vectors.values()}
    if len(shapes) > 1:
        raise DataError(
            f"{origin}: its vectors have {len(shapes)} different lengths; expected one length, or "
            "a data set of two dimensions"
        )
    return KeyedRows(vectors)
