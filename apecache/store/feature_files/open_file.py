"""Open a file or a folder of features by its form."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from apecache.errors import DataError, nearest, nearest_sibling
from apecache.store.feature_files.arrow_file import open_arrow
from apecache.store.feature_files.hdf5_file import open_hdf5
from apecache.store.feature_files.numpy_file import open_npy, open_npz
from apecache.store.feature_files.opened import Column, FeatureFile, joined, natural_order
from apecache.store.feature_files.tensor_file import open_safetensors, open_torch

SUFFIXES = (
    ".npy",
    ".npz",
    ".safetensors",
    ".pt",
    ".pth",
    ".h5",
    ".hdf5",
    ".parquet",
    ".arrow",
    ".feather",
)
KEY_FILES = ("file_names.txt", "filenames.txt", "keys.txt", "image_paths.txt")
"""Lists of keys that stand beside a file of features, one a line."""


def open_feature_file(path: Path) -> FeatureFile:
    """Open one file of features.

    Raises:
        DataError: It is not of a form that is read, or cannot be read.
        MissingExtraError: Its form needs an optional package.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder{nearest_sibling(path)}")
    match path.suffix.lower():
        case ".npy":
            return open_npy(path)
        case ".npz":
            return open_npz(path)
        case ".safetensors":
            return open_safetensors(path)
        case ".pt" | ".pth":
            return open_torch(path)
        case ".h5" | ".hdf5":
            return open_hdf5(path)
        case ".parquet" | ".arrow" | ".feather":
            return open_arrow(path)
        case ".pkl" | ".pickle":
            raise DataError(
                f"{path} is a pickle, and nothing is unpickled; save the array with numpy.save"
            )
        case suffix:
            raise DataError(
                f"{path}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}"
                f"{nearest(suffix, SUFFIXES)}"
            )


def open_features(path: Path) -> FeatureFile:
    """Open a file of features, or several that belong together, in natural order of their names.

    Several are the files of a folder, or those that a pattern such as `part_*.npy` fits. A list of
    keys beside the files (`file_names.txt`, …) becomes the column `key`.

    Args:
        path: A file, a folder, or a pattern.

    Raises:
        DataError: As `open_feature_file` does; or the folder has files of several forms or names.
    """
    if path.is_dir():
        opened = _open_parts(_parts(path), path)
        return _with_keys_beside(opened, path)
    # A file may have a star in its name; then it is that file.
    if "*" in path.name and not path.exists():
        matching = sorted(path.parent.glob(path.name), key=natural_order)
        if not matching:
            raise DataError(f"{path}: no file has such a name; expected at least one")
        return _with_keys_beside(_open_parts(matching, path), path.parent)
    return _with_keys_beside(open_feature_file(path), path.parent)


def _open_parts(paths: Sequence[Path], origin: Path) -> FeatureFile:
    opened = joined([open_feature_file(path) for path in paths], str(origin))
    return replace(opened, origin=str(origin))


def _parts(folder: Path) -> list[Path]:
    """Return the files of one array in a folder, in natural order of their names."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    # Files of different stems are different arrays, and not parts of one.
    stems = {path.stem.rstrip("0123456789_-. ") for path in paths}
    suffixes = {path.suffix.lower() for path in paths}
    names = ", ".join(sorted(path.name for path in paths)[:5])
    if not paths:
        raise DataError(
            f"{folder} has no files of features; expected files that end in {', '.join(SUFFIXES)}"
        )
    if len(suffixes) > 1 or len(stems) > 1:
        raise DataError(
            f"{folder} has files of several arrays ({names}); name the one of each side with "
            "--image and --text"
        )
    return sorted(paths, key=natural_order)


def _with_keys_beside(opened: FeatureFile, folder: Path) -> FeatureFile:
    """Add the keys of a list beside the features, if it has as many lines as an array has rows."""
    # Keys in the file itself belong to its rows for certain.
    if any(name in opened.columns for name in ("key", "keys")):
        return opened
    row_counts = {rows.n_rows for rows in opened.features.values()}
    for name in KEY_FILES:
        path = folder / name
        if path.is_file():
            keys = read_keys(path)
            if len(keys) not in row_counts:
                raise DataError(
                    f"{path} has {len(keys):,} lines, {opened.origin} "
                    f"{max(row_counts, default=0):,} rows; expected one key for each row"
                )
            return replace(opened, columns={**opened.columns, "key": partial(_same, keys)})
    return opened


def read_keys(path: Path) -> Column:
    """Read a list of keys: a text file with one a line, a `.json` list, or a `.npy` of texts.

    Raises:
        DataError: It cannot be read as texts.
    """
    if path.suffix.lower() == ".npy":
        opened = open_npy(path)
        columns = list(opened.columns.values())
        if not columns:
            raise DataError(f"{path}: expected one key for each row, found an array of features")
        return _as_keys(columns[0]())
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
        if not isinstance(lines, list):
            raise ValueError("it is not a list")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{nearest_sibling(path)}") from None
    except ValueError as error:
        raise DataError(
            f"{path}: expected one key a line, in UTF-8, or a JSON list of keys ({error})"
        ) from None
    return _as_keys(lines)


def _as_keys(values: Sequence[object] | Column) -> Column:
    return np.array([str(value) for value in values], dtype=object)


def _same(column: Column) -> Column:
    return column
