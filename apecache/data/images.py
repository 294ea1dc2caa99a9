"""From the bytes that a key stands for to an RGB image, or a reason why not.

Every conversion is defined: EXIF orientation is applied, transparency is composited over white,
16-bit samples are scaled to 8 bits, of an animation the first frame is taken, everything ends as
RGB. Nothing is decoded before the header's size is known, formats come from an allow-list, and a
truncated file is never completed with grey.

A picture in memory (bytes, a file object, a Pillow image, an array) goes through the same
conversions in `open_picture`, so that one picture gives the same pixels in every form.
"""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from apecache.arguments import wrong_type
from apecache.data.media import MAX_IMAGE_BYTES, Media, check_bytes, read_file
from apecache.errors import DataError, OptionError, RowError
from apecache.fingerprint import content_hash

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000

Picture = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | NDArray[np.uint8]
)
"""A path, a file's bytes, a file opened in binary mode, a Pillow image, or RGB pixels uint8
[height, width, 3]."""
PICTURES = "a path, bytes, a binary file object, a PIL image or a uint8 array [height, width, 3]"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoadedImage(Generic[T]):
    """`image` is RGB, of the kind that `decode` gave; `digest` is the BLAKE3 of the file's
    bytes."""

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
    return LoadedImage(image=decode(data, key), digest=content_hash(data))


def open_picture(picture: Picture, name: str) -> Image.Image:
    """RGB image of a picture in any form, with equal pixels for equal pictures.

    The EXIF orientation that a Pillow image still carries is applied; `PIL.ImageOps.exif_transpose`
    takes it away, so an image that went through it is not turned again. Pillow's own
    `convert("RGB")` drops transparency and cuts 16-bit samples before they can be seen here: give
    the image without it. Of an animation that is open, the current frame is taken. A file object is
    read from its beginning where it can be rewound, and stays open.

    Args:
        name: what messages call the picture; a path is called by itself.

    Raises:
        OptionError: no picture. RowError: as `decode_image` and `read_file` raise.
    """
    require_picture(picture, name)
    match picture:
        case Image.Image():
            with _refusing(name):
                _check_size(picture, name)
                return picture if _is_plain(picture) else _load(picture)
        case np.ndarray():
            return open_picture(Image.fromarray(np.ascontiguousarray(picture)), name)
        case bytes() | bytearray() | memoryview():
            data = bytes(picture)
            check_bytes(len(data), name)
            return decode_image(data, name)
        case str() | os.PathLike():
            path = Path(picture)
            return decode_image(read_file(path, str(path)), str(path))
        case _:
            return decode_image(_read_open_file(picture, name), name)


def open_readable(picture: Picture, name: str, what: str = "image") -> Image.Image:
    """`open_picture` for a picture that is no row of a table: what cannot be read is an error of
    the call.

    Raises:
        OptionError: no picture. DataError: `what` cannot be read, and why.
    """
    try:
        return open_picture(picture, name)
    except RowError as error:
        raise DataError(f"{what} cannot be read: {error.detail}") from None


def require_picture(picture: object, name: str) -> None:
    """Refuse what cannot be a picture by its type and shape alone. Nothing is opened.

    Raises:
        OptionError: another type, an array of another shape or dtype, or a file that is open as
            text.
    """
    match picture:
        case np.ndarray():
            if (
                picture.dtype != np.uint8
                or picture.ndim != 3
                or picture.shape[2] != 3
                or not picture.size
            ):
                shape = list(picture.shape)
                raise OptionError(
                    f"{name}: expected {PICTURES}, found an array {shape} of {picture.dtype}"
                )
        case io.TextIOBase():
            raise OptionError(
                f"{name}: expected {PICTURES}, found a file open as text; open it with mode 'rb'"
            )
        case Image.Image() | bytes() | bytearray() | memoryview():
            return
        case str() | os.PathLike() if isinstance(os.fspath(picture), str):
            return
        case _ if callable(getattr(picture, "read", None)):
            return
        case _:
            raise wrong_type(picture, PICTURES, name)


def _read_open_file(file: BinaryIO, name: str) -> bytes:
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(0)
        data = file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise RowError("missing", f"{name}: {error}") from None
    if not isinstance(data, bytes):
        raise OptionError(
            f"{name}: expected {PICTURES}, found a file object that reads {type(data).__name__}"
        )
    check_bytes(len(data), name)
    return data


def decode_opened(data: bytes, key: str, decode: Callable[[Image.Image], T]) -> T:
    """What `decode` makes of an image whose header is read, its format and size found to be
    allowed."""
    with _refusing(key):
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(opened, key)
        return decode(opened)


@contextmanager
def _refusing(key: str) -> Iterator[None]:
    """Turn what Pillow raises into a RowError, and keep its warnings of odd metadata quiet."""
    try:
        with _QUIET:
            yield
    except UnidentifiedImageError:
        raise RowError(
            "not-an-image",
            f"{key} is none of {', '.join(FORMATS)} that can be read",
        ) from None
    except Image.DecompressionBombError:
        raise RowError(
            "too-large",
            f"{key} has far more pixels than the limit of {MAX_PIXELS:,}",
        ) from None
    except RowError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, EOFError, …
        raise RowError("truncated", f"{key} cannot be decoded: {error}") from None


def _load(opened: Image.Image) -> Image.Image:
    opened.load()
    return to_rgb(ImageOps.exif_transpose(opened))


def _is_plain(image: Image.Image) -> bool:
    """Whether `_load` would give a copy of the same pixels: an RGB image in memory, upright and
    opaque."""
    in_memory = (
        type(image) is Image.Image and image.mode == "RGB" and "transparency" not in image.info
    )
    return in_memory and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


class _Quiet:
    """Hides warnings of odd metadata (Pillow) and of a successor that we do not need (torchvision).

    Filters belong to the whole process, so `catch_warnings` in each of several threads would leave
    them changed: the first thread in changes them, the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings(
                    "ignore",
                    message="The image decoding and encoding capabilities of TorchV",
                )
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
        raise RowError(
            "too-large",
            f"{key} has {width} x {height} pixels; the limit is {MAX_PIXELS:,}",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rules of this module's docstring."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # By way of "I": the big-endian kind of TIFF files has no `point`.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode == "La":
        return to_rgb(image.convert("LA"))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
