"""Tables of pairs: TSV, CSV and JSON lines with the columns image, caption, split, lang (or language), label.

Several rows may name one image; a JSON line's caption may be a list. Every error names the file, the line and what
mends it.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from apecache.data.pairs import PairSource, Row, join_rows
from apecache.errors import ManifestError, nearest

DIALECTS = {".tsv": "excel-tab", ".csv": "excel"}
SUFFIXES = (".tsv", ".csv", ".jsonl")
LANGUAGE_COLUMNS = ("lang", "language")


@dataclass(frozen=True)
class TableSpec:
    """Which columns to read. `split` None: the column `split` if there is one. `require`d columns must be there."""

    split: str | None = None
    require: tuple[str, ...] = ("image", "caption")


def read_pairs(path: Path, spec: TableSpec | None = None) -> PairSource:
    """Read a whole table.

    Raises:
        ManifestError: no such file, unknown ending, not UTF-8, a missing column, a ragged row, an empty key, no rows.
    """
    spec = spec or TableSpec()
    try:
        _require_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(file, path, spec))
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({_place(path, error)}); save the table as UTF-8") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; expected a table that can be read") from None
    if not rows:
        found = "the table has a header but no rows" if path.stat().st_size else "the file is empty"
        raise ManifestError(f"{path}: {found}; expected a row for every caption, columns {', '.join(spec.require)}")
    return join_rows(rows, str(path))


def _require_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ManifestError(f"{path}: expected a table that ends in {', '.join(SUFFIXES)}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ManifestError(f"{path}: no such file{nearest(path.name, siblings)}")
    if not path.is_file():
        raise ManifestError(f"{path}: a folder or device; expected a table that ends in {', '.join(SUFFIXES)}")


def _rows(file: TextIO, path: Path, spec: TableSpec) -> Iterator[Row]:
    records = _json_records(file, path) if path.suffix.lower() == ".jsonl" else _csv_records(file, path)
    first = next(records, None)
    if first is None:
        return
    columns = _choose_columns(first[1], path, spec)
    for line, record in chain([first], records):
        yield _row(line, record, columns, path)


def _csv_records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(file, DIALECTS[path.suffix.lower()], strict=True)
    line = 1  # where the record begins: a quoted cell may go over many lines, an unbalanced one to the end of the file
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, path)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                found = f"{len(cells)} columns, the header has {len(header)}"
                raise ManifestError(f"{path}, line {line}: {found}; quote cells that hold the separator")
            if cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path}, line {line}: {error}; double the quotes inside a quoted cell") from None


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ManifestError(f"{path}, line 1: column {twice[0]!r} appears twice; rename one of them")


def _json_records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
            found = type(record).__name__
            raise ManifestError(
                f"{path}, line {line}: expected a JSON object, found {found}; write one object on each line"
            )
        yield line, record


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        raise ValueError("a name appears twice")
    return record


def _choose_columns(record: Mapping[str, Any], path: Path, spec: TableSpec) -> dict[str, str]:
    """Role -> column name. The first record of JSON lines decides what is there."""
    names = [name if name.isprintable() else repr(name) for name in record]
    required = [*spec.require, *([spec.split] if spec.split else [])]
    for name in required:
        if name not in record:
            found = ", ".join(names) or "none"
            raise ManifestError(f"{path}: no column {name!r}; columns found: {found}{nearest(name, names)}")
    language = next((name for name in LANGUAGE_COLUMNS if name in record), "lang")
    return {
        "image": "image",
        "caption": "caption",
        "split": spec.split or "split",
        "language": language,
        "label": "label",
    }


def _row(line: int, record: Mapping[str, Any], columns: Mapping[str, str], path: Path) -> Row:
    image = _text(record.get(columns["image"]), line, "image", path)
    if not image.strip():
        raise ManifestError(f"{path}, line {line}: the image column is empty; every row needs the path of its image")
    captions = record.get(columns["caption"])
    texts = captions if isinstance(captions, list) else [] if captions is None else [captions]
    return Row(
        line,
        image,
        tuple(_text(text, line, "caption", path) for text in texts),
        _text(record.get(columns["split"]), line, "split", path),
        _text(record.get(columns["language"]), line, "language", path),
        _text(record.get(columns["label"]), line, "label", path),
    )


def _text(value: Any, line: int, column: str, path: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | dict | list):
        raise ManifestError(f"{path}, line {line}: {column} is a {type(value).__name__}; expected text")
    return str(value)


def _place(path: Path, error: UnicodeDecodeError) -> str:
    """The line of the first byte that is not UTF-8 (the codec's own offset counts from the start of its buffer)."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as inner:
                return f"line {line}, byte {inner.start + 1}"
    return str(error.reason)
