"""Read records of JSON: an object on each line, or a list of objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apecache.data.text_files import open_text
from apecache.errors import ManifestError

Record = tuple[int, dict[str, Any]]


def json_records(path: Path) -> tuple[list[str], list[Record]]:
    """Return the names of all fields, in the order of their appearance, and (1-based line, values).

    A field that only some objects have counts for all of them.

    Raises:
        ManifestError: A line is not a JSON object, or has a name twice.
    """
    return with_names(list(_lines(path)))


def with_names(records: list[Record]) -> tuple[list[str], list[Record]]:
    """Return the union of the records' fields, and the records."""
    names: dict[str, None] = {}
    for _, record in records:
        names |= dict.fromkeys(record)
    return list(names), records


def _lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ManifestError(
                    f"{path}, line {line}: not a JSON object ({error}); write one object on each "
                    "line"
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
