"""Choose the columns of a table, and turn its records into `TableRow`s.

Text tables, Parquet, JSON and Hugging Face data sets share these rules.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from string import Formatter
from typing import Any

from apecache.data.further_columns import requested_columns
from apecache.data.pairs import SourceFields, TableRow
from apecache.data.spec import COLUMN_FLAGS, OpenSpec, Role, refuse_url
from apecache.errors import ManifestError, OptionError, nearest

IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path", "path", "filename")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "sentence")
LANGUAGE_COLUMNS = ("lang", "language")
LABEL_COLUMNS = ("label", "fine_label")
RARE_IMAGE_COLUMNS = ("image_name", "img", "img_path", "image_file", "images", "jpg", "png", "webp")
RARE_CAPTION_COLUMNS = ("comment", "sentences", "raw", "description", "alt_text")
"""Names that are taken only where none of the others is present."""
NUMBERED_CAPTION = re.compile(
    r"(caption|title|text|sentence|comment|description)s?[ _-]?(\d+)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Name the column of each role; None means that the table has no such column."""

    image: str
    captions: tuple[str, ...] = ()
    template: str | None = None
    """Caption made of the columns that it names in braces, in place of `captions`."""
    key: str | None = None
    split: str | None = None
    language: str | None = None
    label: str | None = None
    further: tuple[str, ...] = ()
    """Further columns."""

    @property
    def names(self) -> list[str]:
        """Return the names of all columns except the image's."""
        optional_names = (self.key, self.split, self.language, self.label)
        named = [name for name in optional_names if name is not None]
        # A column may have two roles, and is read once.
        all_names = dict.fromkeys(
            [*self.captions, *template_names(self.template), *named, *self.further]
        )
        return [name for name in all_names if name != self.image]


def source_fields(columns: Columns, names: Iterable[str]) -> SourceFields:
    """Return the roles of a table's columns, and the columns without a role."""
    used_names = {columns.image, *columns.names}
    return SourceFields(
        image=columns.image,
        caption=columns.template or ", ".join(columns.captions) or None,
        key=columns.key,
        split=columns.split,
        label=columns.label,
        language=columns.language,
        unused=tuple(name for name in names if name not in used_names),
        further=columns.further,
        columns=tuple(names),
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
    for option, flag in COLUMN_FLAGS.items():
        requested = getattr(spec, option)
        if option in ("label_column", "key_column", "split_column") and requested is not None:
            _require_column(requested, flag, names=names, location=location)
    further = requested_columns(spec)
    for name in further:
        _require_column(name, "--column", names=names, location=location)
    image = _choose(
        "image",
        requested=spec.image_column,
        candidates=(IMAGE_COLUMNS, RARE_IMAGE_COLUMNS),
        names=names,
        location=location,
    )
    # `_choose` returns None only for a column that may be missing.
    assert image is not None
    # Labels are optional, unless the command needs them.
    label = spec.label_column or _first(LABEL_COLUMNS, names)
    if "label" in spec.require and label is None:
        raise ManifestError(
            f"{_no_column('label', names, location)}; name another one with --label-column"
        )
    default_split = _first(("split",), names) if not spec.resplits else None
    return Columns(
        image=image,
        captions=_caption_columns(names, image=image, location=location, spec=spec),
        template=_template(names, location, spec),
        key=spec.key_column,
        split=spec.split_column or default_split,
        language=_first(LANGUAGE_COLUMNS, names),
        label=label,
        further=further,
    )


def has_image_column(names: Sequence[str], spec: OpenSpec) -> bool:
    """Return whether the names of a table's columns include one of images."""
    if spec.image_column is not None:
        return spec.image_column in names
    return _first((*IMAGE_COLUMNS, *RARE_IMAGE_COLUMNS), names) is not None


def _caption_columns(
    names: Sequence[str],
    image: str,
    location: object,
    spec: OpenSpec,
) -> tuple[str, ...]:
    """Return the columns of captions.

    They are those that the user names, the only candidate, or a numbered series.
    """
    if spec.caption_template is not None:
        return ()
    if spec.caption_column is not None:
        requested = spec.caption_column
        patterns = (requested,) if isinstance(requested, str) else requested
        matched_columns: dict[str, None] = {}
        for pattern in patterns:
            matches = [name for name in names if fnmatchcase(name, pattern)]
            # A name may hold a star or brackets itself.
            if pattern in names:
                matches = [pattern]
            if not matches:
                _require_column(pattern, "--caption-column", names=names, location=location)
            matched_columns |= dict.fromkeys(matches)
        return tuple(matched_columns)
    other_columns = [name for name in names if name != image]
    series = _numbered(other_columns)
    caption = _choose(
        "caption",
        requested=None,
        candidates=(CAPTION_COLUMNS, RARE_CAPTION_COLUMNS),
        names=names,
        location=location,
        taken_column=image,
        must="caption" in spec.require and not series,
    )
    return series if caption is None else (caption,)


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns `caption_0`, `caption_1`, … in the order of their numbers.

    Empty if there are none, or if two series are numbered.
    """
    numbers: dict[str, dict[int, str]] = {}
    for name in names:
        match = NUMBERED_CAPTION.fullmatch(name.strip())
        if match:
            numbers.setdefault(match[1].lower(), {})[int(match[2])] = name
    # Two series are two kinds of captions: the user says which.
    if len(numbers) != 1:
        return ()
    (series,) = numbers.values()
    return tuple(series[number] for number in sorted(series))


def template_names(template: str | None) -> list[str]:
    """Return the columns that a template names.

    Raises:
        OptionError: The braces are not balanced, or hold more than a name.
    """
    if template is None:
        return []
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise OptionError(
            f"--caption-template {template}: {error}; expected columns in braces, like "
            "'{title}. {description}'"
        ) from None
    # Attributes and indices would reach into objects: `{title.__class__}`.
    if not fields or any(not field or set(field) & set(".[]") for field in fields):
        raise OptionError(
            f"--caption-template {template}: expected names of columns in braces, like "
            "'{title}. {description}'"
        )
    return list(dict.fromkeys(fields))


def _template(names: Sequence[str], location: object, spec: OpenSpec) -> str | None:
    if spec.caption_template is not None and spec.caption_column is not None:
        raise OptionError(
            "--caption-template and --caption-column exclude each other: leave one out"
        )
    for name in template_names(spec.caption_template):
        _require_column(name, "--caption-template", names=names, location=location)
    return spec.caption_template


def _first(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next(iter(_present(candidates, names)), None)


def _present(candidates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns with these names, also where only the case of their letters differs."""
    by_letters = {name.strip().lower(): name for name in reversed(names)}
    # The exact name goes before one that differs in case.
    by_letters |= {name: name for name in names}
    return [by_letters[name] for name in candidates if name in by_letters]


def _choose(
    role: Role,
    requested: str | None,
    candidates: Sequence[Sequence[str]],
    names: Sequence[str],
    location: object,
    must: bool = True,
    taken_column: str | None = None,
) -> str | None:
    """Choose the column of one role; None if there is no candidate and it is not a `must`.

    Args:
        role: The role.
        requested: Column that the user names.
        candidates: Names to look for; later groups count only if none of an earlier one is there.
        names: Names of all columns.
        location: The table, for error messages.
        must: Whether the column may not be missing.
        taken_column: Column that has another role already.
    """
    if requested is not None:
        _require_column(requested, f"--{role}-column", names=names, location=location)
        return requested
    # Rare names count only where no usual one is there.
    for group in candidates:
        present_names = [name for name in _present(group, names) if name != taken_column]
        if present_names and (present_names[0].strip().lower() == role or len(present_names) == 1):
            return present_names[0]
        if present_names:
            either = " and ".join(map(repr, present_names))
            raise ManifestError(
                f"{location}: columns {either} could each be the {role}; choose with "
                f"--{role}-column"
            )
    if must:
        raise ManifestError(
            f"{_no_column(role, names, location)}; name another one with --{role}-column"
        )
    return None


def _require_column(name: str, flag: str, names: Sequence[str], location: object) -> None:
    if name not in names:
        raise ManifestError(f"{_no_column(name, names, location)}; {flag} takes one of them")


def _no_column(name: str, names: Sequence[str], location: object) -> str:
    # A name with control characters would break the line of the message.
    shown = [name if name.isprintable() else repr(name) for name in names]
    return (
        f"{location}: no column {name!r}; columns found: "
        f"{', '.join(shown) or 'none'}{nearest(name, shown)}"
    )


def to_row(line: int, record: Mapping[str, Any], columns: Columns, where: object) -> TableRow:
    """Convert one record to a `TableRow`; its caption may be a list of captions.

    A record without an image keeps its row, which is quarantined when its image is read.

    Args:
        line: 1-based number of the record.
        record: Values by column name.
        columns: The columns to read.
        where: The table, for error messages.

    Raises:
        ManifestError: The image is a URL, or a value is not text.
    """
    location = f"{where}, line {line}"
    image = to_text(record.get(columns.image), location, "image")
    # The row stays, and is reported when it is encoded: other rows are not lost.
    if not image.strip():
        image = f"(no image on line {line})"
    refuse_url(image, location)
    key = _optional_text(record, columns.key, role="key", location=location)
    if columns.key is not None and not key.strip():
        key = f"(no {columns.key} on line {line})"
    captions: list[str] = []
    for name in columns.captions:
        captions += to_captions(record.get(name), location)
    if columns.template is not None:
        captions += fill_template(columns.template, record, location)
    return TableRow(
        line=line,
        image=image,
        key=key,
        captions=tuple(captions),
        split=_optional_text(record, columns.split, role="split", location=location),
        language=_optional_text(record, columns.language, role="language", location=location),
        label=_optional_text(record, columns.label, role="label", location=location),
        further=tuple(to_text(record.get(name), location, name) for name in columns.further),
    )


def fill_template(template: str, record: Mapping[str, Any], location: str) -> tuple[str, ...]:
    """Return the caption of a template; none if all its columns are empty."""
    values: dict[str, str] = {}
    for name in template_names(template):
        values[name] = to_text(record.get(name), location, "caption")
    # Words of the template alone describe no image.
    if not any(value.strip() for value in values.values()):
        return ()
    return (template.format(**values).strip(),)


def _optional_text(
    record: Mapping[str, Any],
    column: str | None,
    role: str,
    location: str,
) -> str:
    return to_text(record.get(column), location, role) if column else ""


def to_captions(value: object, location: str) -> tuple[str, ...]:
    """Return the captions of a value: one, or a list of them. Empty captions are missing ones."""
    texts = value if isinstance(value, list | tuple) else [value]
    captions = [to_text(text, location, "caption") for text in texts]
    return tuple(caption for caption in captions if caption)


def to_text(value: object, location: str, role: str) -> str:
    """Return a value as text; None and NaN, which pandas writes for it, become the empty text.

    Raises:
        ManifestError: The value is neither text nor a number.
    """
    if value is None:
        return ""
    # Numbers are accepted as text. A bool counts as an int in Python, but is no text here.
    if isinstance(value, bool | dict | list | bytes):
        raise ManifestError(f"{location}: {role} is a {type(value).__name__}; expected text")
    if isinstance(value, float):
        # A column of integers with gaps is one of floats to pandas: 3.0 is the class 3.
        is_class = role != "caption" and value.is_integer()
        return "" if math.isnan(value) else str(int(value) if is_class else value)
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


def with_class_label(
    spec: OpenSpec,
    names: Sequence[str],
    class_columns: Sequence[str],
) -> OpenSpec:
    """Return the spec with the only column of class labels as its column of labels.

    It stays as it is where the user or the name of a column says which one it is.
    """
    is_known = spec.label_column is not None or _first(LABEL_COLUMNS, names) is not None
    if is_known or len(class_columns) != 1:
        return spec
    return replace(spec, label_column=class_columns[0])


def with_only_image(
    spec: OpenSpec,
    image_columns: Sequence[str],
) -> OpenSpec:
    """Return the spec with the only column that holds images as its column of images."""
    # A column that is called `image` is found without help.
    if spec.image_column is not None or "image" in image_columns or len(image_columns) != 1:
        return spec
    return replace(spec, image_column=image_columns[0])
