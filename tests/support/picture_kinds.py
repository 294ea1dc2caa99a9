"""Pictures of every kind in files, each with the RGB pixels that it stands for: what tests
import."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}
"""What each EXIF orientation does to the pixels of the file, written with numpy."""


class Kind(NamedTuple):
    """`data`: a file's bytes. `pixels`: RGB, worked out without this project. `survives_convert`:
    whether Pillow's own `convert("RGB")` keeps all that the picture shows."""

    data: bytes
    suffix: str
    pixels: Pixels
    survives_convert: bool = True


def blocks() -> Pixels:
    """A picture [40, 30, 3] of few colors that no turn or mirror maps to itself."""
    colors = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    return colors.repeat(5, axis=0).repeat(5, axis=1)


def file_of(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Pixels:
    """The file's pixels by Pillow alone, as they lie in the file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def oriented(form: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return file_of(Image.fromarray(blocks()), form, exif=exif, **options)


def picture_kinds() -> dict[str, Kind]:
    """By name."""
    pixels = blocks()
    gray = pixels[..., 0]
    clear = pixels[..., 1] > 127
    on_white = np.where(clear[..., None], np.uint8(255), pixels)
    rgba = np.dstack([pixels, np.where(clear, 0, 255).astype(np.uint8)])
    deep = gray.astype(np.uint16) * 257 + 100
    palette = Image.fromarray(pixels).quantize(48)
    shown = np.asarray(palette.convert("RGB"))
    index = int(np.asarray(palette)[0, 0])
    without_one = np.where((np.asarray(palette) == index)[..., None], np.uint8(255), shown)
    cmyk = file_of(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    later = Image.fromarray(pixels[::-1].copy())
    frames = {"save_all": True, "append_images": [later, later]}
    gif = file_of(Image.fromarray(pixels).quantize(48), "GIF", **frames)
    webp = file_of(Image.fromarray(rgba), "WEBP", lossless=True, **frames)
    kinds = {
        f"JPEG, EXIF {number}": Kind(data := oriented("JPEG", number), ".jpg", turn(decoded(data)))
        for number, turn in TURNS.items()
    }
    kinds |= {
        "PNG, EXIF 6": Kind(oriented("PNG", 6), ".png", TURNS[6](pixels)),
        "WebP, EXIF 7": Kind(oriented("WEBP", 7, lossless=True), ".webp", TURNS[7](pixels)),
        "TIFF, EXIF 8": Kind(oriented("TIFF", 8), ".tiff", TURNS[8](pixels)),
        "L": Kind(file_of(Image.fromarray(gray), "PNG"), ".png", np.dstack([gray] * 3)),
        "P": Kind(file_of(palette, "PNG"), ".png", shown),
        "P, one color clear": Kind(
            file_of(palette, "PNG", transparency=index),
            suffix=".png",
            pixels=without_one,
            survives_convert=False,
        ),
        "RGBA": Kind(
            file_of(Image.fromarray(rgba), "PNG"),
            suffix=".png",
            pixels=on_white,
            survives_convert=False,
        ),
        "LA": Kind(
            file_of(Image.fromarray(rgba[..., [0, 3]]), "PNG"),
            suffix=".png",
            pixels=np.where(clear[..., None], np.uint8(255), np.dstack([gray] * 3)),
            survives_convert=False,
        ),
        "CMYK": Kind(cmyk, ".jpg", decoded(cmyk)),
        "16-bit": Kind(
            file_of(Image.fromarray(deep), "PNG"),
            suffix=".png",
            pixels=np.dstack([gray] * 3),
            survives_convert=False,
        ),
        "animated GIF": Kind(gif, ".gif", decoded(gif)),
        "animated WebP": Kind(webp, suffix=".webp", pixels=on_white, survives_convert=False),
    }
    return kinds
