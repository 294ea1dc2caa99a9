"""Parquet tables: paths of images, or the images themselves as bytes or as structs of bytes and
path (Hugging Face)."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apecache.data.columns import Columns, choose_columns, image_keys, source_fields, to_row
from apecache.data.media import check_bytes, media_below
from apecache.data.pairs import PairSource, Row, SourceFields, join_rows
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import ApecacheError, ManifestError, MissingExtraError, RowError
from apecache.fingerprint import content_hash

MAX_GROUP_BYTES = 1 << 30
"""A row group of images is decoded whole: larger ones are refused."""

GROUPS_KEPT = 2
"""Decoded row groups that are kept: images are asked for almost in order, so they span at most
two."""


T = TypeVar("T")


class Place(NamedTuple):
    """A row of a Parquet file: its row group and its number inside it."""

    group: int
    row: int


@dataclass(frozen=True, kw_only=True)
class TableMedia:
    """Images that stand in a column of a Parquet file."""

    groups: "RowGroups"
    places: Mapping[str, Place]

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
        """Decodes the column of images once, row group by row group: Parquet does not tell their
        sizes."""
        known: dict[int, list[int | None]] = {}
        for group in sorted({self.places[key].group for key in keys if key in self.places}):
            known[group] = self.groups.sizes(group)
        return [self._size(key, known) for key in keys]

    def _size(self, key: str, known: Mapping[int, Sequence[int | None]]) -> int | None:
        if key not in self.places:
            return None
        place = self.places[key]
        return known[place.group][place.row] if place.row < len(known[place.group]) else None


class RowGroups:
    """A column's row groups, the last few kept; one thread decodes while others wait for it.

    `column` is that of the bytes: `a`, or the field `a.bytes` of a struct. A pickle of it keeps no
    group.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path = path
        self.column = column
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.path, self.column)

    def read(self, place: Place, key: str) -> bytes:
        """Raises as `Media.read` does."""
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
        """Bytes of each image of a row group, None where a row has none; nothing of a group that
        cannot be decoded."""
        import pyarrow as pa
        from pyarrow import compute

        try:
            column = self._column_of(group)
            images = (
                compute.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
            )
            return list(compute.binary_length(images).to_pylist())
        except (OSError, IndexError, pa.ArrowException):
            return []

    def _column_of(self, group: int) -> Any:
        with self._lock:
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
    """A whole table. Images that stand in it have their struct's path as key, or else the number of
    their row from 0: see `image_keys`.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: no Parquet, or cut; a missing or ambiguous column; an empty key; no rows.
    """
    with _opened(path) as file:
        columns = choose_columns(file.schema_arrow.names, path, spec)
        kind = _kind(file.schema_arrow.field(columns.image).type, columns.image, path)
        leaf = f"{columns.image}.bytes" if kind == "struct" else columns.image
        if kind == "bytes" or (kind == "struct" and _has_bytes(file, columns.image)):
            require_only(spec, path, "image_column", "caption_column", "split_column")
            return _with_images(file, columns=columns, path=path, leaf=leaf)
        rows = _rows_with_paths(file, columns=columns, kind=kind, path=path)
        fields = source_fields(columns, file.schema_arrow.names)
    media = media_below(spec.root or path.parent)
    return PairSource(join_rows(rows, str(path)), origin=str(path), media=media, fields=fields)


def parquet_rows(path: Path, spec: OpenSpec) -> tuple[list[Row], SourceFields]:
    """Rows of a table whose images are files, and which columns were taken as what.

    Raises as `open_parquet` does, and ManifestError for images inside.
    """
    with _opened(path) as file:
        columns = choose_columns(file.schema_arrow.names, path, spec)
        kind = _kind(file.schema_arrow.field(columns.image).type, columns.image, path)
        if kind != "path":
            raise ManifestError(
                f"{path}: column {columns.image!r} holds images; expected names of files: "
                "give the table"
            )
        return _rows_with_paths(file, columns=columns, kind=kind, path=path), source_fields(
            columns,
            file.schema_arrow.names,
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A Parquet file, and its library's errors as ManifestErrors that name it."""
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
        raise ManifestError(
            f"{path}: no Parquet table that can be read ({one_line(error)}); write or copy it again"
        ) from None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _kind(found: Any, name: str, path: Path) -> str:
    """path, bytes, or struct (of both)."""
    from pyarrow import types

    value = found.value_type if types.is_dictionary(found) else found
    if types.is_string(value) or types.is_large_string(value) or types.is_string_view(value):
        return "path"
    if types.is_binary(value) or types.is_large_binary(value) or types.is_binary_view(value):
        return "bytes"
    if (
        types.is_struct(value)
        and min(value.get_field_index("bytes"), value.get_field_index("path")) >= 0
    ):
        return "struct"
    raise ManifestError(
        f"{path}: column {name!r} is {str(found)[:60]}; expected paths of images, their "
        "bytes, or structs of both"
    )


def _records(
    file: Any,
    names: Sequence[str],
    label: str | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, values) of some columns; `a.b` reads one field of a struct. Labels are named if
    the table can."""
    classes = _class_names(file.schema_arrow, label)
    batches = file.iter_batches(columns=list(names))
    for number, record in enumerate(
        _all(file, (record for batch in batches for record in batch.to_pylist())),
        1,
    ):
        if label and isinstance(record[label], int):
            record[label] = classes.get(record[label], record[label])
        yield number, record


def _all(file: Any, values: Iterable[T]) -> Iterator[T]:
    """As many values as the table says it has rows.

    Raises:
        ValueError: a column of another length.
    """
    count = 0
    n_rows = file.metadata.num_rows
    for count, value in enumerate(values, 1):
        if count <= n_rows:
            yield value
    if count != n_rows:
        raise ValueError(f"a column has {count} rows, the table {n_rows}")


def _class_names(schema: Any, label: str | None) -> dict[int, str]:
    """Of a class label that Hugging Face's library wrote, which keeps the names beside the
    schema."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label][
            "names"
        ]
        return {number: str(name) for number, name in enumerate(described)}
    except (KeyError, TypeError, ValueError):
        return {}


def _rows_with_paths(file: Any, columns: Columns, kind: str, path: Path) -> list[Row]:
    names = [columns.image if kind == "path" else f"{columns.image}.path", *columns.names]
    rows = []
    for line, record in _records(file, names, columns.label):
        image = record.get(columns.image)
        plain = image["path"] if isinstance(image, dict) else image
        rows.append(
            to_row(line, record={**record, columns.image: plain}, columns=columns, where=path)
        )
    return _require_rows(rows, path)


def _require_rows(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise ManifestError(
            f"{path}: the table has columns but no rows; expected a row for every image"
        )
    return rows


def _with_images(file: Any, columns: Columns, path: Path, leaf: str) -> PairSource:
    """Bytes are not read, but where a path is repeated."""
    places = _places(file, path)
    groups = RowGroups(path, leaf)

    def digest(row: int) -> str:
        try:
            return content_hash(groups.read(places[row], str(row)))
        except RowError:
            return ""

    keys = image_keys(_paths(file, columns.image), [str(row) for row in range(len(places))], digest)
    first: dict[str, Place] = {}
    for key, place in zip(keys, places, strict=True):
        first.setdefault(key, place)
    numbered: Iterable[tuple[int, dict[str, Any]]] = ((row, {}) for row in range(1, len(keys) + 1))
    records = _records(file, columns.names, columns.label) if columns.names else numbered
    named = zip(records, keys, strict=True)
    rows = [
        to_row(line, record={**record, columns.image: key}, columns=columns, where=path)
        for (line, record), key in named
    ]
    fields = source_fields(columns, file.schema_arrow.names)
    pairs = join_rows(_require_rows(rows, path), str(path))
    return PairSource(
        pairs,
        origin=str(path),
        media=TableMedia(groups=groups, places=first),
        fields=fields,
    )


def _has_bytes(file: Any, column: str) -> bool:
    """Whether any struct has bytes: if none has, its paths name files."""
    batches = file.iter_batches(columns=[f"{column}.bytes"], batch_size=64)
    return any(
        image and image["bytes"] is not None
        for batch in batches
        for image in batch.column(0).to_pylist()
    )


def _paths(file: Any, column: str) -> list[str | None]:
    """Of every row, the path in its struct, if there is one."""
    if not hasattr(file.schema_arrow.field(column).type, "get_field_index"):
        return [None] * int(file.metadata.num_rows)
    batches = file.iter_batches(columns=[f"{column}.path"])
    return list(
        _all(
            file,
            (image and image["path"] for batch in batches for image in batch.column(0).to_pylist()),
        )
    )


def _places(file: Any, path: Path) -> list[Place]:
    """Of every row; refuses row groups that are too large to be decoded whole.

    The footer's description of single columns is left alone: pyarrow ends the process on one that
    is damaged.
    """
    places: list[Place] = []
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        if described.total_byte_size > MAX_GROUP_BYTES:
            raise ManifestError(
                f"{path}: row group {group} holds {described.total_byte_size / 1e9:.1f} GB; write "
                "the table with "
                f"smaller ones (row_group_size=100), at most {MAX_GROUP_BYTES / 1e9:.1f} GB each"
            )
        places += map(partial(Place, group), range(described.num_rows))
    return places
