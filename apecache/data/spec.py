"""How a source is opened: what the user says about it, where guessing is not enough."""

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
}
SPLITS |= {"test": "test", "testing": "test"}
"""Names of folders and parts that mean a split, and the split that they mean."""

OPTIONS = {"image_column": "--image-column", "caption_column": "--caption-column"}
OPTIONS |= {"split_column": "--split", "root": "--root"}


@dataclass(frozen=True)
class OpenSpec:
    """None: guessed, or the source's own.

    `image_column`, `caption_column`, `split_column`: names of columns; without the last, `split` if
    there is one. `split_file`: a TSV of key and split, or a folder of lists of keys called
    train.txt, val.txt, … `split_fraction`: (split, share) pairs that sum to 1; each image falls by
    a hash of its key and `split_seed`, so that rows that are added later move no other; images of
    equal content fall where the first of them does. At most one of these three, in place of the
    source's own splits. `root`: the folder (or URL of object storage) that paths of images are
    relative to; by default that of the table. `restval`: of a Karpathy file, take `restval` as
    `train` (False: leave those images out). `require`: what the source must have: "image",
    "caption", "label".
    """

    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    split_file: AnyPath | None = None
    split_fraction: tuple[tuple[str, float], ...] = ()
    split_seed: int = 0
    root: AnyPath | None = None
    restval: bool = True
    require: tuple[Role, ...] = ()

    @property
    def resplits(self) -> bool:
        """Whether splits come from elsewhere than the source."""
        return self.split_file is not None or bool(self.split_fraction)


def require_only(spec: OpenSpec, where: object, *allowed: str) -> None:
    """Refuse options that a kind of source cannot follow.

    Raises:
        OptionError: an option that is given and not in `allowed`.
    """
    for name, flag in OPTIONS.items():
        if getattr(spec, name) is not None and name not in allowed:
            what = "it has no columns" if name != "root" else "its images come with it"
            raise OptionError(
                f"{where}: {flag} says nothing about this kind of source ({what}); leave it out"
            )


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def refuse_url(key: str, where: str) -> None:
    """Raises:
    ManifestError: the key of an image is a URL."""
    if is_url(key):
        raise ManifestError(
            f"{where}: image {key[:80]!r} is a URL, and nothing is downloaded; download the "
            "images first (img2dataset "
            "makes tars that can be opened) and give their paths"
        )
