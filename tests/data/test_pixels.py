"""Samples of more than 8 bits and floats: scaled by the documented rule, or refused with a reason."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import image_bytes, write_table
from PIL import Image

from apecache.data import images
from apecache.data.decoding import in_threads
from apecache.data.images import decode_image, load_image
from apecache.data.media import FolderMedia
from apecache.data.pixels import PixelRules, parse_scale
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.data.tensors import decode_tensor
from apecache.errors import OptionError, RowError


def tiff(samples: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "TIFF")
    return buffer.getvalue()


def int16_tiff(samples: Any) -> bytes:
    """Pillow writes no signed 16 bits: the tag of the samples' format is changed."""
    data = bytearray(tiff(samples.astype(np.uint16)))
    width, height = samples.shape[1], samples.shape[0]
    image = Image.open(io.BytesIO(data))
    assert image.size == (width, height)
    buffer = io.BytesIO()
    Image.fromarray(samples.astype(np.uint16)).save(buffer, "TIFF", tiffinfo={339: 2})
    return buffer.getvalue()


def png16(samples: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(samples.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("encode", "samples", "high"),
    [
        (tiff, RAMP.astype(np.float32), 1),
        (tiff, (RAMP * 255).astype(np.float32), 255),
        (tiff, (RAMP * 65535).astype(np.float32), 65535),
        (tiff, (RAMP * 255).astype(np.int32), 255),
        (tiff, (RAMP * 4095).astype(np.int32), 4095),
        (tiff, (RAMP * 65535).astype(np.int32), 65535),
        (tiff, (RAMP * 4095).astype(np.uint16), 4095),
        (tiff, (RAMP * 65535).astype(np.uint16), 65535),
        (int16_tiff, (RAMP * 4095).astype(np.int16), 4095),
        (png16, RAMP * 1023, 1023),
        (png16, RAMP * 4095, 4095),
        (png16, RAMP * 16383, 16383),
        (png16, RAMP * 65535, 65535),
    ],
)
@pytest.mark.parametrize("decode", [decode_image, decode_tensor])
def test_every_range_of_samples_becomes_8_bits(
    encode: Callable[[Any], bytes],
    samples: Any,
    high: float,
    decode: Callable[..., Any],
) -> None:
    expected = np.floor(np.asarray(samples, np.float64) * 255 / high + 1e-6)
    found = np.asarray(decode(encode(samples), "x"))
    gray = found[..., 0] if found.shape[-1] == 3 else found[0]
    assert np.abs(gray - expected).max() <= 1
    assert (gray.min(), gray.max()) == (0, 255)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (RAMP.astype(np.float32) - 0.5, "from -0.5 to 0.5"),
        (RAMP.astype(np.float32) * 3, "from 0 to 3"),
        ((RAMP * 2000 - 1000).astype(np.int32), "from -1000 to 1000"),
        ((RAMP * 10**6).astype(np.int32), "from 0 to 1e+06"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "from nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "to inf"),
        ((RAMP * 0.001).astype(np.float32), "all become the same gray"),
    ],
)
def test_a_range_that_nobody_knows_is_a_reason_and_never_black(samples: Any, said: str) -> None:
    data = tiff(samples)
    with pytest.raises(RowError, match="--scale LO,HI") as caught:
        decode_image(data, "x")
    assert caught.value.reason == "unknown-range"
    assert said in caught.value.detail
    low = float(np.nanmin(samples[np.isfinite(samples)]))
    high = float(np.nanmax(samples[np.isfinite(samples)]))
    gray = np.asarray(decode_image(data, "x", PixelRules(scale=(low, high))))
    assert (gray.min(), gray.max()) == (0, 255)


@given(
    samples=st.lists(st.floats(width=32, allow_nan=True), min_size=4, max_size=4),
    integers=st.booleans(),
)
def test_whatever_the_samples_differences_are_kept_or_refused(
    samples: list[float],
    integers: bool,
) -> None:
    array = np.array(samples, np.float32).reshape(2, 2)
    if integers:
        array = np.nan_to_num(array).clip(-(2**30), 2**30).astype(np.int32)
    try:
        gray = np.asarray(decode_image(tiff(array), "x"))
    except RowError as error:
        assert error.reason == "unknown-range"  # noqa: PT017
        return
    assert (gray.min() == gray.max()) == (array.min() == array.max())


def test_16_bit_colors_that_use_few_bits_are_refused() -> None:
    # An uncompressed TIFF of 2 x 2 pixels with three 16-bit samples, which Pillow cannot write.
    def color_tiff(high: int) -> bytes:
        import struct

        pixels = struct.pack("<12H", *[high * number // 11 for number in range(12)])
        tags = [
            (256, 3, 1, 2),
            (257, 3, 1, 2),
            (258, 3, 3, 200),
            (259, 3, 1, 1),
            (262, 3, 1, 2),
            (273, 4, 1, 8),
            (277, 3, 1, 3),
            (278, 3, 1, 2),
            (279, 4, 1, len(pixels)),
        ]
        entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data = b"II*\0" + struct.pack("<I", 40) + pixels.ljust(32, b"\0")
        data += struct.pack("<H", len(tags)) + entries + b"\0" * 4
        return data.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)

    assert np.asarray(decode_image(color_tiff(65535), "x")).max() == 255
    with pytest.raises(RowError, match="16-bit colors that use fewer than 15 bits"):
        decode_image(color_tiff(4095), "x")


@pytest.mark.parametrize(
    ("size", "refused"),
    [
        ((1, 1000), True),
        ((30_000, 2), True),
        ((1, 100_000), True),
        ((2, 500), False),
        ((90, 90), False),
    ],
)
def test_extreme_shapes_are_refused_by_their_header(size: tuple[int, int], refused: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    # Cut after the header: nothing is decoded.
    head = buffer.getvalue()[:60]
    with pytest.raises(RowError) as caught:
        decode_image(head, "x")
    assert caught.value.reason == ("extreme-shape" if refused else "truncated")


def test_the_limit_of_pixels_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    # Pillow's own limit does not get in the way.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    table = write_table(tmp_path / "t.csv", ["image"], [["a.png"]])
    source = open_pairs(table)
    with pytest.raises(RowError, match=r"too-large: .*1,000 .*--max-pixels"):
        load_image("a.png", source.media, source.pixels)
    source = open_pairs(table, OpenSpec(max_pixels=100_000))
    assert load_image("a.png", source.media, source.pixels).image.size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("where", ["decoder", "preprocess"])
def test_an_image_that_needs_too_much_memory_costs_its_row(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))

    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    def preprocess(loaded: Any) -> str:
        if where == "preprocess" and loaded.digest == digests[1]:
            raise MemoryError
        return "done"

    media = FolderMedia(root=tmp_path)
    keys = [f"{number}.png" for number in range(3)]
    digests = [load_image(key, media).digest for key in keys]

    def load(key: str) -> Any:
        with monkeypatch.context() as patch:
            if where == "decoder" and key == keys[1]:
                patch.setattr(images, "to_rgb", exhausted)
            return load_image(key, media)

    with in_threads(keys, load=load, preprocess=preprocess, threads=1, ahead=1) as results:
        reasons = [result.error and result.error.reason for result in results]
    assert reasons == [None, "out-of-memory", None]


def test_avif_is_read_and_what_is_not_read_is_named() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "AVIF")
    assert decode_image(buffer.getvalue(), "x").size == (16, 16)
    refused = {
        b"\0\0\0\x18ftypheic": "HEIC",
        b"\xff\x0a": "JPEG XL",
        b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
        b"<!DOCTYPE html>": "a web page",
        b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer",
        b"%PDF-1.7": "a PDF",
    }
    for head, name in refused.items():
        with pytest.raises(RowError, match=f"not-an-image: x is {name}") as caught:
            decode_image(head.ljust(64, b"\0"), "x")
        assert "expected JPEG, PNG" in caught.value.detail


def test_a_scale_is_two_numbers_in_order() -> None:
    assert parse_scale("auto") is None
    assert parse_scale("-1000,3000") == (-1000.0, 3000.0)
    for wrong in ("", "1", "2,1", "0,nan", "a,b", "1,2,3"):
        with pytest.raises(OptionError, match="--scale"):
            parse_scale(wrong)
