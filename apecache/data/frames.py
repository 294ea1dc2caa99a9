"""Open a frame of pandas or Polars, or a table of Arrow, that is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apecache.data.columns import choose_columns, source_fields, to_row
from apecache.data.media import Media, check_bytes, media_below
from apecache.data.pairs import PairSource, source_of_rows
from apecache.data.spec import COLUMN_OPTIONS, FILE_OPTIONS, OpenSpec, require_only
from apecache.errors import ManifestError, RowError

LIBRARIES = ("pandas", "polars", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class MemoryMedia:
    """Read images that are in memory."""

    images: Mapping[str, bytes]
    place: str = "memory"

    def read(self, key: str) -> bytes:
        if key not in self.images:
            raise RowError("missing", f"{key}: its row has no image")
        check_bytes(len(self.images[key]), key)
        return self.images[key]

    def exists(self, key: str) -> bool:
        return key in self.images

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [len(self.images[key]) if key in self.images else None for key in keys]


def is_frame(value: object) -> bool:
    """Return whether a value is a frame; the libraries of frames are not imported."""
    library = type(value).__module__.partition(".")[0]
    return library in LIBRARIES and type(value).__name__ in ("DataFrame", "Table", "LazyFrame")


def open_frame(frame: Any, spec: OpenSpec) -> PairSource:
    """Open a frame whose images are paths, bytes, or dictionaries of bytes and path.

    Paths are relative to `spec.root`, or to the working folder.

    Raises:
        ManifestError: The frame has no rows, or a column is missing or ambiguous.
    """
    records = _records(frame)
    origin = f"a frame of {type(frame).__module__.partition('.')[0]}"
    if not records:
        raise ManifestError(f"{origin}: no rows; expected a row for every caption")
    columns = choose_columns(list(records[0]), origin, spec)
    images: dict[str, bytes] = {}
    rows = []
    for number, record in enumerate(records):
        image = record[columns.image]
        if isinstance(image, Mapping):
            key = image.get("path") or str(number)
            content = image.get("bytes")
        else:
            is_bytes = isinstance(image, bytes)
            key = str(number) if is_bytes else image
            content = image if is_bytes else None
        if content is not None:
            # Two images of one path need two keys.
            key = key if images.setdefault(key, content) == content else str(number)
            images[key] = content
        named = {**record, columns.image: key}
        rows.append(to_row(number + 1, record=named, columns=columns, where=origin))
    media: Media = MemoryMedia(images=images)
    if images:
        require_only(spec, origin, *COLUMN_OPTIONS)
    else:
        require_only(spec, origin, *COLUMN_OPTIONS, *FILE_OPTIONS)
        media = media_below(spec.root or Path.cwd(), spec.allow_root)
    fields = source_fields(columns, list(records[0]))
    return source_of_rows(rows, origin=origin, media=media, fields=fields)


def _records(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a frame; missing values of any kind become None."""
    match type(frame).__module__.partition(".")[0], type(frame).__name__:
        case "pandas", _:
            object_frame = frame.astype(object)
            records = object_frame.where(frame.notna(), None).to_dict("records")
        case "polars", "LazyFrame":
            records = frame.collect().to_dicts()
        case "polars", _:
            records = frame.to_dicts()
        case _:
            records = frame.to_pylist()
    return [{str(name): _plain(value) for name, value in record.items()} for record in records]


def _plain(value: Any) -> Any:
    """Return a NumPy value, which pandas keeps in lists and cells, as one of Python."""
    is_numpy = type(value).__module__ == "numpy"
    return value.tolist() if is_numpy else value
