"""What was asked for and not used, counted by reason, for people and for machines."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

WORDS: Mapping[str, tuple[str, str]] = {
    "unreadable_images": ("image that could not be read", "images that could not be read"),
    "uncaptioned_images": ("image without a usable caption", "images without a usable caption"),
    "empty_captions": ("caption that is empty", "captions that are empty"),
    "unusable_captions": (
        "caption that could not be encoded",
        "captions that could not be encoded",
    ),
    "captions_without_features": ("caption without features", "captions without features"),
    "captions_of_unreadable_images": (
        "caption of an image that could not be read",
        "captions of images that could not be read",
    ),
    "unreadable_texts": ("text that could not be encoded", "texts that could not be encoded"),
}
"""Of each count what it counts: of one, and of several."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Counts of rows; each row counts once, by the first reason that holds."""

    unreadable_images: int = 0
    """Images that could not be read, or whose features are not finite."""
    uncaptioned_images: int = 0
    """Readable images without a usable caption, where only images with one are measured."""
    empty_captions: int = 0
    unusable_captions: int = 0
    """Captions that are no Unicode, or whose features are not finite."""
    captions_without_features: int = 0
    """Captions of a store that has no features of texts."""
    captions_of_unreadable_images: int = 0
    unreadable_texts: int = 0
    """Labelled texts that could not be encoded."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """`left out: 3 images that could not be read, 2 captions that are empty`; empty where
        nothing is."""
        counts = [(WORDS[name], count) for name, count in asdict(self).items() if count]
        reasons = [
            f"{count:,} {one if count == 1 else several}" for (one, several), count in counts
        ]
        return f"left out: {', '.join(reasons)}" if reasons else ""
