"""From the bytes that a key stands for to an RGB image, or a reason why not.

Every conversion is defined: EXIF orientation is applied, transparency is composited over white, 16-bit samples are
scaled to 8 bits, of an animation the first frame is taken, everything ends as RGB. Nothing is decoded before the
header's size is known, formats come from an allow-list, and a truncated file is never completed with grey.
"""

import io
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from apecache.data.media import Media
from apecache.errors import RowError
from apecache.fingerprint import content_hash

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000


T = TypeVar("T")


@dataclass(frozen=True)
class LoadedImage(Generic[T]):
    """`image` is RGB, of the kind that `decode` gave; `digest` is the BLAKE3 of the file's bytes."""

    image: T
    digest: str


def decode_image(data: bytes, key: str) -> Image.Image:
    """RGB image from the bytes of a file.

    Raises:
        RowError: not-an-image, too-large, truncated.
    """
    return decode_opened(data, key, _load)


def load_image(key: str, media: Media) -> LoadedImage[Image.Image]:
    """Read the image that a table calls `key`.

    Raises:
        RowError: what `decode_image` and `Media.read` raise.
    """
    return load_as(decode_image, key, media)


def load_as(decode: Callable[[bytes, str], T], key: str, media: Media) -> LoadedImage[T]:
    """`load_image` by another decoder."""
    data = media.read(key)
    return LoadedImage(decode(data, key), content_hash(data))


def decode_opened(data: bytes, key: str, decode: Callable[[Image.Image], T]) -> T:
    """What `decode` makes of an image whose header is read, its format and size found to be allowed."""
    try:
        with _QUIET:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(opened, key)
            return decode(opened)
    except UnidentifiedImageError:
        raise RowError("not-an-image", f"{key} is none of {', '.join(FORMATS)} that can be read") from None
    except Image.DecompressionBombError:
        raise RowError("too-large", f"{key} has far more pixels than the limit of {MAX_PIXELS:,}") from None
    except RowError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, …
        raise RowError("truncated", f"{key} cannot be decoded: {error}") from None


def _load(opened: Image.Image) -> Image.Image:
    opened.load()
    return to_rgb(ImageOps.exif_transpose(opened))


class _Quiet:
    """Hides warnings of odd metadata (Pillow) and of a successor that we do not need (torchvision).

    Filters belong to the whole process, so `catch_warnings` in each of several threads would leave them changed: the
    first thread in changes them, the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._saved = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchV")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.close()


_QUIET = _Quiet()


def _check_size(image: Image.Image, key: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RowError("too-large", f"{key} has {width} x {height} pixels; the limit is {MAX_PIXELS:,}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rules of this module's docstring."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # By way of "I": the big-endian kind of TIFF files has no `point`.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
