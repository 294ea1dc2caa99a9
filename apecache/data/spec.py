"""Hold what the user says about a source, where guessing is not enough to open it."""

import re
from dataclasses import dataclass
from typing import Literal

from apecache.arguments import AnyPath
from apecache.errors import ManifestError, OptionError

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

OPTIONS = {
    "image_column": "--image-column",
    "caption_column": "--caption-column",
    "split_column": "--split",
    "root": "--root",
}
"""Command-line options of the fields that some kinds of sources cannot follow."""


@dataclass(frozen=True)
class OpenSpec:
    """Say how to open a source; None means guessed, or the source's own.

    At most one of `split_column`, `split_file` and `split_fraction` may be given.
    """

    image_column: str | None = None
    caption_column: str | None = None
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

    @property
    def resplits(self) -> bool:
        """Return whether splits come from elsewhere than the source."""
        return self.split_file is not None or bool(self.split_fraction)


def require_only(spec: OpenSpec, where: object, *allowed: str) -> None:
    """Refuse options that a kind of source cannot follow.

    Raises:
        OptionError: An option is given and not in `allowed`.
    """
    for name, flag in OPTIONS.items():
        if getattr(spec, name) is not None and name not in allowed:
            reason = "it has no columns" if name != "root" else "its images come with it"
            raise OptionError(
                f"{where}: {flag} says nothing about this kind of source ({reason}); leave it out"
            )


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
