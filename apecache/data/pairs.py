"""Pairs of images and captions: one image with all its captions, its split and its label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from apecache.data.media import Media, NoMedia
from apecache.errors import ManifestError
from apecache.fingerprint import digest_strings

NO_SPLIT = ""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """`key` is the user's name of the image. `captions` and `languages` have one entry per
    caption."""

    key: str
    captions: tuple[str, ...]
    languages: tuple[str, ...]
    split: str = NO_SPLIT
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceFields:
    """Where a source's images, captions, splits, labels and languages stand; None: nowhere.

    They are names of columns or fields, or words for what is not named (`file`, `folder`).
    `unused`: columns that were not taken as anything.
    """

    image: str | None = None
    caption: str | None = None
    split: str | None = None
    label: str | None = None
    language: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def taken(self) -> dict[str, str]:
        """Of each role that is filled, the field."""
        roles = {
            "image": self.image,
            "caption": self.caption,
            "split": self.split,
            "label": self.label,
            "language": self.language,
        }
        return {role: name for role, name in roles.items() if name is not None}

    def __str__(self) -> str:
        taken = ", ".join(f"{role}={name}" for role, name in self.taken.items())
        return f"columns: {taken}; not used: {', '.join(self.unused) or 'none'}"


@dataclass(frozen=True)
class PairSource:
    """Ordered, sized, hashable: the same table gives the same `digest`, wherever it lies.

    Rows of images are numbered in the order of their first appearance; captions (texts) in the
    order image by image. `origin` is how the source was named, `media` where its images' bytes come
    from, `fields` which columns were taken as what; none of them is part of its identity.
    """

    pairs: tuple[Pair, ...]
    origin: str = field(default="", compare=False)
    media: Media = field(default=NoMedia(), compare=False)
    fields: SourceFields = field(default=SourceFields(), compare=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def part(self, start: int, stop: int | None = None) -> "PairSource":
        """The pairs of these rows, from the same place."""
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
        """For every caption the row of its image."""
        return [row for row, pair in enumerate(self.pairs) for _ in pair.captions]

    @cached_property
    def digest(self) -> str:
        """Identity of keys, captions, languages, splits and labels, in order."""
        return digest_strings(
            part
            for pair in self.pairs
            for part in (
                pair.key,
                pair.split,
                pair.label,
                str(len(pair.captions)),
                *pair.captions,
                *pair.languages,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table before rows of one image are joined; `line` is 1-based."""

    line: int
    image: str
    captions: tuple[str, ...]
    split: str
    language: str
    label: str


def join_rows(rows: Sequence[Row], where: str) -> tuple[Pair, ...]:
    """Group rows by image, keeping the order of first appearance.

    Raises:
        ManifestError: one image in two splits or with two labels.
    """
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.image, []).append(row)
    return tuple(_pair(key, group, where) for key, group in grouped.items())


def _pair(key: str, rows: list[Row], where: str) -> Pair:
    first = rows[0]
    for row in rows[1:]:
        for what, here, there in (
            ("split", row.split, first.split),
            ("label", row.label, first.label),
        ):
            if here != there:
                raise ManifestError(
                    f"{where}, line {row.line}: image {key!r} has {what} {here!r} here and "
                    f"{there!r} on line "
                    f"{first.line}; give one {what} per image"
                )
    captions = tuple(caption for row in rows for caption in row.captions)
    languages = tuple(row.language for row in rows for _ in row.captions)
    return Pair(
        key=key,
        captions=captions,
        languages=languages,
        split=first.split,
        label=first.label,
    )
