"""Which column is what, and one record of a table as a `Row`: the same for text tables, Parquet and
data sets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apecache.data.pairs import Row, SourceFields
from apecache.data.spec import OpenSpec, Role, refuse_url
from apecache.errors import ManifestError, nearest

IMAGE_COLUMNS = ("image", "filepath", "file_name", "image_path", "path", "filename")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "sentence")
LANGUAGE_COLUMNS = ("lang", "language")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; None: there is none."""

    image: str
    caption: str | None
    split: str | None
    language: str | None
    label: str | None

    @property
    def names(self) -> list[str]:
        """All but the image's."""
        return [
            name
            for name in (self.caption, self.split, self.language, self.label)
            if name is not None
        ]


def source_fields(columns: Columns, names: Iterable[str]) -> SourceFields:
    """What became of the columns of a table that has these names."""
    taken = {columns.image, *columns.names}
    return SourceFields(
        image=columns.image,
        caption=columns.caption,
        split=columns.split,
        label=columns.label,
        language=columns.language,
        unused=tuple(name for name in names if name not in taken),
    )


def choose_columns(names: Sequence[str], where: object, spec: OpenSpec) -> Columns:
    """The columns that the spec names; of the others the exact names `image` and `caption`, or the
    one candidate.

    Raises:
        ManifestError: a column is missing, or several could be meant.
    """
    image = _choose(
        "image",
        given=spec.image_column,
        candidates=IMAGE_COLUMNS,
        names=names,
        where=where,
    )
    captions = [name for name in CAPTION_COLUMNS if name != image]
    caption = _choose(
        "caption",
        given=spec.caption_column,
        candidates=captions,
        names=names,
        where=where,
        must="caption" in spec.require,
    )
    if "label" in spec.require and "label" not in names:
        raise ManifestError(_no_column("label", names, where))
    if spec.split_column is not None and spec.split_column not in names:
        raise ManifestError(_no_column(spec.split_column, names, where))
    split = spec.split_column or ("split" if "split" in names and not spec.resplits else None)
    language = next((name for name in LANGUAGE_COLUMNS if name in names), None)
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
    given: str | None,
    candidates: Sequence[str],
    names: Sequence[str],
    where: object,
    must: bool = True,
) -> str | None:
    if given is not None and given not in names:
        raise ManifestError(_no_column(given, names, where))
    found = [name for name in candidates if name in names]
    if given is not None or role in found:
        return given or role
    if len(found) > 1:
        either = " and ".join(map(repr, found))
        raise ManifestError(
            f"{where}: columns {either} could each be the {role}; choose with --{role}-column"
        )
    if must and not found:
        raise ManifestError(
            f"{_no_column(role, names, where)}; name another one with --{role}-column"
        )
    return found[0] if found else None


def _no_column(name: str, names: Sequence[str], where: object) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names]
    return (
        f"{where}: no column {name!r}; columns found: "
        f"{', '.join(shown) or 'none'}{nearest(name, shown)}"
    )


def to_row(line: int, record: Mapping[str, Any], columns: Columns, where: object) -> Row:
    """One record; captions may be a list.

    Raises:
        ManifestError: no image, an image that is a URL, or a value that is no text.
    """
    place = f"{where}, line {line}"
    image = to_text(record.get(columns.image), place, "image")
    if not image.strip():
        raise ManifestError(
            f"{place}: the image column is empty; every row needs the path of its image"
        )
    refuse_url(image, place)
    captions = to_captions(record.get(columns.caption) if columns.caption else None, place)
    split, language, label = (
        to_text(record.get(name), place, role) if name else ""
        for role, name in (
            ("split", columns.split),
            ("language", columns.language),
            ("label", columns.label),
        )
    )
    return Row(
        line=line,
        image=image,
        captions=captions,
        split=split,
        language=language,
        label=label,
    )


def to_captions(value: Any, place: str) -> tuple[str, ...]:
    if isinstance(value, list):
        texts = value
    elif value is None:
        texts = []
    else:
        texts = [value]
    return tuple(to_text(text, place, "caption") for text in texts)


def to_text(value: Any, place: str, role: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | dict | list | bytes):
        raise ManifestError(f"{place}: {role} is a {type(value).__name__}; expected text")
    return str(value)


def image_keys(
    paths: Sequence[str | None],
    numbers: Sequence[str],
    digest: Callable[[int], str],
) -> Sequence[str]:
    """Keys of images whose bytes stand in a table: their paths if each has one and none stands for
    two images, else `numbers`. `digest` of a row's bytes is asked for only where a path is
    repeated."""
    first: dict[str, int] = {}
    digests: dict[int, str] = {}
    for row, path in enumerate(paths):
        if not path:
            return numbers
        other = first.setdefault(path, row)
        if other != row and digests.setdefault(other, digest(other)) != digest(row):
            return numbers
    return [path or "" for path in paths]
