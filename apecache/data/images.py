"""Decode the bytes of a key to an RGB image, or give a reason why it cannot be decoded.

Every conversion is defined. EXIF orientation is applied, transparency is composited over white,
samples of more than 8 bits are scaled (`apecache.data.pixels`), an animation gives its first frame,
and the result is always RGB. Nothing is decoded before the header's size is checked, formats come
from an allow-list, and a truncated file is never completed with gray.

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
from apecache.data.media import MAX_IMAGE_BYTES, Media, RuledMedia, check_bytes, read_file
from apecache.data.pixels import PixelRules, has_wide_samples, require_bright, to_gray8
from apecache.data.signatures import name_of_content
from apecache.errors import DataError, OptionError, RowError, one_line
from apecache.fingerprint import content_hash

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
SUFFIXES = (*JPEG_SUFFIXES, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
REFUSED_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2")
"""Endings of images that are listed, so that they are refused by name and not left out."""
MAX_PIXELS = 50_000_000
"""Default of `--max-pixels`."""
MAX_ASPECT = 250
"""Longest side in units of the shortest. Encoders enlarge the shortest side to their resolution, so
an image of 1 x 1,000,000 pixels would need a thousand times its own memory."""
READ_BYTES = 1 << 20
"""Bytes of a file object that one call of `read` asks for."""

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

DEFAULT_RULES = PixelRules()


@dataclass(frozen=True, kw_only=True)
class LoadedImage(Generic[T]):
    """Hold a decoded image and the hash of its file."""

    image: T
    """RGB, of the type that the decoder returns."""
    digest: str
    """BLAKE3 of the file's bytes."""


def decode_image(data: bytes, key: str, rules: PixelRules = DEFAULT_RULES) -> Image.Image:
    """Decode the bytes of a file to an RGB image.

    Raises:
        RowError: not-an-image, empty, too-large, extreme-shape, unknown-range, truncated,
            out-of-memory.
    """
    return decode_opened(data, key, decode=lambda opened: _load(opened, key, rules), rules=rules)


def load_image(
    key: str,
    media: Media,
    rules: PixelRules | None = None,
) -> LoadedImage[Image.Image]:
    """Read the image that a table calls `key`.

    Args:
        key: The image.
        media: Reads it.
        rules: How files become pixels; None for those of the media.

    Raises:
        RowError: As `decode_image` and `Media.read` raise.
    """
    return load_as(decode_image, key, media, rules)


def load_as(
    decode: Callable[[bytes, str, PixelRules], T],
    key: str,
    media: Media,
    rules: PixelRules | None = None,
) -> LoadedImage[T]:
    """Read the image that a table calls `key`, with any decoder of (bytes, key, rules)."""
    if rules is None:
        rules = media.rules if isinstance(media, RuledMedia) else DEFAULT_RULES
    data = media.read(key)
    return LoadedImage(image=decode(data, key, rules), digest=content_hash(data))


def open_picture(picture: Picture, name: str) -> Image.Image:
    """Convert a picture in any form to an RGB image, with equal pixels for equal pictures.

    The EXIF orientation that a Pillow image still carries is applied. `PIL.ImageOps.exif_transpose`
    removes it, so an image that went through it is not turned again. Pillow's own `convert("RGB")`
    drops transparency and clips 16-bit samples, so give the image without that conversion. An open
    animation gives its current frame. A file object is read from its beginning if it can be
    rewound, and stays open.

    Args:
        picture: The picture.
        name: Name of the picture in error messages; a path is its own name.

    Raises:
        OptionError: The value is not a picture.
        RowError: As `decode_image` and `read_file` raise.
    """
    require_picture(picture, name)
    match picture:
        case Image.Image():
            with _refusing(name):
                _check_size(picture, name, DEFAULT_RULES)
                return picture if _is_plain(picture) else _load(picture, name, DEFAULT_RULES)
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


def open_readable(picture: Picture, name: str, noun: str = "image") -> Image.Image:
    """Open a picture that is not a row of a table, so that it must be readable.

    Args:
        picture: The picture.
        name: Name of the picture in error messages.
        noun: Word for the picture in the DataError.

    Raises:
        OptionError: The value is not a picture.
        DataError: The picture cannot be read.
    """
    try:
        return open_picture(picture, name)
    except RowError as error:
        raise DataError(f"{noun} cannot be read: {error.detail}") from None


def require_picture(picture: object, name: str) -> None:
    """Refuse what cannot be a picture by its type and shape alone; nothing is opened.

    Raises:
        OptionError: The type, or an array's shape or dtype, is wrong, or a file is open as text.
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
        data = _read_to_end(file, name)
    except OptionError:
        # It is a ValueError, but not the fault of the file.
        raise
    except (OSError, ValueError) as error:
        # A closed file raises ValueError.
        raise RowError("missing", f"{name}: {error}") from None
    check_bytes(len(data), name)
    return data


def _read_to_end(file: BinaryIO, name: str) -> bytes:
    """Read a file object until it returns no more bytes.

    An unbuffered pipe returns fewer bytes than asked for before its end.

    Raises:
        OptionError: `read` takes no size, or returns no bytes.
        RowError: too-large, for an object that never ends as well.
    """
    # A BytesIO grows in linear time, and returns its content without a copy.
    content = io.BytesIO()
    while content.tell() <= MAX_IMAGE_BYTES:
        try:
            # One byte more than allowed shows that a file is too large without reading all of it.
            chunk = file.read(min(READ_BYTES, MAX_IMAGE_BYTES + 1 - content.tell()))
        except TypeError as error:
            raise _unreadable(name, f"whose read(size) fails ({one_line(error)})") from None
        if not isinstance(chunk, bytes):
            raise _unreadable(name, f"that reads {type(chunk).__name__}")
        if not chunk:
            return content.getvalue()
        content.write(chunk)
    raise RowError("too-large", f"{name} has more bytes than the limit of {MAX_IMAGE_BYTES:,}")


def _unreadable(name: str, fault: str) -> OptionError:
    return OptionError(f"{name}: expected {PICTURES}, found a file object {fault}")


def decode_opened(
    data: bytes,
    key: str,
    decode: Callable[[Image.Image], T],
    rules: PixelRules = DEFAULT_RULES,
) -> T:
    """Apply `decode` to an image whose header has an allowed format and size.

    Raises:
        RowError: As `decode_image` raises.
    """
    with _refusing(key, data):
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(opened, key, rules)
        return decode(opened)


@contextmanager
def _refusing(key: str, data: bytes = b"") -> Iterator[None]:
    """Turn what Pillow raises into a RowError, and keep its warnings of odd metadata quiet."""
    try:
        with HIDE_WARNINGS:
            yield
    except UnidentifiedImageError:
        content = name_of_content(data)
        found_text = f"{key} is {content}" if content else f"{key} is not an image that can be read"
        raise RowError(
            "not-an-image",
            f"{found_text}; expected {', '.join(FORMATS)}: convert it",
        ) from None
    except RowError:
        raise
    except MemoryError:
        raise RowError(
            "out-of-memory",
            f"{key} needs more memory than there is; use fewer --workers",
        ) from None
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, EOFError and others.
        raise RowError("truncated", f"{key} cannot be decoded: {error}") from None


def _load(opened: Image.Image, key: str, rules: PixelRules) -> Image.Image:
    # Pillow empties `tile`, which names the samples of the file, once the image is loaded.
    raw_mode = str([tile[3] for tile in getattr(opened, "tile", ())])
    opened.load()
    require_bright(opened, raw_mode, key)
    return to_rgb(ImageOps.exif_transpose(opened), key=key, rules=rules)


def _is_plain(image: Image.Image) -> bool:
    """Return whether `_load` would only copy the image: RGB, in memory, upright and opaque."""
    # An opened file has a subclass of Image.Image and may not be loaded yet.
    in_memory = type(image) is Image.Image
    if not in_memory or image.mode != "RGB" or "transparency" in image.info:
        return False
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)


class _HideWarnings:
    """Hide warnings that no user can act on, and lift Pillow's limit of pixels.

    The warnings are about odd metadata (Pillow) and about a successor package (torchvision).
    Filters belong to the whole process, so `catch_warnings` in each of several threads would leave
    them changed. The first thread to enter changes them, and the last one to leave restores them.
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
                # Pillow's own limit is below what --max-pixels may allow; `_check_size` has ours.
                self._saved.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
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


HIDE_WARNINGS = _HideWarnings()


def _check_size(image: Image.Image, key: str, rules: PixelRules) -> None:
    width, height = image.size
    # Pillow makes such images in memory, and no file holds one.
    if not (width and height):
        raise RowError("empty", f"{key} has {width} x {height} pixels; expected at least 1 x 1")
    max_pixels = MAX_PIXELS if rules.max_pixels is None else rules.max_pixels
    if width * height > max_pixels:
        raise RowError(
            "too-large",
            f"{key} has {width} x {height} pixels; the limit is {max_pixels:,} (extract "
            "--max-pixels)",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RowError(
            "extreme-shape",
            f"{key} has {width} x {height} pixels; expected a longest side of at most "
            f"{MAX_ASPECT} times the shortest",
        )


def to_rgb(
    image: Image.Image,
    key: str = "image",
    rules: PixelRules = DEFAULT_RULES,
) -> Image.Image:
    """Convert an image to RGB by the rules of this module's docstring.

    Raises:
        RowError: unknown-range.
    """
    if has_wide_samples(image):
        return to_gray8(image, rules.scale, key).convert("RGB")
    if image.mode == "La":
        return to_rgb(image.convert("LA"), key=key, rules=rules)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
