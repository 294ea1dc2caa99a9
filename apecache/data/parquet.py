"""Open Parquet tables of images.

A column has paths of images, or the images themselves: as bytes, or as structs of bytes and path
(Hugging Face).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from apecache.data.columns import Columns, choose_columns, image_keys, source_fields, to_row
from apecache.data.media import check_bytes, media_below
from apecache.data.pairs import PairSource, SourceFields, TableRow, join_rows
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import (
    ApecacheError,
    ManifestError,
    MissingExtraError,
    RowError,
    raise_if_refused,
)
from apecache.fingerprint import content_hash

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_GROUP_BYTES = 1 << 30
"""Largest row group of images. A row group is decoded whole, so larger ones are refused."""

GROUPS_KEPT = 2
"""Number of decoded row groups in memory. Images are read almost in order, so that reads at one
time span at most two."""


T = TypeVar("T")


class ParquetRow(NamedTuple):
    """Locate a row of a Parquet file: its row group, and its number inside the group."""

    group: int
    row: int


@dataclass(frozen=True, kw_only=True)
class TableMedia:
    """Read images from a column of a Parquet file."""

    groups: "RowGroups"
    places: Mapping[str, ParquetRow]
    """The row of each key."""

    @property
    def place(self) -> str:
        return str(self.groups.path.resolve())

    def read(self, key: str) -> bytes:
        if key not in self.places:
            raise RowError("missing", f"{key}: its row has no image")
        return self.groups.read(self.places[key], key)

    def exists(self, key: str) -> bool:
        return key in self.places

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the sizes, by decoding each row group once: Parquet does not record them."""
        groups = {self.places[key].group for key in keys if key in self.places}
        sizes_by_group: dict[int, list[int | None]] = {}
        for group in sorted(groups):
            sizes_by_group[group] = self.groups.sizes(group)
        return [self._size(key, sizes_by_group) for key in keys]

    def _size(self, key: str, sizes_by_group: Mapping[int, Sequence[int | None]]) -> int | None:
        if key not in self.places:
            return None
        group, row = self.places[key]
        group_sizes = sizes_by_group[group]
        return group_sizes[row] if row < len(group_sizes) else None


class RowGroups:
    """Decode row groups of one column, and keep the last few.

    One thread decodes while others wait for it. A pickle holds no decoded group.

    Args:
        path: The Parquet file.
        column: The column of bytes: `a`, or the field `a.bytes` of a struct.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path = path
        self.column = column
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.path, self.column)

    def read(self, place: ParquetRow, key: str) -> bytes:
        """Return the bytes of one image; raises as `Media.read` does."""
        import pyarrow as pa

        try:
            value = self._column_of(place.group)[place.row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            raise RowError("missing", f"{key}: {self.path}: {one_line(error)}") from None
        data: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise RowError("missing", f"{key}: its row has no image")
        check_bytes(len(data), key)
        return data

    def sizes(self, group: int) -> list[int | None]:
        """Return the number of bytes of each image of a row group, None where a row has none.

        The list is empty for a group that cannot be decoded.
        """
        import pyarrow as pa
        from pyarrow import compute

        try:
            column = self._column_of(group)
            is_struct = pa.types.is_struct(column.type)
            images = compute.struct_field(column, "bytes") if is_struct else column
            return list(compute.binary_length(images).to_pylist())
        except (OSError, IndexError, pa.ArrowException):
            return []

    def _column_of(self, group: int) -> Any:
        with self._lock:
            # The oldest group is dropped before the next is decoded, which limits the memory.
            if group not in self._kept:
                while len(self._kept) >= GROUPS_KEPT:
                    self._kept.popitem(last=False)
                self._kept[group] = _read_group(self.path, group, self.column)
            self._kept.move_to_end(group)
            return self._kept[group]


def _read_group(path: Path, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def open_parquet(path: Path, spec: OpenSpec) -> PairSource:
    """Open a whole table.

    Images in the table have the path in their struct as key, or else their 0-based row number (see
    `image_keys`).

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: The file is not Parquet or is truncated, a column is missing or ambiguous, a
            key is empty, or there are no rows.
    """
    with _opened(path) as file:
        columns = choose_columns(file.schema_arrow.names, path, spec)
        column_kind = _kind(file.schema_arrow.field(columns.image).type, columns.image, path)
        leaf = f"{columns.image}.bytes" if column_kind == "struct" else columns.image
        if column_kind == "bytes" or (column_kind == "struct" and _has_bytes(file, columns.image)):
            require_only(spec, path, "image_column", "caption_column", "split_column")
            return _with_images(file, columns=columns, path=path, leaf=leaf)
        rows = _rows_with_paths(file, columns=columns, column_kind=column_kind, path=path)
        fields = source_fields(columns, file.schema_arrow.names)
    media = media_below(spec.root or path.parent)
    return PairSource(join_rows(rows, str(path)), origin=str(path), media=media, fields=fields)


def parquet_rows(path: Path, spec: OpenSpec) -> tuple[list[TableRow], SourceFields]:
    """Return the rows of a table whose images are files, and which columns have which role.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: As `open_parquet` raises, or the table has the images themselves.
    """
    with _opened(path) as file:
        columns = choose_columns(file.schema_arrow.names, path, spec)
        column_kind = _kind(file.schema_arrow.field(columns.image).type, columns.image, path)
        if column_kind != "path":
            raise ManifestError(
                f"{path}: column {columns.image!r} holds images; expected names of files: "
                "give the table"
            )
        return _rows_with_paths(
            file,
            columns=columns,
            column_kind=column_kind,
            path=path,
        ), source_fields(
            columns,
            file.schema_arrow.names,
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file; errors of its library become ManifestErrors that name the file."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
    try:
        with ParquetFile(path) as file:
            yield file
    except ApecacheError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise_if_refused(path)
        raise ManifestError(
            f"{path}: no Parquet table that can be read ({one_line(error)}); write or copy it again"
        ) from None


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _kind(column_type: "pa.DataType", name: str, path: Path) -> str:
    """Return how a column holds images: as "path", "bytes", or "struct" of both."""
    from pyarrow import types

    value_type = column_type.value_type if types.is_dictionary(column_type) else column_type
    if (
        types.is_string(value_type)
        or types.is_large_string(value_type)
        or types.is_string_view(value_type)
    ):
        return "path"
    if (
        types.is_binary(value_type)
        or types.is_large_binary(value_type)
        or types.is_binary_view(value_type)
    ):
        return "bytes"
    if (
        types.is_struct(value_type)
        and min(value_type.get_field_index("bytes"), value_type.get_field_index("path")) >= 0
    ):
        return "struct"
    raise ManifestError(
        f"{path}: column {name!r} is {str(column_type)[:60]}; expected paths of images, their "
        "bytes, or structs of both"
    )


def _records(
    file: "pq.ParquetFile",
    names: Sequence[str],
    label: str | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based row, values by name) of some columns.

    Args:
        file: The table.
        names: Columns to read; `a.b` reads one field of a struct.
        label: The column of labels, whose numbers become names if the table has the names.
    """
    classes = _class_names(file.schema_arrow, label)
    batches = file.iter_batches(columns=list(names))
    records = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(_all(file, records), 1):
        if label and isinstance(record[label], int):
            record[label] = classes.get(record[label], record[label])
        yield number, record


def _all(file: "pq.ParquetFile", values: Iterable[T]) -> Iterator[T]:
    """Yield the values, and check that there are as many as the table has rows.

    Raises:
        ValueError: The column has another length.
    """
    count = 0
    n_rows = file.metadata.num_rows
    for count, value in enumerate(values, 1):
        if count <= n_rows:
            yield value
    if count != n_rows:
        raise ValueError(f"a column has {count} rows, the table {n_rows}")


def _class_names(schema: "pa.Schema", label: str | None) -> dict[int, str]:
    """Return the names of class labels by number.

    Hugging Face's library writes them into the schema's metadata; other tables have none.
    """
    try:
        metadata = schema.metadata or {}
        info = json.loads(metadata[b"huggingface"])["info"]
        class_names = info["features"][label]["names"]
        return {number: str(name) for number, name in enumerate(class_names)}
    except (KeyError, TypeError, ValueError):
        return {}


def _rows_with_paths(
    file: "pq.ParquetFile",
    columns: Columns,
    column_kind: str,
    path: Path,
) -> list[TableRow]:
    image_column = columns.image if column_kind == "path" else f"{columns.image}.path"
    names = [image_column, *columns.names]
    rows = []
    for line, record in _records(file, names, columns.label):
        image = record.get(columns.image)
        image_path = image["path"] if isinstance(image, dict) else image
        rows.append(
            to_row(line, record={**record, columns.image: image_path}, columns=columns, where=path)
        )
    return _require_rows(rows, path)


def _require_rows(rows: list[TableRow], path: Path) -> list[TableRow]:
    if not rows:
        raise ManifestError(
            f"{path}: the table has columns but no rows; expected a row for every image"
        )
    return rows


def _with_images(file: "pq.ParquetFile", columns: Columns, path: Path, leaf: str) -> PairSource:
    """Open a table that holds its images; bytes are read only where a path is repeated."""
    row_places = _places(file, path)
    groups = RowGroups(path, leaf)

    def digest(row: int) -> str:
        try:
            return content_hash(groups.read(row_places[row], str(row)))
        except RowError:
            return ""

    numbers = list(map(str, range(len(row_places))))
    keys = image_keys(_paths(file, columns.image), numbers, digest)
    first: dict[str, ParquetRow] = {}
    for key, row_place in zip(keys, row_places, strict=True):
        first.setdefault(key, row_place)
    numbered: Iterable[tuple[int, dict[str, Any]]] = ((row, {}) for row in range(1, len(keys) + 1))
    records = _records(file, columns.names, columns.label) if columns.names else numbered
    rows = []
    for (line, record), key in zip(records, keys, strict=True):
        named = {**record, columns.image: key}
        rows.append(to_row(line, record=named, columns=columns, where=path))
    fields = source_fields(columns, file.schema_arrow.names)
    pairs = join_rows(_require_rows(rows, path), str(path))
    return PairSource(
        pairs,
        origin=str(path),
        media=TableMedia(groups=groups, places=first),
        fields=fields,
    )


def _has_bytes(file: "pq.ParquetFile", column: str) -> bool:
    """Return whether any struct has bytes; if none has, the paths name files."""
    # Small batches, because the first image usually decides.
    batches = file.iter_batches(columns=[f"{column}.bytes"], batch_size=64)
    for batch in batches:
        images = batch.column(0).to_pylist()
        if any(image and image["bytes"] is not None for image in images):
            return True
    return False


def _paths(file: "pq.ParquetFile", column: str) -> list[str | None]:
    """Return the path in each row's struct, if there is one."""
    if not hasattr(file.schema_arrow.field(column).type, "get_field_index"):
        return [None] * int(file.metadata.num_rows)
    batches = file.iter_batches(columns=[f"{column}.path"])
    images = (image for batch in batches for image in batch.column(0).to_pylist())
    return [image and image["path"] for image in _all(file, images)]


def _places(file: "pq.ParquetFile", path: Path) -> list[ParquetRow]:
    """Return the place of every row.

    Raises:
        ManifestError: A row group is too large to be decoded whole.
    """
    # The footer also describes single columns, but pyarrow aborts the process on a damaged
    # description: only the row group's own size is read.
    row_places: list[ParquetRow] = []
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        if described.total_byte_size > MAX_GROUP_BYTES:
            raise ManifestError(
                f"{path}: row group {group} holds {described.total_byte_size / 1e9:.1f} GB; write "
                f"the table with smaller ones (row_group_size=100), at most "
                f"{MAX_GROUP_BYTES / 1e9:.1f} GB each"
            )
        row_places += map(partial(ParquetRow, group), range(described.num_rows))
    return row_places
