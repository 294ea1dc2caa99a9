"""From the bytes that a key stands for to an RGB image, or a reason why not.

Every conversion is defined: EXIF orientation is applied, transparency is composited over white, 16-bit samples are
scaled to 8 bits, of an animation the first frame is taken, everything ends as RGB. Nothing is decoded before the
header's size is known, formats come from an allow-list, and a truncated file is never completed with grey.
"""

import io
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
class LoadedImage:
    """`image` is RGB; `digest` is the BLAKE3 of the file's bytes."""

    image: Image.Image
    digest: str


def load_image(key: str, media: Media) -> LoadedImage:
    """Read the image that a table calls `key`.

    Raises:
        RowError: not-an-image, too-large, truncated, and what `Media.read` raises.
    """
    data = media.read(key)
    return LoadedImage(decode_image(data, key), content_hash(data))


def decode_image(data: bytes, key: str) -> Image.Image:
    """RGB image from the bytes of a file."""
    try:
        with _QUIET:
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(opened, key)
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise RowError("not-an-image", f"{key} is none of {', '.join(FORMATS)} that can be read") from None
    except Image.DecompressionBombError:
        raise RowError("too-large", f"{key} has far more pixels than the limit of {MAX_PIXELS:,}") from None
    except RowError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, …
        raise RowError("truncated", f"{key} cannot be decoded: {error}") from None


class _Quiet:
    """Hides Pillow's warnings of odd metadata; what cannot be decoded raises.

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


@dataclass(frozen=True)
class Preprocessed(Generic[T]):
    """What `preprocess` made of one image, or why there is none. `digest` is that of the file, empty if unread."""

    value: T | None
    digest: str
    error: RowError | None


@contextmanager
def preprocess_ahead(
    keys: Sequence[str], media: Media, preprocess: Callable[[LoadedImage], T], workers: int, ahead: int
) -> Iterator[Iterator[Preprocessed[T]]]:
    """Images read and preprocessed by `workers` threads, in the order of `keys`, at most `ahead` of the consumer.

    Threads suffice: Pillow decodes and resizes without the interpreter's lock.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            yield _in_order(keys, lambda key: _preprocess(key, media, preprocess), pool, ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    keys: Sequence[str], work: Callable[[str], Preprocessed[T]], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Preprocessed[T]]:
    waiting: deque[Future[Preprocessed[T]]] = deque(pool.submit(work, key) for key in keys[:ahead])
    for position in range(len(keys)):
        result = waiting.popleft().result()
        if position + ahead < len(keys):
            waiting.append(pool.submit(work, keys[position + ahead]))
        yield result


def _preprocess(key: str, media: Media, preprocess: Callable[[LoadedImage], T]) -> Preprocessed[T]:
    try:
        loaded = load_image(key, media)
        return Preprocessed(preprocess(loaded), loaded.digest, None)
    except RowError as error:
        return Preprocessed(None, "", error)
    except (ValueError, OSError, RuntimeError) as error:
        return Preprocessed(None, "", RowError("unusable", f"{key}: {error}"))
