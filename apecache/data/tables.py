"""Open tables of text: TSV, CSV and JSON lines, or a list of JSON objects.

Several rows may name one image; a JSON caption may be a list. Labeled texts need no images: without
an image column, every row is an image of its own whose key is its line number. Every error names
the file, the line and what repairs it. `apecache.data.columns` chooses the columns.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from apecache.data.columns import choose_columns, has_image_column, source_fields, to_row
from apecache.data.delimited import delimited_records
from apecache.data.json_lines import json_records
from apecache.data.media import media_below
from apecache.data.pairs import PairSource, SourceFields, TableRow, source_of_rows
from apecache.data.spec import (
    COLUMN_OPTIONS,
    FILE_OPTIONS,
    TEXT_OPTIONS,
    OpenSpec,
    kind_of,
    require_only,
)
from apecache.errors import ManifestError

JSON_LINES = (".jsonl", ".ndjson")


def open_table(path: Path, spec: OpenSpec) -> PairSource:
    """Open a whole table whose images are files.

    Raises:
        ManifestError: The file is not UTF-8 or has no rows, a column is missing or ambiguous, a
            row is ragged, or a value is not text.
    """
    text_options = () if kind_of(path) in JSON_LINES else TEXT_OPTIONS
    require_only(spec, path, *COLUMN_OPTIONS, *FILE_OPTIONS, *text_options)
    rows, fields = table_rows(path, spec)
    media = media_below(spec.root or path.parent, spec.allow_root)
    return source_of_rows(rows, origin=str(path), media=media, fields=fields)


def open_records(
    names: Sequence[str],
    records: Iterable[tuple[int, Mapping[str, Any]]],
    path: Path,
    spec: OpenSpec,
) -> PairSource:
    """Open records of a file that are in memory."""
    require_only(spec, path, *COLUMN_OPTIONS, *FILE_OPTIONS)
    rows, fields = to_rows(names, records, location=path, spec=spec)
    media = media_below(spec.root or path.parent, spec.allow_root)
    return source_of_rows(rows, origin=str(path), media=media, fields=fields)


def table_rows(path: Path, spec: OpenSpec) -> tuple[list[TableRow], SourceFields]:
    """Return the rows, and which columns have which role; raises as `open_table` does."""
    names: Sequence[str]
    records: Iterable[tuple[int, Mapping[str, Any]]]
    if kind_of(path) in JSON_LINES:
        names, records = json_records(path)
    else:
        names, records = delimited_records(path, spec)
    if not path.stat().st_size:
        raise ManifestError(
            f"{path}: the file is empty; expected a row for every caption, columns image, caption"
        )
    return to_rows(names, records, location=path, spec=spec)


def to_rows(
    names: Sequence[str],
    records: Iterable[tuple[int, Mapping[str, Any]]],
    location: object,
    spec: OpenSpec,
) -> tuple[list[TableRow], SourceFields]:
    """Convert records to rows, and return which columns have which role.

    Raises:
        ManifestError: There are no records, a column is missing or ambiguous, or a value is not
            text.
    """
    alone = _texts_alone(names, spec)
    columns = choose_columns([*names, "image"] if alone else names, location, spec)
    rows = []
    for line, record in records:
        values = {**record, "image": str(line)} if alone else record
        rows.append(to_row(line, record=values, columns=columns, where=location))
    if not rows:
        raise ManifestError(
            f"{location}: the table has a header but no rows; expected a row for every caption, "
            "columns image, caption"
        )
    fields = source_fields(columns, names)
    return _with_lists(rows), replace(fields, image=None) if alone else fields


def _with_lists(rows: list[TableRow]) -> list[TableRow]:
    """Replace texts of lists by the captions in them, if all captions are such texts.

    pandas writes a column of lists as `['a dog', 'a cat']`, others as JSON.
    """
    texts = [text for row in rows for text in row.captions]
    if not texts or not all(map(_list_in, texts)):
        return rows
    return [
        replace(row, captions=tuple(chain.from_iterable(map(_list_in, row.captions))))
        for row in rows
    ]


def _list_in(text: str) -> list[str]:
    """Return the texts of a list that is written as JSON or by Python; empty if it is not one."""
    if not text.startswith(("['", '["')):
        return []
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    is_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_texts else []


def _texts_alone(names: Sequence[str], spec: OpenSpec) -> bool:
    """Return whether labeled texts are asked for, and there is no column of images."""
    texts_required = {"caption", "label"} <= set(spec.require) and "image" not in spec.require
    return texts_required and spec.image_column is None and not has_image_column(names, spec)


def open_tables(paths: Sequence[Path], origin: str, spec: OpenSpec) -> PairSource:
    """Open several tables as one, whose images are files below the folder of the first table.

    Raises:
        ManifestError: As `open_table` raises.
    """
    require_only(spec, origin, *COLUMN_OPTIONS, *FILE_OPTIONS, *TEXT_OPTIONS)
    rows: list[TableRow] = []
    table_fields: list[SourceFields] = []
    for path in paths:
        new_rows, fields = table_rows(path, spec)
        rows += new_rows
        table_fields.append(fields)
    media = media_below(spec.root or paths[0].parent, spec.allow_root)
    return source_of_rows(rows, origin=origin, media=media, fields=joined_fields(table_fields))


def joined_fields(table_fields: Sequence[SourceFields]) -> SourceFields:
    """Join the fields of several tables: a role has the fields that any of them reads it from."""
    names_by_role: dict[str, dict[str, None]] = {}
    unused: dict[str, None] = {}
    for fields in table_fields:
        for role, name in fields.taken.items():
            names_by_role.setdefault(role, {})[name] = None
        unused |= dict.fromkeys(fields.unused)
    joined_names = {role: ", ".join(names) for role, names in names_by_role.items()}
    columns = dict.fromkeys(chain.from_iterable(fields.columns for fields in table_fields))
    return SourceFields(
        **joined_names,
        unused=tuple(unused),
        further=table_fields[0].further,
        columns=tuple(columns),
    )
