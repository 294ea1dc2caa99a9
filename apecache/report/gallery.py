"""Hold retrieval galleries: queries, the items retrieved for them, and small pictures of both."""

import base64
import io
import re
from dataclasses import dataclass

from PIL import Image, ImageOps

IMAGE_PREFIX = "data:image/jpeg;base64,"
_IMAGE_URI = re.compile(re.escape(IMAGE_PREFIX) + r"[A-Za-z0-9+/]+={0,2}")
_JPEG_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class Result:
    """Hold one retrieved item.

    Attributes:
        image: the item's picture as a `data:image/jpeg;base64,` URI (see `thumbnail`), None for a
            text item.
        text: the item's caption or class name; shown unchanged, never as markup.
        score: similarity to the query, larger is closer; the cosine in -1…1 for unit-length
            embeddings.
        correct: whether the item is a ground-truth match of the query.

    Raises:
        ValueError: `image` is anything but a base64 JPEG data URI.
    """

    image: str | None
    text: str
    score: float
    correct: bool

    def __post_init__(self) -> None:
        _check_image(self.image)


@dataclass(frozen=True, kw_only=True)
class QueryExample:
    """Hold one query with its best results, whether or not a correct one is among them.

    Attributes:
        query_text: the query's text, None for a query by image alone.
        query_image: the query's picture as a `data:image/jpeg;base64,` URI, None for a query by
            text alone.
        results: the results to show, best first.
        rank: 1-based rank of the best correct item among all candidates (it may lie beyond
            `results`), None where no candidate is correct or the rank is not known.

    Raises:
        ValueError: neither text nor image, a rank below 1, or an image that is no base64 JPEG data
            URI.
    """

    query_text: str | None
    query_image: str | None
    results: tuple[Result, ...]
    rank: int | None

    def __post_init__(self) -> None:
        if self.query_text is None and self.query_image is None:
            raise ValueError("a hit needs a query text, a query image or both")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"ranks start at 1, got {self.rank}")
        _check_image(self.query_image)

    @property
    def found(self) -> bool:
        """Tell whether at least one of the shown results is correct."""
        return any(result.correct for result in self.results)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Hold a titled list of queries; `note` says how they were chosen."""

    title: str
    note: str
    items: tuple[QueryExample, ...]


def thumbnail(image: Image.Image, side: int = 160) -> str:
    """Return a small JPEG copy of `image` as a `data:image/jpeg;base64,` URI.

    The pixels are always encoded anew, so neither the original bytes nor Exif, XMP, comments or
    color profiles reach the page. Exif orientation is applied and transparency is laid on white;
    colors are taken as sRGB. `image` itself does not change.

    Args:
        image: a picture in any Pillow mode.
        side: upper bound of the longer side in pixels; smaller pictures are not enlarged.

    Raises:
        ValueError: `side` is below 1.
    """
    encoded = base64.b64encode(small_jpeg(image, side))
    return IMAGE_PREFIX + encoded.decode("ascii")


def small_jpeg(image: Image.Image, side: int = 160) -> bytes:
    """Return the JPEG bytes that `thumbnail` wraps. Arguments and errors are the same."""
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, got {side}")
    small = _on_white(ImageOps.exif_transpose(image))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    # Pillow's JPEG writer copies comments and XMP from `image.info`; a fresh canvas has none.
    canvas = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
    else:
        canvas.paste(_eight_bit(image).convert("RGB"))
    return canvas


def _eight_bit(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit grays at 255 on conversion, which turns nearly every such picture white.
    if not image.mode.startswith("I;16"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _check_image(uri: str | None) -> None:
    if uri is not None and not _IMAGE_URI.fullmatch(uri):
        raise ValueError(f"an image must be a {IMAGE_PREFIX}… URI, got {uri[:40]!r}")
