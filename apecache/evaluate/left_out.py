"""Count what was asked for and not used, by reason."""

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
"""What each field of `LeftOut` counts, in the singular and in the plural."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Hold counts of rows; each row counts once, by the first reason that holds."""

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
    """Labeled texts that could not be encoded."""

    @property
    def total(self) -> int:
        """Return the number of all rows that were left out."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """Return the reasons with their counts; an empty string if no row was left out.

        Example: `left out: 3 images that could not be read, 2 captions that are empty`.
        """
        reasons = []
        for name, count in asdict(self).items():
            if count:
                singular, plural = WORDS[name]
                reasons.append(f"{count:,} {singular if count == 1 else plural}")
        return f"left out: {', '.join(reasons)}" if reasons else ""
