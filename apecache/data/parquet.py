"""Parquet tables: paths of images, or the images themselves as bytes or as structs of bytes and path (Hugging Face)."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from apecache.data.columns import Columns, choose_columns, image_keys, to_row
from apecache.data.media import FolderMedia, Media, check_bytes
from apecache.data.pairs import PairSource, Row, join_rows
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import ManifestError, MissingExtraError, RowError
from apecache.fingerprint import content_hash

MAX_GROUP_BYTES = 1 << 30
"""A row group of images is decoded whole: larger ones are refused."""

GROUPS_KEPT = 2
"""Decoded row groups that are kept: images are asked for almost in order, so they span at most two."""


class Place(NamedTuple):
    """A row of a Parquet file: its row group and its number inside it."""

    group: int
    row: int


@dataclass(frozen=True)
class TableMedia:
    """Images that stand in a column of a Parquet file."""

    path: Path
    column: str
    places: Mapping[str, Place]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_groups", _Groups(self.path, self.column))

    def __reduce__(self) -> tuple[Any, ...]:
        return TableMedia, (self.path, self.column, self.places)

    @property
    def place(self) -> str:
        return str(self.path.resolve())

    def read(self, key: str) -> bytes:
        if key not in self.places:
            raise RowError("missing", f"{key}: its row has no image")
        group, row = self.places[key]
        groups: _Groups = getattr(self, "_groups")  # noqa: B009
        return groups.read(group, row, key)

    def exists(self, key: str) -> bool:
        return key in self.places


class _Groups:
    """The column's row groups, the last few kept; one thread decodes while others wait for it."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column = path, column
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def read(self, group: int, row: int, key: str) -> bytes:
        import pyarrow as pa

        try:
            value = self._column_of(group)[row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            raise RowError("missing", f"{key}: {self._path}: {one_line(error)}") from None
        data: bytes | None = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise RowError("missing", f"{key}: its row has no image")
        check_bytes(len(data), key)
        return data

    def _column_of(self, group: int) -> Any:
        with self._lock:
            if group not in self._kept:
                while len(self._kept) >= GROUPS_KEPT:
                    self._kept.popitem(last=False)
                self._kept[group] = _read_group(self._path, group, self._column)
            self._kept.move_to_end(group)
            return self._kept[group]


def _read_group(path: Path, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def open_parquet(path: Path, spec: OpenSpec) -> PairSource:
    """A whole table. Images that stand in it have their struct's path as key, or else the number of their row from 0:
    see `image_keys`.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: no Parquet, or cut; a missing or ambiguous column; an empty key; no rows.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        columns = choose_columns(schema.names, path, spec)
        kind = _kind(schema.field(columns.image).type, columns.image, path)
        if kind != "path" and (kind == "bytes" or _has_bytes(file, columns.image)):
            require_only(spec, path, "image_column", "caption_column", "split_column")
            return _with_images(file, columns, path, kind)
        rows = _rows_with_paths(file, columns, kind, path)
    return PairSource(join_rows(rows, str(path)), str(path), FolderMedia(spec.root or path.parent))


def parquet_rows(path: Path, spec: OpenSpec) -> list[Row]:
    """Rows of a table whose images are files. Raises as `open_parquet` does, and ManifestError for images inside."""
    with _opened(path) as file:
        columns = choose_columns(file.schema_arrow.names, path, spec)
        kind = _kind(file.schema_arrow.field(columns.image).type, columns.image, path)
        if kind != "path":
            raise ManifestError(
                f"{path}: column {columns.image!r} holds images; expected names of files: give the table"
            )
        return _rows_with_paths(file, columns, kind, path)


class _opened:  # noqa: N801  (a context manager that is used like a function)
    """A Parquet file, and its library's errors as ManifestErrors that name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise MissingExtraError("pyarrow", "parquet") from None
        try:
            self.file = ParquetFile(self.path)
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if hasattr(self, "file"):
            self.file.close()
        if isinstance(error, pa.ArrowException | OSError):
            raise ManifestError(
                f"{self.path}: no Parquet table that can be read ({one_line(error)}); write or copy it again"
            ) from None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _kind(found: Any, name: str, path: Path) -> str:
    """path, bytes, or struct (of bytes and, mostly, path)."""
    from pyarrow import types

    value = found.value_type if types.is_dictionary(found) else found
    if types.is_string(value) or types.is_large_string(value) or types.is_string_view(value):
        return "path"
    if types.is_binary(value) or types.is_large_binary(value) or types.is_binary_view(value):
        return "bytes"
    if types.is_struct(value) and value.get_field_index("bytes") >= 0:
        return "struct"
    raise ManifestError(
        f"{path}: column {name!r} is {str(found)[:60]}; expected paths of images, their bytes, or structs of both"
    )


def _has_bytes(file: Any, column: str) -> bool:
    """Whether any struct has bytes: if none has, its paths name files."""
    batches = file.iter_batches(columns=[f"{column}.bytes"], batch_size=64)
    return any(value is not None for batch in batches for value in _fields(batch.column(0), "bytes"))


def _fields(structs: Any, name: str) -> Any:
    from pyarrow import compute

    return compute.struct_field(structs, name).to_pylist()


def _records(file: Any, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, values) of some columns; `a.b` reads one field of a struct."""
    number = 1
    for batch in file.iter_batches(columns=list(names)):
        for record in batch.to_pylist():
            yield number, record
            number += 1


def _rows_with_paths(file: Any, columns: Columns, kind: str, path: Path) -> list[Row]:
    names = [columns.image if kind == "path" else f"{columns.image}.path", *columns.names]
    rows = []
    for line, record in _records(file, names):
        image = record.get(columns.image)
        plain = image["path"] if isinstance(image, dict) else image
        rows.append(to_row(line, {**record, columns.image: plain}, columns, path))
    return _require_rows(rows, path)


def _require_rows(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise ManifestError(f"{path}: the table has columns but no rows; expected a row for every image")
    return rows


def _with_images(file: Any, columns: Columns, path: Path, kind: str) -> PairSource:
    """Bytes are not read, but where a path is repeated."""
    places = _places(file, columns.image, path)
    column = f"{columns.image}.bytes" if kind == "struct" else columns.image
    groups = _Groups(path, column)
    present, paths = _present(file, columns.image, kind)

    def digest(row: int) -> str:
        return content_hash(groups.read(*places[row], str(row))) if present[row] else ""

    keys = image_keys(paths, [str(row) for row in range(len(places))], digest)
    first: dict[str, Place] = {}
    for key, place, there in zip(keys, places, present, strict=True):
        if there:
            first.setdefault(key, place)
    records = _records(file, columns.names) if columns.names else ((row + 1, {}) for row in range(len(places)))
    named = zip(records, keys, strict=True)
    rows = [to_row(line, {**record, columns.image: key}, columns, path) for (line, record), key in named]
    media: Media = TableMedia(path, column, first)
    return PairSource(join_rows(_require_rows(rows, path), str(path)), str(path), media)


def _places(file: Any, column: str, path: Path) -> list[Place]:
    """Of every row; refuses row groups that are too large to be decoded whole."""
    places: list[Place] = []
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        chunks = [described.column(i) for i in range(described.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        if size > MAX_GROUP_BYTES:
            raise ManifestError(
                f"{path}: row group {group} holds {size / 1e9:.1f} GB of images; write the table with smaller ones "
                f"(row_group_size=100), at most {MAX_GROUP_BYTES / 1e9:.1f} GB each"
            )
        places += map(partial(Place, group), range(described.num_rows))
    return places


def _present(file: Any, column: str, kind: str) -> tuple[list[bool], list[str | None]]:
    """Of every row, whether it has an image, and its path if it has one."""
    from pyarrow import compute

    present: list[bool] = []
    paths: list[str | None] = []
    for batch in file.iter_batches(columns=[column], batch_size=64):
        images = batch.column(0)
        data = compute.struct_field(images, "bytes") if kind == "struct" else images
        named = kind == "struct" and images.type.get_field_index("path") >= 0
        present += compute.is_valid(data).to_pylist()
        paths += _fields(images, "path") if named else [None] * len(images)
    return present, paths
