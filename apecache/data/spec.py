"""Hold what the user says about a source, where guessing is not enough to open it."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, Literal

from apecache.arguments import AnyPath
from apecache.data.pixels import PixelRules
from apecache.errors import ManifestError, OptionError
from apecache.fingerprint import Json

Role = Literal["image", "caption", "label"]

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""The split that each of these names of folders and files means."""

COMPRESSED_SUFFIXES = (".gz", ".zst")
NO_COLUMNS = "it has no columns"
COLUMN_FLAGS = {
    "image_column": "--image-column",
    "caption_column": "--caption-column",
    "split_column": "--split-column",
    "label_column": "--label-column",
    "key_column": "--key-column",
    "caption_template": "--caption-template",
    "columns": "--column",
}
COLUMN_OPTIONS = tuple(COLUMN_FLAGS)
TEXT_OPTIONS = ("separator", "quoting")
"""Options of tables that are text."""
FILE_OPTIONS = ("root", "allow_root")
"""Options of images that are files below a folder."""
OPTIONS = {
    **{name: (flag, NO_COLUMNS) for name, flag in COLUMN_FLAGS.items()},
    "separator": ("--separator", "it is not a table of text"),
    "quoting": ("--quoting", "it is not a table of text"),
    "root": ("--root", "its images come with it"),
    "allow_root": ("--allow-root", "its images are not files in folders"),
    "image_ext": ("--image-ext", "it is not a tar"),
    "caption_ext": ("--caption-ext", "it is not a tar"),
    "caption_lines": ("--caption-lines", "it has no texts beside images"),
}
"""Flag of each option that some kinds of sources cannot follow, and why they cannot."""


@dataclass(frozen=True)
class OpenSpec:
    """Say how to open a source; None means guessed, or the source's own.

    At most one of `split_column`, `split_file` and `split_fraction` may be given.
    """

    image_column: str | None = None
    caption_column: str | tuple[str, ...] | None = None
    """One column of captions or several; a name may have wildcards (`caption_*`)."""
    split_column: str | None = None
    """Name of the column of splits; by default `split` if the table has it."""
    split_file: AnyPath | None = None
    """A TSV of key and split, or a folder of lists of keys called train.txt, val.txt, …"""
    split_fraction: tuple[tuple[str, float], ...] = ()
    """(split, share) pairs whose shares sum to 1.

    A hash of each image's key and `split_seed` chooses its split, so rows that are added later move
    no other row. Images of equal content get the split of the first of them.
    """
    split_seed: int = 0
    root: AnyPath | None = None
    """Folder or URL of object storage that paths of images are relative to; by default that of the
    table."""
    restval: bool = True
    """Whether the split `restval` of a Karpathy file counts as `train`; False leaves its images
    out."""
    require: tuple[Role, ...] = ()
    """Roles that the source must have."""
    label_column: str | None = None
    """Column of the labels; by default `label`, or `fine_label`."""
    key_column: str | None = None
    """Column of the images' names, such as a SKU; by default the path of the image."""
    caption_template: str | None = None
    """Caption made of several columns: `{title}. {description}`."""
    separator: str | None = None
    """Character between the cells of a table; by default the one that its first line shows."""
    quoting: Literal["csv", "none"] | None = None
    """Whether cells of a table may be quoted; by default they may in CSV, and in TSV where all
    quotes are those that a CSV writer makes."""
    allow_root: tuple[AnyPath, ...] = ()
    """Folders outside the source that links may lead to."""
    image_ext: str | None = None
    """Ending of the image in a tar's sample, such as `input.jpg`."""
    caption_ext: str | None = None
    """Ending of the caption in a tar's sample."""
    caption_lines: bool = False
    """Whether each line of a text beside an image is a caption of its own."""
    scale: tuple[float, float] | None = None
    """Samples that become black and white, for images of one channel with more than 8 bits; by
    default the smallest usual range that holds the samples of the image."""
    max_pixels: int | None = None
    """Largest number of pixels of an image."""
    columns: str | tuple[str, ...] = ()
    """Further columns of the table, with one value for each image: a store keeps them beside
    split and label, to choose rows by."""

    @property
    def pixels(self) -> PixelRules:
        """Return how the source's files become pixels."""
        return PixelRules(scale=self.scale, max_pixels=self.max_pixels)

    @property
    def resplits(self) -> bool:
        """Return whether splits come from elsewhere than the source."""
        return self.split_file is not None or bool(self.split_fraction)


def recorded_options(spec: OpenSpec) -> dict[str, Json]:
    """Return the options that were given, as JSON: with them the source opens again."""
    # Defaults are left out: the record says what the user said.
    option_values: dict[str, Json] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        # What must be there is a condition of the command, and not of the source.
        if field.name == "require" or value == field.default:
            continue
        # The store is opened from other working folders as well.
        if field.name in ("root", "split_file"):
            value = _absolute(value)
        if field.name == "allow_root":
            value = tuple(map(_absolute, value))
        is_many = isinstance(value, tuple)
        option_values[field.name] = [_as_json(entry) for entry in value] if is_many else value
    return option_values


def spec_of_options(options: Mapping[str, Json]) -> OpenSpec:
    """Return the spec that `recorded_options` recorded; names of later versions are left out."""
    names = {field.name for field in fields(OpenSpec)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name in names:
            values[name] = _as_tuple(value) if isinstance(value, list) else value
    return OpenSpec(**values)


def _absolute(given_path: AnyPath) -> str:
    """Return a path that is the same in every working folder; a URL stays."""
    return str(given_path) if is_url(str(given_path)) else os.path.abspath(given_path)


def _as_json(entry: object) -> Json:
    return list(entry) if isinstance(entry, tuple) else entry


def _as_tuple(values: list[Json]) -> tuple[Json, ...]:
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in values)


def require_only(spec: OpenSpec, where: object, *allowed: str) -> None:
    """Refuse options that a kind of source cannot follow.

    Raises:
        OptionError: An option is given and not in `allowed`.
    """
    for name, (flag, reason) in OPTIONS.items():
        if getattr(spec, name) and name not in allowed:
            raise OptionError(
                f"{where}: {flag} says nothing about this kind of source ({reason}); leave it out"
            )


def kind_of(path: AnyPath) -> str:
    """Return the ending of a file in lower case, without that of a compressed file."""
    suffixes = PurePath(path).suffixes
    # `pairs.csv.gz` is a CSV.
    if suffixes and suffixes[-1].lower() in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else ""


def distinct_splits(names: Iterable[str]) -> dict[str, str]:
    """Return the split that each name means, such that no two names mean the same.

    Of `validation` and `dev`, the first that `SPLITS` lists becomes `val`, and the other one keeps
    its name.
    """
    order = list(SPLITS)
    unique_names = list(dict.fromkeys(names))
    known_names = sorted((name for name in unique_names if name in SPLITS), key=order.index)
    split_of: dict[str, str] = {}
    for name in known_names:
        split = SPLITS[name]
        # A name that is a split itself goes before one that only means it.
        is_taken = split in split_of.values() or (split in unique_names and split != name)
        split_of[name] = name if is_taken else split
    return {name: split_of.get(name, name) for name in unique_names}


def is_url(text: str) -> bool:
    """Return whether a text begins with a scheme, as `s3://` does."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def refuse_url(key: str, where: str) -> None:
    """Refuse the key of an image that is a URL.

    Raises:
        ManifestError: It is one.
    """
    if is_url(key):
        raise ManifestError(
            f"{where}: image {key[:80]!r} is a URL, and nothing is downloaded; download the "
            "images first (img2dataset makes tars that can be opened) and give their paths"
        )
