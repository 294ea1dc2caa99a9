"""Open tables of text: TSV, CSV and JSON lines.

Several rows may name one image; a JSON line's caption may be a list. Labeled texts need no images:
without an image column, every row is an image of its own whose key is its line number. Every error
names the file, the line and what repairs it. `apecache.data.columns` chooses the columns.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from apecache.data.columns import IMAGE_COLUMNS, choose_columns, source_fields, to_row
from apecache.data.media import media_below
from apecache.data.pairs import PairSource, SourceFields, TableRow, join_rows
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, counted

DIALECTS = {".tsv": "excel-tab", ".csv": "excel"}


def open_table(path: Path, spec: OpenSpec) -> PairSource:
    """Open a whole table whose images are files.

    Raises:
        ManifestError: The file is not UTF-8 or has no rows, a column is missing or ambiguous, a
            row is ragged, or a key is empty.
    """
    rows, fields = table_rows(path, spec)
    media = media_below(spec.root or path.parent)
    return PairSource(join_rows(rows, str(path)), origin=str(path), media=media, fields=fields)


def table_rows(path: Path, spec: OpenSpec) -> tuple[list[TableRow], SourceFields]:
    """Return the rows, and which columns have which role; raises as `open_table` does."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows, fields = _rows(file, path, spec)
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
    if not rows:
        problem = (
            "the table has a header but no rows" if path.stat().st_size else "the file is empty"
        )
        raise ManifestError(
            f"{path}: {problem}; expected a row for every caption, columns image, caption"
        )
    return rows, fields


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return the error message for a file that is not UTF-8."""
    return f"{path}: not UTF-8 ({_place(path, error)}); save the file as UTF-8"


def _rows(file: TextIO, path: Path, spec: OpenSpec) -> tuple[list[TableRow], SourceFields]:
    read_records = _json_records if path.suffix.lower() == ".jsonl" else _csv_records
    records = read_records(file, path)
    first = next(records, None)
    if first is None:
        return [], SourceFields()
    names = list(first[1])
    alone = _texts_alone(names, spec)
    columns = choose_columns([*names, "image"] if alone else names, path, spec)
    rows = []
    for line, record in chain([first], records):
        values = {**record, "image": str(line)} if alone else record
        rows.append(to_row(line, record=values, columns=columns, where=path))
    fields = source_fields(columns, names)
    return rows, replace(fields, image=None) if alone else fields


def _texts_alone(names: Iterable[str], spec: OpenSpec) -> bool:
    """Return whether labeled texts are asked for, and there is no column of images."""
    texts_required = {"caption", "label"} <= set(spec.require) and "image" not in spec.require
    has_images = bool(set(IMAGE_COLUMNS) & set(names))
    return texts_required and spec.image_column is None and not has_images


def _csv_records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (1-based line, cells by column) of each record."""
    reader = csv.reader(file, DIALECTS[path.suffix.lower()], strict=True)
    # The line where a record begins: a quoted cell may have many lines, and a cell whose quotes are
    # not balanced extends to the end of the file.
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, path)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                problem = f"{counted(len(cells), 'column')}, the header has {len(header)}"
                raise ManifestError(
                    f"{path}, line {line}: {problem}; quote cells that hold the separator"
                )
            if cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{path}, line {line}: {error}; double the quotes inside a quoted cell"
        ) from None


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ManifestError(
            f"{path}, line 1: column {twice[0]!r} appears twice; rename one of them"
        )


def _json_records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (1-based line, values by name) of each record."""
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{path}, line {line}: not a JSON object ({error}); write one object on each line"
            ) from None
        if not isinstance(record, dict):
            type_name = type(record).__name__
            raise ManifestError(
                f"{path}, line {line}: expected a JSON object, found {type_name}; write one "
                "object on each line"
            )
        yield line, record


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, and refuse names that appear twice."""
    record = dict(items)
    if len(record) != len(items):
        raise ValueError("a name appears twice")
    return record


def _place(path: Path, error: UnicodeDecodeError) -> str:
    """Return the line and the byte where the file stops being UTF-8."""
    # The codec's own offset counts from the start of its buffer, so the file is read again.
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as inner:
                return f"line {line}, byte {inner.start + 1}"
    return str(error.reason)
