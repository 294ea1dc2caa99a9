"""Choose the columns of a table, and turn its records into `TableRow`s.

Text tables, Parquet and Hugging Face data sets share these rules.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apecache.data.pairs import SourceFields, TableRow
from apecache.data.spec import OpenSpec, Role, refuse_url
from apecache.errors import ManifestError, nearest

IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path", "path", "filename")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "sentence")
LANGUAGE_COLUMNS = ("lang", "language")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Name the column of each role; None means that the table has no such column."""

    image: str
    caption: str | None
    split: str | None
    language: str | None
    label: str | None

    @property
    def names(self) -> list[str]:
        """Return the names of all columns except the image's."""
        optional_names = (self.caption, self.split, self.language, self.label)
        return [name for name in optional_names if name is not None]


def source_fields(columns: Columns, names: Iterable[str]) -> SourceFields:
    """Return the roles of a table's columns, and the columns without a role."""
    used_names = {columns.image, *columns.names}
    return SourceFields(
        image=columns.image,
        caption=columns.caption,
        split=columns.split,
        label=columns.label,
        language=columns.language,
        unused=tuple(name for name in names if name not in used_names),
    )


def choose_columns(names: Sequence[str], location: object, spec: OpenSpec) -> Columns:
    """Choose the column of each role.

    A column that the spec names comes first, then the exact names `image` and `caption`, then the
    only candidate.

    Args:
        names: Names of all columns.
        location: The table, for error messages.
        spec: What the user asked for.

    Raises:
        ManifestError: A column is missing, or several columns could be meant.
    """
    image = _choose(
        "image",
        requested=spec.image_column,
        candidates=IMAGE_COLUMNS,
        names=names,
        location=location,
    )
    captions = [name for name in CAPTION_COLUMNS if name != image]
    caption = _choose(
        "caption",
        requested=spec.caption_column,
        candidates=captions,
        names=names,
        location=location,
        must="caption" in spec.require,
    )
    if "label" in spec.require and "label" not in names:
        raise ManifestError(_no_column("label", names, location))
    if spec.split_column is not None and spec.split_column not in names:
        raise ManifestError(_no_column(spec.split_column, names, location))
    default_split = "split" if "split" in names and not spec.resplits else None
    split = spec.split_column or default_split
    language = next((name for name in LANGUAGE_COLUMNS if name in names), None)
    # `_choose` returns None only for a column that may be missing.
    assert image is not None
    return Columns(
        image=image,
        caption=caption,
        split=split,
        language=language,
        label="label" if "label" in names else None,
    )


def _choose(
    role: Role,
    requested: str | None,
    candidates: Sequence[str],
    names: Sequence[str],
    location: object,
    must: bool = True,
) -> str | None:
    """Choose the column of one role; None if there is no candidate and it is not a `must`."""
    if requested is not None and requested not in names:
        raise ManifestError(_no_column(requested, names, location))
    present_names = [name for name in candidates if name in names]
    if requested is not None or role in present_names:
        return requested or role
    if len(present_names) > 1:
        either = " and ".join(map(repr, present_names))
        raise ManifestError(
            f"{location}: columns {either} could each be the {role}; choose with --{role}-column"
        )
    if must and not present_names:
        raise ManifestError(
            f"{_no_column(role, names, location)}; name another one with --{role}-column"
        )
    return present_names[0] if present_names else None


def _no_column(name: str, names: Sequence[str], location: object) -> str:
    # A name with control characters would break the line of the message.
    shown = [name if name.isprintable() else repr(name) for name in names]
    return (
        f"{location}: no column {name!r}; columns found: "
        f"{', '.join(shown) or 'none'}{nearest(name, shown)}"
    )


def to_row(line: int, record: Mapping[str, Any], columns: Columns, where: object) -> TableRow:
    """Convert one record to a `TableRow`; its caption may be a list of captions.

    Args:
        line: 1-based number of the record.
        record: Values by column name.
        columns: The columns to read.
        where: The table, for error messages.

    Raises:
        ManifestError: The image is missing or is a URL, or a value is not text.
    """
    location = f"{where}, line {line}"
    image = to_text(record.get(columns.image), location, "image")
    if not image.strip():
        raise ManifestError(
            f"{location}: the image column is empty; every row needs the path of its image"
        )
    refuse_url(image, location)
    captions = to_captions(record.get(columns.caption) if columns.caption else None, location)
    return TableRow(
        line=line,
        image=image,
        captions=captions,
        split=_optional_text(record, columns.split, role="split", location=location),
        language=_optional_text(record, columns.language, role="language", location=location),
        label=_optional_text(record, columns.label, role="label", location=location),
    )


def _optional_text(
    record: Mapping[str, Any],
    column: str | None,
    role: str,
    location: str,
) -> str:
    return to_text(record.get(column), location, role) if column else ""


def to_captions(value: object, location: str) -> tuple[str, ...]:
    """Return the captions of a value: a list of them, one, or None for no caption."""
    if isinstance(value, list):
        texts = value
    elif value is None:
        texts = []
    else:
        texts = [value]
    return tuple(to_text(text, location, "caption") for text in texts)


def to_text(value: object, location: str, role: str) -> str:
    """Return a value as text; None becomes the empty text.

    Raises:
        ManifestError: The value is neither text nor a number.
    """
    if value is None:
        return ""
    # Numbers are accepted as text. A bool counts as an int in Python, but is no text here.
    if isinstance(value, bool | dict | list | bytes):
        raise ManifestError(f"{location}: {role} is a {type(value).__name__}; expected text")
    return str(value)


def image_keys(
    paths: Sequence[str | None],
    numbers: Sequence[str],
    digest: Callable[[int], str],
) -> Sequence[str]:
    """Choose the keys of images whose bytes are stored in a table.

    Args:
        paths: Path of each row's image, if the row has one.
        numbers: Keys by row number, used unless every row has a path and no path has two images.
        digest: Content hash of a row's image; called only where a path is repeated, because it
            reads the image.
    """
    first: dict[str, int] = {}
    digests: dict[int, str] = {}
    for row, path in enumerate(paths):
        if not path:
            return numbers
        # One path for two images of equal content is fine: they share a key.
        other = first.setdefault(path, row)
        if other != row and digests.setdefault(other, digest(other)) != digest(row):
            return numbers
    return [path or "" for path in paths]
