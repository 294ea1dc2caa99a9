"""Scale the samples of images that have more than 8 bits, or are floating-point numbers.

A file seldom says which range its samples use: cameras and microscopes store 10, 12 or 14 bits in
16. The range is therefore the smallest usual one that holds all samples of the image, or the one
that the user gives. Where no range fits, or all differences would be lost, the image is refused:
it never becomes black or white unnoticed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apecache.errors import OptionError, RowError

BIT_DEPTHS = (8, 10, 12, 14, 16)
LOWEST_FLOAT_MAXIMUM = 16.0
"""Floats whose largest sample is between 1 and this value fit neither 0 to 1 nor 0 to 255."""
RGB16_MINIMUM = 64
"""Largest 8-bit sample below which a 16-bit color image must have used fewer than 15 bits."""
GIVE_SCALE = "give their range to extract as --scale LO,HI"


@dataclass(frozen=True, kw_only=True)
class PixelRules:
    """Say how files become pixels, where the file alone does not."""

    scale: tuple[float, float] | None = None
    """Samples that become 0 and 255, for images of one channel with more than 8 bits; None: chosen
    for each image."""
    max_pixels: int | None = None
    """Largest number of pixels; None: `apecache.data.images.MAX_PIXELS`."""


def parse_scale(text: str) -> tuple[float, float] | None:
    """Parse `LO,HI`; None for `auto`.

    Raises:
        OptionError: The text is neither.
    """
    if text == "auto":
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise OptionError(f"--scale {text}: expected auto or two numbers, like 0,4095")
    return low, high


def has_wide_samples(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_gray8(image: Image.Image, scale: tuple[float, float] | None, key: str) -> Image.Image:
    """Scale an image of one wide channel to 8 bits.

    Raises:
        RowError: unknown-range, if no range fits or all differences would be lost.
    """
    samples = np.asarray(image)
    low, high = scale or _range(samples, key)
    clean = np.nan_to_num(samples.astype(np.float64), nan=low, posinf=high, neginf=low)
    scaled = (np.clip(clean, low, high) - low) * (255 / (high - low))
    # The small addend keeps exact multiples from being rounded down.
    gray = np.floor(scaled + 1e-6).astype(np.uint8)
    if gray.min() == gray.max() and clean.min() != clean.max():
        raise RowError(
            "unknown-range",
            f"{key} has samples from {clean.min():g} to {clean.max():g}, which all become the "
            f"same gray in the range {low:g} to {high:g}; {GIVE_SCALE}",
        )
    return Image.fromarray(gray)


def _range(samples: NDArray[np.generic], key: str) -> tuple[float, float]:
    """Return the smallest usual range that holds all samples."""
    low = float(samples.min())
    high = float(samples.max())
    is_float = bool(np.issubdtype(samples.dtype, np.floating))
    if is_float and low >= 0 and high <= 1:
        return 0.0, 1.0
    fits_integers = low >= 0 and not (is_float and high < LOWEST_FLOAT_MAXIMUM)
    for bits in BIT_DEPTHS:
        if fits_integers and high < 2**bits:
            return 0.0, 2.0**bits - 1
    raise RowError(
        "unknown-range",
        f"{key} has {samples.dtype} samples from {low:g} to {high:g}, whose range is unknown; "
        f"{GIVE_SCALE}",
    )


def require_bright(image: Image.Image, raw_mode: str, key: str) -> None:
    """Refuse 16-bit color images that use few of their bits.

    Pillow reads the upper 8 bits of each sample alone, so that 12 bits in 16 become nearly black.

    Args:
        image: The loaded image.
        raw_mode: Pillow's name for the samples in the file.
        key: Name of the image, for messages.

    Raises:
        RowError: unknown-range.
    """
    if ";16" not in raw_mode or has_wide_samples(image):
        return
    if np.asarray(image.convert("RGB")).max() < RGB16_MINIMUM:
        raise RowError(
            "unknown-range",
            f"{key} has 16-bit colors that use fewer than 15 bits; expected 8-bit colors, or "
            "16-bit colors over the whole range: scale the file",
        )
