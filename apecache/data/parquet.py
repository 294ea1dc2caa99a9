"""Open Parquet tables of images, in one file or several.

A column has paths of images, or the images themselves: as bytes, as structs of bytes and path
(Hugging Face), or as lists of either, of which the first image counts.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from apecache.data.columns import (
    Columns,
    choose_columns,
    image_keys,
    source_fields,
    to_row,
    with_class_label,
    with_only_image,
)
from apecache.data.media import FolderMedia, media_below
from apecache.data.pairs import PairSource, SourceFields, TableRow, source_of_rows
from apecache.data.paths import part_names
from apecache.data.row_groups import (
    ParquetRow,
    RowGroups,
    TableMedia,
    is_list,
    one_line,
)
from apecache.data.spec import (
    COLUMN_OPTIONS,
    FILE_OPTIONS,
    SPLITS,
    OpenSpec,
    distinct_splits,
    require_only,
)
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
SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})(?:[-_.].*)?")
"""Name of a part on a hub: `train-00000-of-00002`."""
FURTHER_IMAGES = "further images of a row"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParquetParts:
    """Hold the files of one table."""

    paths: tuple[Path, ...]
    origin: str
    """How the user named the table."""
    splits: tuple[str, ...]
    """Split of each file; empty where its name says nothing."""

    @property
    def names(self) -> list[str]:
        """Return a name for each file, and an empty one for a single file."""
        return part_names(self.paths) if len(self.paths) > 1 else [""]


def parts_of(paths: Sequence[Path], origin: str) -> ParquetParts:
    """Return the files of a table, with the splits that the names of files or folders say."""
    split_names = [_split_name(path) for path in paths]
    # One file of a name such as test.parquet is all that there is, and not a split of it.
    if len(paths) == 1:
        split_names = [""]
    split_of = distinct_splits(split_names)
    splits = tuple(split_of[name] for name in split_names)
    return ParquetParts(paths=tuple(paths), origin=origin, splits=splits)


def _split_name(path: Path) -> str:
    match = SPLIT_NAME.fullmatch(path.stem)
    if match:
        return match[1]
    return path.parent.name if path.parent.name in SPLITS else ""


def open_parquet(parts: ParquetParts, spec: OpenSpec) -> PairSource:
    """Open a whole table.

    Images in the table have the path in their struct as key, or else their 0-based row number (see
    `image_keys`), with the file's name in front where there are several.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: A file is not Parquet or is truncated, a column is missing or ambiguous, or
            there are no rows.
    """
    tables = [_read_part(path, spec) for path in parts.paths]
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    first = tables[0]
    fields = source_fields(first.columns, names)
    if first.columns.split is None and any(parts.splits):
        fields = replace(fields, split="file")
    # Paths of images are relative to the folder that holds all files of the table.
    folder = Path(os.path.commonpath([path.absolute().parent for path in parts.paths]))
    # One file with bytes is enough: in another, every image may be missing.
    if any(table.has_images for table in tables):
        require_only(spec, parts.origin, *COLUMN_OPTIONS)
        return _with_images(parts, tables=tables, fields=fields, folder=folder)
    require_only(spec, parts.origin, *COLUMN_OPTIONS, *FILE_OPTIONS)
    rows = []
    for table, split in zip(tables, parts.splits, strict=True):
        for row in table.rows(table.paths):
            rows.append(replace(row, split=row.split or split))
    return source_of_rows(
        _require_rows(rows, parts.origin),
        origin=parts.origin,
        media=media_below(spec.root or folder, spec.allow_root),
        fields=fields,
    )


def parquet_rows(path: Path, spec: OpenSpec) -> tuple[list[TableRow], SourceFields]:
    """Return the rows of a table whose images are files, and which columns have which role.

    Raises:
        MissingExtraError: pyarrow is not installed.
        ManifestError: As `open_parquet` raises, or the table has the images themselves.
    """
    table = _read_part(path, spec)
    if table.has_images:
        raise ManifestError(
            f"{path}: column {table.columns.image!r} holds images; expected names of files: give "
            "the table"
        )
    rows = list(table.rows(table.paths))
    return _require_rows(rows, path), source_fields(table.columns, table.names)


@dataclass(frozen=True, kw_only=True)
class _PartTable:
    """Hold what is read of one file: all but its images."""

    path: Path
    names: list[str]
    columns: Columns
    records: list[dict[str, Any]]
    """Values by column, without the column of images."""
    paths: list[str | None]
    """Path of each row's image, if it has one."""
    has_images: bool
    """Whether any row holds its image."""
    group_rows: list[int]
    """Number of rows of each row group."""
    n_further: int
    """Number of images that are not the first of their row."""

    def rows(self, keys: Sequence[str | None]) -> Iterator[TableRow]:
        """Yield the rows, with these names of images."""
        for line, (record, key) in enumerate(zip(self.records, keys, strict=True), 1):
            named = {**record, self.columns.image: key}
            yield to_row(line, record=named, columns=self.columns, where=self.path)


def _read_part(path: Path, spec: OpenSpec) -> _PartTable:
    with _opened(path) as file:
        schema = file.schema_arrow
        classes = _class_names(schema)
        spec = with_class_label(spec, schema.names, list(classes))
        spec = with_only_image(spec, [field.name for field in schema if _holds_images(field.type)])
        columns = choose_columns(schema.names, path, spec)
        column_type = _value_type(schema.field(columns.image).type)
        _require_images(column_type, columns.image, path)
        # A struct may hold bytes or name files; only the values tell which.
        has_images = _is_binary(column_type) or _has_bytes(file, columns.image)
        paths, n_further = _paths(file, columns.image, column_type)
        return _PartTable(
            path=path,
            names=list(schema.names),
            columns=columns,
            records=list(_records(file, columns, classes)),
            paths=paths,
            has_images=has_images,
            group_rows=_group_rows(file, path) if has_images else [],
            n_further=n_further,
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


def _value_type(column_type: "pa.DataType") -> "pa.DataType":
    """Return the type of the images of a column: of its values, or of the elements of its lists."""
    from pyarrow import types

    if is_list(column_type):
        return _value_type(column_type.value_type)
    return column_type.value_type if types.is_dictionary(column_type) else column_type


def _is_binary(value_type: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(value_type)
        or types.is_large_binary(value_type)
        or types.is_binary_view(value_type)
        or types.is_fixed_size_binary(value_type)
    )


def _is_struct(value_type: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(
        types.is_struct(value_type)
        and min(value_type.get_field_index("bytes"), value_type.get_field_index("path")) >= 0
    )


def _holds_images(column_type: "pa.DataType") -> bool:
    value_type = _value_type(column_type)
    return _is_binary(value_type) or _is_struct(value_type)


def _require_images(value_type: "pa.DataType", name: str, path: Path) -> None:
    from pyarrow import types

    is_text = (
        types.is_string(value_type)
        or types.is_large_string(value_type)
        or types.is_string_view(value_type)
    )
    if not (is_text or _is_binary(value_type) or _is_struct(value_type)):
        raise ManifestError(
            f"{path}: column {name!r} is {str(value_type)[:60]}; expected paths of images, their "
            "bytes, or structs of both; choose another with --image-column"
        )


def _records(
    file: "pq.ParquetFile",
    columns: Columns,
    classes: Mapping[str, Sequence[str]],
) -> Iterator[dict[str, Any]]:
    """Yield the values of all columns but the images', with class labels as names."""
    names = [name for name in columns.names if name in file.schema_arrow.names]
    if not names:
        # A table of images alone has rows too.
        yield from ({} for _ in range(file.metadata.num_rows))
        return
    batches = file.iter_batches(columns=names)
    for record in _all(file, (record for batch in batches for record in batch.to_pylist())):
        for name in names:
            record[name] = class_name(record[name], classes.get(name))
        yield record


def class_name(value: Any, names: Sequence[str] | None) -> Any:
    """Return the name of a class label; other values stay as they are.

    Hugging Face's library writes -1 for a row without a label.
    """
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _all(file: "pq.ParquetFile", values: Iterable[T]) -> Iterator[T]:
    """Yield the values, and check that there are as many as the table has rows.

    Raises:
        ValueError: The column has another length.
    """
    count = 0
    n_rows = file.metadata.num_rows
    for count, value in enumerate(values, 1):
        # What is too much is only counted, so that the error can say how much there is.
        if count <= n_rows:
            yield value
    if count != n_rows:
        raise ValueError(f"a column has {count} rows, the table {n_rows}")


def _class_names(schema: "pa.Schema") -> dict[str, list[str]]:
    """Return the names of the classes of each column that holds class labels.

    Hugging Face's library writes them into the schema's metadata; other tables have none.
    """
    try:
        metadata = schema.metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        named: dict[str, list[str]] = {}
        for column, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                named[column] = [str(name) for name in feature["names"]]
        return named
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _require_rows(rows: list[TableRow], location: object) -> list[TableRow]:
    if not rows:
        raise ManifestError(
            f"{location}: the table has columns but no rows; expected a row for every image"
        )
    return rows


def _with_images(
    parquet_parts: ParquetParts,
    tables: Sequence[_PartTable],
    fields: SourceFields,
    folder: Path,
) -> PairSource:
    """Open a table that holds its images; bytes are read only where a path is repeated."""
    row_places: list[ParquetRow] = []
    numbers: list[str] = []
    paths: list[str | None] = []
    for file, (table, name) in enumerate(zip(tables, parquet_parts.names, strict=True)):
        first_row = len(row_places)
        for group, n_rows in enumerate(table.group_rows):
            row_places += [ParquetRow(file, group, row) for row in range(n_rows)]
        prefix = f"{name}/" if name else ""
        numbers += [f"{prefix}{row}" for row in range(len(row_places) - first_row)]
        paths += table.paths
    groups = RowGroups(parquet_parts.paths, tables[0].columns.image)
    # Hashing is left to rows whose path is not unique: it decodes whole row groups.
    keys = image_keys(paths, numbers, lambda row: _digest(groups, row_places[row]))
    place_of_key: dict[str, ParquetRow] = {}
    for key, row_place in zip(keys, row_places, strict=True):
        # Rows of one key are one image, read where it comes first.
        place_of_key.setdefault(key, row_place)
    rows: list[TableRow] = []
    remaining = iter(keys)
    for table, split in zip(tables, parquet_parts.splits, strict=True):
        part_keys = [next(remaining) for _ in table.records]
        rows += [replace(row, split=row.split or split) for row in table.rows(part_keys)]
    source = source_of_rows(
        _require_rows(rows, parquet_parts.origin),
        origin=parquet_parts.origin,
        media=TableMedia(groups=groups, places=place_of_key, files=FolderMedia(root=folder)),
        fields=fields,
    )
    n_further = sum(table.n_further for table in tables)
    further = {FURTHER_IMAGES: n_further} if n_further else {}
    return replace(source, skipped={**source.skipped, **further})


def _digest(groups: RowGroups, row_place: ParquetRow) -> str:
    try:
        image = groups.read(row_place, str(row_place.row))
        return content_hash(image)
    # An image that cannot be read is reported when it is encoded.
    except RowError:
        return ""


def _leaf(file: "pq.ParquetFile", column: str, name: str) -> str | None:
    """Return the full name of a field of the structs of a column; None if it has none.

    The name of a list's elements differs between writers: `images.list.element.path`.
    """
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    prefix, suffix = f"{column}.", f".{name}"
    matching = (leaf for leaf in leaves if leaf.startswith(prefix) and leaf.endswith(suffix))
    return next(matching, None)


def _has_bytes(file: "pq.ParquetFile", column: str) -> bool:
    """Return whether any struct has bytes; if none has, the paths name files."""
    leaf = _leaf(file, column, "bytes")
    if leaf is None:
        return False
    # Small batches, because the first image usually decides.
    for batch in file.iter_batches(columns=[leaf], batch_size=64):
        for value in batch.column(0).to_pylist():
            images = value if isinstance(value, list) else [value]
            if any(image and image["bytes"] is not None for image in images):
                return True
    return False


def _paths(
    file: "pq.ParquetFile",
    column: str,
    value_type: "pa.DataType",
) -> tuple[list[str | None], int]:
    """Return the path of each row's image, if there is one, and the number of further images."""
    has_lists = is_list(file.schema_arrow.field(column).type)
    leaf = _leaf(file, column, "path") if _is_struct(value_type) else column
    # Bytes have no path, so the column need not be read at all.
    if _is_binary(value_type) and not has_lists:
        return [None] * int(file.metadata.num_rows), 0
    paths: list[str | None] = []
    n_further = 0
    batches = file.iter_batches(columns=[leaf], batch_size=1024)
    for value in _all(file, (value for batch in batches for value in batch.column(0).to_pylist())):
        images = value if isinstance(value, list) else [value]
        n_further += max(0, len(images) - 1)
        image = images[0] if images else None
        path = image["path"] if isinstance(image, dict) else image
        paths.append(path if isinstance(path, str) else None)
    return paths, n_further


def _group_rows(file: "pq.ParquetFile", path: Path) -> list[int]:
    """Return the number of rows of each row group.

    Raises:
        ManifestError: A row group is too large to be decoded whole.
    """
    # The footer also describes single columns, but pyarrow aborts the process on a damaged
    # description: only the row group's own size is read.
    n_rows_of_groups = []
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        if described.total_byte_size > MAX_GROUP_BYTES:
            raise ManifestError(
                f"{path}: row group {group} holds {described.total_byte_size / 1e9:.1f} GB; write "
                f"the table with smaller ones (row_group_size=100), at most "
                f"{MAX_GROUP_BYTES / 1e9:.1f} GB each"
            )
        n_rows_of_groups.append(int(described.num_rows))
    return n_rows_of_groups
