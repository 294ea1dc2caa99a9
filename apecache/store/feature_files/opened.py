"""Hold an opened file of features: its arrays, and what else it says about their rows."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.errors import DataError, one_line
from apecache.store.feature_files.rows import (
    FeatureRows,
    PaddedRows,
    RaggedRows,
    join_rows_of,
)

Column = NDArray[Any]
ReadColumn = Callable[[], Column]
LENGTH_NAMES = ("lengths", "length", "n_tokens")


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """Hold what one file, or several that belong together, has."""

    origin: str
    """How the user named it."""
    paths: tuple[Path, ...]
    """Every file that was read, in order."""
    features: Mapping[str, FeatureRows]
    """Arrays of features by name."""
    columns: Mapping[str, ReadColumn] = field(default_factory=dict)
    """Columns of one value a row (keys, captions, splits, rows of images) by name; strings are
    objects of type str."""

    def column(self, names: Sequence[str], n_rows: int) -> Column | None:
        """Return the first of these columns that has a value for each row; None without one."""
        folded = {fold_name(name): read for name, read in self.columns.items()}
        for name in names:
            read = folded.get(fold_name(name))
            if read is None:
                continue
            column = read()
            if len(column) == n_rows:
                return column
        return None


def fold_name(name: str) -> str:
    """Return a name without case and separators, as names are compared."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def natural_order(path: Path | str) -> list[tuple[int, int, str]]:
    """Return a sort key that orders numbers in names by their value: part_2 before part_10."""
    words = re.split(r"(\d+)", str(path))
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words if word]


def with_lengths(
    features: Mapping[str, FeatureRows],
    columns: Mapping[str, ReadColumn],
    origin: str,
) -> dict[str, FeatureRows]:
    """Give token arrays the number of tokens of each row, where the file has it.

    `NAME.length` belongs to the array NAME, `lengths` to every array of tokens. Beside an array of
    two dimensions it says where the tokens of each row end.

    Raises:
        DataError: The numbers do not fit the array.
    """
    with_counts: dict[str, FeatureRows] = {}
    for name, rows in features.items():
        own_names = tuple(f"{name}.{word}" for word in LENGTH_NAMES)
        own_names += tuple(f"{name}_{word}" for word in LENGTH_NAMES)
        own_name = next((own_column for own_column in own_names if own_column in columns), None)
        shared_name = next(
            (shared_column for shared_column in LENGTH_NAMES if shared_column in columns), None
        )
        length_name = own_name or shared_name
        if length_name is None:
            with_counts[name] = rows
            continue
        lengths = columns[length_name]()
        origin_of_counts = f"{origin}: {length_name}"
        with_counts[name] = _with_lengths(
            rows, lengths, origin_of_counts, is_shared=own_name is None
        )
    return with_counts


def _with_lengths(
    rows: FeatureRows,
    lengths: Column,
    origin: str,
    is_shared: bool,
) -> FeatureRows:
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1 or (lengths < 0).any():
        raise DataError(f"{origin}: expected one count of tokens for each row")
    token_counts = lengths.astype(np.int64)
    is_flat = len(rows.row_shape) == 1
    if is_flat and int(token_counts.sum()) == rows.n_rows:
        return RaggedRows(tokens=rows, lengths=token_counts)
    fits = len(token_counts) == rows.n_rows and len(rows.row_shape) == 2
    if fits and int(token_counts.max(initial=0)) <= rows.row_shape[0]:
        return PaddedRows(padded=rows, lengths=token_counts)
    # Lengths of the tokens of one array say nothing about another one, which is pooled.
    if is_shared and is_flat:
        return rows
    raise DataError(
        f"{origin}: {len(token_counts):,} counts that add to {int(token_counts.sum()):,} do not "
        f"fit {rows.n_rows:,} rows; give one count for each row"
    )


def joined(files: Sequence[FeatureFile], origin: str) -> FeatureFile:
    """Join files of the same layout, in order.

    Raises:
        DataError: They have no array in common, or arrays of other shapes.
    """
    if len(files) == 1:
        return files[0]
    first = files[0]
    features: dict[str, FeatureRows] = {}
    for name in first.features:
        if all(name in file.features for file in files):
            rows_of_files = [file.features[name] for file in files]
            features[name] = join_rows_of(rows_of_files, [file.origin for file in files])
    if not features:
        # Files of one array each, such as one group of an HDF5 file, may differ in its name.
        singles = [next(iter(file.features.values())) for file in files if len(file.features) == 1]
        if len(singles) < len(files):
            raise DataError(f"{origin}: its files have no array of features in common")
        only_name = next(iter(first.features))
        features[only_name] = join_rows_of(singles, [file.origin for file in files])
    return replace(joined_columns(files, origin), features=features)


def joined_columns(files: Sequence[FeatureFile], origin: str) -> FeatureFile:
    """Join the columns of files, in order, without their features."""
    columns: dict[str, ReadColumn] = {}
    for name in files[0].columns:
        if all(name in file.columns for file in files):
            columns[name] = _join_columns([file.columns[name] for file in files])
    paths = tuple(path for file in files for path in file.paths)
    return FeatureFile(origin=origin, paths=paths, features={}, columns=columns)


def _join_columns(reads: Sequence[ReadColumn]) -> ReadColumn:
    return lambda: np.concatenate([read() for read in reads])


def as_strings(values: Column) -> Column:
    """Return a column with texts as `str`; numbers stay numbers.

    Raises:
        ValueError: Bytes are not UTF-8.
    """
    if values.dtype.kind == "U":
        return values.astype(object)
    if values.dtype.kind == "S":
        return np.array([value.decode() for value in values.tolist()], dtype=object)
    return values


def unreadable(path: Path, error: object, remedy: str) -> DataError:
    """Return the error for a file that a library cannot read."""
    return DataError(f"{path} cannot be read: {one_line(error)}; {remedy}")
