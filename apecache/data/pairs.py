"""Define pairs of images and captions: one image with all its captions, its split and its label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from apecache.data.media import Media, NoMedia, RenamedMedia
from apecache.data.pixels import PixelRules
from apecache.errors import ManifestError
from apecache.fingerprint import digest_strings

NO_SPLIT = ""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Hold one image with all its captions."""

    key: str
    """The user's name of the image."""
    captions: tuple[str, ...]
    languages: tuple[str, ...]
    """Language of each caption; empty if it is not given."""
    split: str = NO_SPLIT
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceFields:
    """Name the field that each role of a source was read from; None if the source has none.

    They are names of columns or fields, or words for what has no name (`file`, `folder`).
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    split: str | None = None
    label: str | None = None
    language: str | None = None
    unused: tuple[str, ...] = ()
    """Columns that have no role."""
    further: tuple[str, ...] = ()
    """Further columns that the rows carry."""
    columns: tuple[str, ...] = ()
    """All columns, by the names that ask for them as further ones."""

    @property
    def taken(self) -> dict[str, str]:
        """Return the field of each role that has one."""
        roles = {
            "image": self.image,
            "caption": self.caption,
            "key": self.key,
            "split": self.split,
            "label": self.label,
            "language": self.language,
        }
        return {role: name for role, name in roles.items() if name is not None}

    def __str__(self) -> str:
        used_fields = ", ".join(f"{role}={name}" for role, name in self.taken.items())
        return f"columns: {used_fields}; not used: {', '.join(self.unused) or 'none'}"


@dataclass(frozen=True)
class PairSource:
    """Hold the pairs of a source; the same table gives the same `digest`, wherever it is stored.

    Rows of images are numbered in the order of their first appearance, captions (texts) image by
    image. Fields that are not compared are not part of the source's identity, except for the scale
    of `pixels`: it changes what the images are.
    """

    pairs: tuple[Pair, ...]
    origin: str = field(default="", compare=False)
    """How the user named the source."""
    media: Media = field(default=NoMedia(), compare=False)
    """Reads the bytes of its images."""
    fields: SourceFields = field(default=SourceFields(), compare=False)
    """Which columns have which role."""
    skipped: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Number of files, members or values that were left out, by reason."""
    pixels: PixelRules = field(default=PixelRules(), compare=False)
    """How the files become pixels."""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Options that open the source again."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict, compare=False)
    """Further columns by name: the value of each image by its key; empty where there is none."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def part(self, start: int, stop: int | None = None) -> "PairSource":
        """Return the pairs of these rows as a source of their own."""
        return replace(self, pairs=self.pairs[start:stop])

    @cached_property
    def keys(self) -> list[str]:
        return [pair.key for pair in self.pairs]

    @cached_property
    def captions(self) -> list[str]:
        return [caption for pair in self.pairs for caption in pair.captions]

    @cached_property
    def languages(self) -> list[str]:
        return [language for pair in self.pairs for language in pair.languages]

    @cached_property
    def image_rows(self) -> list[int]:
        """Return the row of each caption's image."""
        return [row for row, pair in enumerate(self.pairs) for _ in pair.captions]

    @cached_property
    def digest(self) -> str:
        """Return the hash of keys, captions, languages, splits, labels and the scale, in order."""
        scale = self.pixels.scale
        scale_text = [] if scale is None else [f"scale {scale[0]:g},{scale[1]:g}"]
        return digest_strings(chain(scale_text, *map(_identity, self.pairs)))


def _identity(pair: Pair) -> tuple[str, ...]:
    # The number of captions keeps two pairs of different lengths from giving the same strings.
    n_captions = str(len(pair.captions))
    return (pair.key, pair.split, pair.label, n_captions, *pair.captions, *pair.languages)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Hold one row of a table, before the rows of one image are joined."""

    line: int
    """1-based number of the row."""
    image: str
    """Name of the image to the media."""
    captions: tuple[str, ...]
    split: str
    language: str
    label: str
    key: str = ""
    """Name of the image to the user; empty if it is that of the media."""
    further: tuple[str, ...] = ()
    """Values of the further columns, in the order of their names."""

    @property
    def name(self) -> str:
        """Return the name of the image to the user; rows of one name are joined."""
        return self.key or self.image


def source_of_rows(
    rows: Sequence[TableRow],
    origin: str,
    media: Media,
    fields: SourceFields,
) -> PairSource:
    """Join the rows of a table to a source.

    Raises:
        ManifestError: One image is in two splits, has two labels, values or files.
    """
    pairs = join_rows(rows, where=origin, further=fields.further)
    columns: dict[str, dict[str, str]] = {name: {} for name in fields.further}
    for row in rows:
        for name, value in zip(fields.further, row.further, strict=True):
            columns[name][row.name] = value
    image_of_key = {row.name: row.image for row in rows}
    if any(key != image for key, image in image_of_key.items()):
        media = RenamedMedia(media=media, names=image_of_key)
    without_captions = sum(not row.captions for row in rows)
    skipped = {}
    if fields.caption is not None and without_captions:
        skipped["rows without a caption"] = without_captions
    return PairSource(
        pairs,
        origin=origin,
        media=media,
        fields=fields,
        skipped=skipped,
        columns=columns,
    )


def join_rows(
    rows: Sequence[TableRow],
    where: str,
    further: Sequence[str] = (),
) -> tuple[Pair, ...]:
    """Group rows by key, keeping the order of first appearance.

    Args:
        rows: Rows of a table.
        where: The table, for error messages.
        further: Names of the further columns.

    Raises:
        ManifestError: One image is in two splits, has two labels, values or files.
    """
    grouped: dict[str, list[TableRow]] = {}
    for row in rows:
        grouped.setdefault(row.name, []).append(row)
    return tuple(
        _pair(key, rows=group, location=where, further=further) for key, group in grouped.items()
    )


def _pair(key: str, rows: list[TableRow], location: str, further: Sequence[str]) -> Pair:
    """Join the rows of one image."""
    # Captions may differ from row to row, but an image has one value of all else.
    first = rows[0]
    for row in rows[1:]:
        for field_name, row_value, first_value in (
            ("file", row.image, first.image),
            ("split", row.split, first.split),
            ("label", row.label, first.label),
            *zip(further, row.further, first.further, strict=True),
        ):
            if row_value != first_value:
                raise ManifestError(
                    f"{location}, line {row.line}: image {key!r} has {field_name} {row_value!r} "
                    f"here and {first_value!r} on line {first.line}; "
                    f"give one {field_name} per image"
                )
    captions: list[str] = []
    languages: list[str] = []
    for row in rows:
        captions += row.captions
        languages += [row.language] * len(row.captions)
    return Pair(
        key=key,
        captions=tuple(captions),
        languages=tuple(languages),
        split=first.split,
        label=first.label,
    )
