"""Read tables of text whose cells are separated by a character, such as CSV and TSV.

The first lines show the separator, and whether there is a header. CSV has quoted cells. Other
tables have them only where every quote is one that a CSV writer makes: programs that join cells
with tabs leave quotes in captions as they are.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from apecache.data.columns import has_image_column
from apecache.data.images import SUFFIXES
from apecache.data.spec import OpenSpec, kind_of
from apecache.data.text_files import open_text
from apecache.errors import ManifestError, OptionError, counted

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
QUOTED_SEPARATORS = (",", ";")
"""Separators of tables that have quoted cells by default."""
SNIFFED_LINES = 20
MAX_CELL = 1 << 30
CAPTION_NUMBER = re.compile(r"#\d+$")
"""Ends the image's name in Flickr8k.token.txt: `1000268201.jpg#0`."""
NUMBER_AND_CAPTION = re.compile(r"\s*(\d+)\s+(.*)", re.DOTALL)
"""Two cells of Flickr30k's results.csv that one line of it joins."""
PAIR_HEADER = ("image", "caption")
NO_LINE_BREAKS = (
    "one line is one row; for cells with line breaks save the table as .csv, or add --quoting csv"
)

Record = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """Say how the cells of a table are written."""

    separator: str
    header: tuple[str, ...] | None
    """Names of the columns where the file has none: image and caption."""
    padded: bool
    """Whether a space follows each separator."""


def sniff(lines: Sequence[str], path: Path, spec: OpenSpec) -> TableFormat:
    """Recognize the format of a table by its first lines.

    The separator is the usual one of the file's ending, unless another one gives a header with a
    column of images, or more than one column.
    """
    usual = "\t" if kind_of(path) == ".tsv" else ","
    # The separator of the file's ending wins where two are possible.
    order = [usual, *(separator for separator in SEPARATORS if separator != usual)]
    candidates = order if spec.separator is None else [parse_separator(spec.separator)]
    headers = {separator: _header(lines, separator) for separator in candidates}
    for separator, names in headers.items():
        if has_image_column(names, spec):
            return _format(separator, lines)
    # Without a header: Flickr's token file names an image in every line.
    for separator in candidates:
        if all(_names_image(line, separator) for line in lines) and lines:
            return TableFormat(separator=separator, header=PAIR_HEADER, padded=False)
    several = [separator for separator in candidates if len(headers[separator]) > 1]
    return _format((several or candidates)[0], lines)


def is_table(lines: Sequence[str], path: Path, spec: OpenSpec) -> bool:
    """Return whether the first lines of a text file are those of a table with images."""
    table_format = sniff(lines, path, spec)
    if table_format.header is not None:
        return True
    names = _header(lines, table_format.separator)
    return len(names) > 1 and has_image_column(names, spec)


def first_lines(path: Path) -> list[str]:
    """Return the first lines of a file that are not blank, without their ends."""
    with open_text(path) as file:
        lines = (line.rstrip("\r\n") for line in file)
        return list(islice((line for line in lines if line.strip()), SNIFFED_LINES))


def parse_separator(text: str) -> str:
    """Return the character that `--separator` names.

    Raises:
        OptionError: It is not one character.
    """
    named = {name: separator for separator, name in SEPARATORS.items()} | {"\\t": "\t"}
    separator = named.get(text, text)
    if len(separator) != 1 or separator in '"\r\n':
        raise OptionError(
            f"--separator {text!r}: expected one character, or {', '.join(SEPARATORS.values())}"
        )
    return separator


def _format(separator: str, lines: Sequence[str]) -> TableFormat:
    cells = lines[0].split(separator)[1:] if lines else []
    # Flickr30k's CSV has a space behind each separator, which belongs to no cell.
    padded = bool(cells) and all(cell.startswith(" ") for cell in cells)
    return TableFormat(separator=separator, header=None, padded=padded)


def _header(lines: Sequence[str], separator: str) -> list[str]:
    try:
        cells = next(csv.reader([line + "\n" for line in lines], delimiter=separator), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in cells]


def _names_image(line: str, separator: str) -> bool:
    """Return whether a line is a name of an image and one more cell."""
    name, separator_text, caption = line.partition(separator)
    is_pair = bool(separator_text) and (separator != "\t" or separator not in caption)
    return is_pair and CAPTION_NUMBER.sub("", name.strip('"')).lower().endswith(SUFFIXES)


def delimited_records(path: Path, spec: OpenSpec) -> tuple[list[str], Iterator[Record]]:
    """Return the names of the columns, and an iterator of (1-based line, cells by column).

    Raises:
        ManifestError: A row is ragged, a column is twice, or quotes are not balanced.
    """
    table_format = sniff(first_lines(path), path, spec)
    quoted = _is_quoted(path, table_format, spec)
    rows = (_quoted_rows if quoted else _plain_rows)(path, table_format)
    header = table_format.header
    if header is None:
        _, first_row = next(rows, (0, []))
        header = tuple(cell.strip() for cell in first_row)
        _check_header(header, path)
    return list(header), _records(rows, header, path, table_format)


def _is_quoted(path: Path, table_format: TableFormat, spec: OpenSpec) -> bool:
    if spec.quoting is not None:
        return spec.quoting == "csv"
    # Where quotes are not usual they may be part of a caption: all lines must agree.
    if table_format.separator in QUOTED_SEPARATORS:
        return True
    return _has_writers_quotes(path, table_format.separator)


def _has_writers_quotes(path: Path, separator: str) -> bool:
    """Return whether a table has quotes, and all of them are those that a CSV writer makes.

    A writer quotes the cells that need it, because they have quotes or separators, or all cells of
    a column.
    """
    needless: set[int] = set()
    unquoted_columns: set[int] = set()
    any_quoted = False
    width = 0
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(map(_without_end, file)):
            if not line:
                continue
            cells = _written_cells(line, separator)
            width = width or len(cells or ())
            if cells is None or len(cells) != width:
                return False
            for column, (value, is_quoted) in enumerate(cells):
                any_quoted |= is_quoted
                needs_quotes = bool(set(value) & {'"', "\r", separator})
                if is_quoted and not needs_quotes:
                    needless.add(column)
                elif value and not is_quoted and number:
                    unquoted_columns.add(column)
    return any_quoted and not needless & unquoted_columns


def _written_cells(line: str, separator: str) -> list[tuple[str, bool]] | None:
    """Return the value of each cell and whether it is quoted; None if no CSV writer wrote it."""
    if '"' not in line:
        return [(cell, False) for cell in line.split(separator)]
    try:
        values = next(csv.reader([line], delimiter=separator, strict=True))
    except (csv.Error, StopIteration):
        return None
    cells: list[tuple[str, bool]] = []
    written: list[str] = []
    for value in values:
        quoted = '"' + value.replace('"', '""') + '"'
        # The cells, written again, say where each one begins in the line.
        position = len(separator.join(written)) + bool(written)
        is_quoted = line.startswith(quoted, position)
        written.append(quoted if is_quoted else value)
        cells.append((value, is_quoted))
        # A writer would have quoted this cell: its quotes are those of a caption.
        if not is_quoted and '"' in value:
            return None
    return cells if separator.join(written) == line else None


def _quoted_rows(path: Path, table_format: TableFormat) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of each row of a table with quoted cells, which may have line breaks."""
    # The limit is that of the whole process: it is raised, and never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    # The line where a row begins: a quoted cell may have many lines.
    line = 1
    with open_text(path) as file:
        reader = csv.reader(
            file,
            delimiter=table_format.separator,
            skipinitialspace=table_format.padded,
            strict=True,
        )
        try:
            for cells in reader:
                if cells:
                    _refuse_swallowed(cells, path, line=line, separator=table_format.separator)
                    yield line, cells
                # A quoted cell may span lines: the next row begins after the last one read.
                line = reader.line_num + 1
        except csv.Error as error:
            raise ManifestError(
                f"{path}, line {line}: {error}; double the quotes inside a quoted cell, or add "
                "--quoting none if no cell is quoted"
            ) from None


def _refuse_swallowed(cells: Sequence[str], path: Path, line: int, separator: str) -> None:
    """Refuse a cell whose further lines are rows: it begins with a quote that was not meant to."""
    for cell in cells:
        for inner in cell.split("\n")[1:]:
            inner_cells = inner.split(separator)
            names = [text for text in inner_cells if text.strip().lower().endswith(SUFFIXES)]
            if len(inner_cells) > 1 and any(" " not in name for name in names):
                raise ManifestError(
                    f"{path}, line {line}: a quoted cell goes over rows such as {inner[:60]!r}; "
                    "double the quotes inside a quoted cell, or add --quoting none if no cell is "
                    "quoted"
                )


def _plain_rows(path: Path, table_format: TableFormat) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of each row of a table without quoted cells."""
    is_open = False
    has_images = False
    with open_text(path, newline="\n") as file:
        for line, text in enumerate(map(_without_end, file), 1):
            # Quotes are characters of the text here.
            cells = text.split(table_format.separator)
            names_image = any(cell.lower().endswith(SUFFIXES) for cell in cells)
            # After a quote without an end: a cell with a line break, or only a caption's quote?
            if is_open and has_images and text and not names_image:
                raise ManifestError(
                    f"{path}, line {line}: no image, after a quote without an end; {NO_LINE_BREAKS}"
                )
            is_open = any(cell.startswith('"') and cell.count('"') % 2 for cell in cells)
            has_images = has_images or names_image
            if table_format.padded:
                cells = [cell.removeprefix(" ") for cell in cells]
            if text:
                yield line, cells


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _records(
    rows: Iterator[tuple[int, list[str]]],
    header: tuple[str, ...],
    path: Path,
    table_format: TableFormat,
) -> Iterator[Record]:
    is_pair_list = table_format.header is not None
    for line, cells in rows:
        if is_pair_list:
            # Only the first separator counts: captions hold commas.
            name, *caption_cells = cells
            cells = [CAPTION_NUMBER.sub("", name), table_format.separator.join(caption_cells)]
        # A known fault of Flickr30k's file: number and caption without a separator between.
        joined = NUMBER_AND_CAPTION.fullmatch(cells[-1])
        if header[1:] == ("comment_number", "comment") and len(cells) == 2 and joined:
            cells = [cells[0], joined[1], joined[2]]
        if len(cells) != len(header):
            remedy = "quote cells that hold the separator, or name another --separator"
            if table_format.separator not in QUOTED_SEPARATORS:
                remedy = NO_LINE_BREAKS
            problem = f"{counted(len(cells), 'column')}, the header has {len(header)}"
            raise ManifestError(f"{path}, line {line}: {problem}; {remedy}")
        yield line, dict(zip(header, cells, strict=True))


def _check_header(header: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ManifestError(
            f"{path}, line 1: column {twice[0]!r} appears twice; rename one of them"
        )
