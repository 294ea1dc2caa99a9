"""Image files: exact pixels for every defined conversion, a reason for everything else."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from apecache.data.images import MAX_PIXELS, decode_image, load_image
from apecache.data.media import FolderMedia
from apecache.errors import RowError
from apecache.fingerprint import content_hash

RED = (255, 0, 0)
BLUE = (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    image = decode_image(data, "key")
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(seed: int = 0, height: int = 40, width: int = 30) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(
    width: int,
    height: int,
    depth: int = 8,
    color: int = 2,
    data: bytes = b"\0" * 10,
) -> bytes:
    """A PNG that declares a size; `data` are its filtered scan lines, by default far too few."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(data))
        + png_chunk(b"IEND", b"")
    )


def big_endian_tiff(samples: NDArray[np.uint16]) -> bytes:
    """A 16-bit gray TIFF in Motorola byte order, as scanners write it; Pillow writes none."""
    height, width = samples.shape
    data = samples.astype(">u2").tobytes()
    short = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1, 278: height}
    tags = [(tag, struct.pack(">HHIHH", tag, 3, 1, value, 0)) for tag, value in short.items()]
    tags += [
        (tag, struct.pack(">HHII", tag, 4, 1, value))
        for tag, value in {273: 8, 279: len(data)}.items()
    ]
    entries = b"".join(entry for _, entry in sorted(tags))
    return (
        b"MM\0*"
        + struct.pack(">I", 8 + len(data))
        + data
        + struct.pack(">H", len(tags))
        + entries
        + b"\0" * 4
    )


def one_pixel(mode: str, color: object, form: str = "PNG", **options: Any) -> bytes:
    return encoded(Image.new(mode, (3, 2), color), form, **options)  # type: ignore[arg-type]


def palette(alpha: bytes | int) -> bytes:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return encoded(image, transparency=alpha)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (one_pixel("RGB", (1, 2, 3)), (1, 2, 3)),
        (one_pixel("RGB", (1, 2, 3), "BMP"), (1, 2, 3)),
        (one_pixel("RGB", (1, 2, 3), "TIFF"), (1, 2, 3)),
        (one_pixel("RGB", (1, 2, 3), "WEBP", lossless=True), (1, 2, 3)),
        (one_pixel("L", 7), (7, 7, 7)),
        (one_pixel("1", 1), (255, 255, 255)),
        (one_pixel("CMYK", (0, 0, 0, 0), "TIFF"), (255, 255, 255)),
        (one_pixel("CMYK", (255, 0, 0, 0), "TIFF"), (0, 255, 255)),
        (one_pixel("CMYK", (0, 0, 0, 255), "TIFF"), (0, 0, 0)),
        (one_pixel("CMYK", (100, 50, 0, 30), "TIFF"), (137, 181, 225)),  # (255 - c)(255 - k) / 255
        (one_pixel("RGBA", (255, 0, 0, 255)), RED),
        (one_pixel("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
        (
            one_pixel("RGBA", (255, 0, 100, 51)),
            (255, 204, 224),
        ),  # 51 / 255 = 0.2 of the color, 0.8 of white
        (one_pixel("RGBA", (10, 20, 30, 0), "WEBP", lossless=True, exact=True), (255, 255, 255)),
        (one_pixel("LA", (0, 0)), (255, 255, 255)),
        (one_pixel("LA", (100, 51)), (224, 224, 224)),
        (one_pixel("L", 9, transparency=9), (255, 255, 255)),
        (one_pixel("L", 9, transparency=8), (9, 9, 9)),
        (one_pixel("RGB", RED, transparency=RED), (255, 255, 255)),
        (one_pixel("RGB", RED, transparency=BLUE), RED),
        (palette(b"\xff\xff\xff"), [RED, (0, 255, 0), BLUE]),
        (palette(b"\x00\x33"), [(255, 255, 255), (204, 255, 204), BLUE]),
        (palette(2), [RED, (0, 255, 0), (255, 255, 255)]),
        (
            png_header(
                1,
                height=1,
                depth=16,
                color=2,
                data=b"\0" + struct.pack(">HHH", 0, 128 * 257, 65535),
            ),
            (0, 128, 255),
        ),
        (
            png_header(
                1,
                height=1,
                depth=16,
                color=4,
                data=b"\0" + struct.pack(">HH", 100 * 257, 65535),
            ),
            (100, 100, 100),
        ),
    ],
)
def test_every_color_mode_ends_as_these_rgb_values(data: bytes, pixels: Any) -> None:
    image = decoded(data)
    assert (image == np.broadcast_to(np.array(pixels, np.uint8), image.shape)).all()


@pytest.mark.parametrize("container", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_gray_is_divided_by_257(container: str) -> None:
    samples = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = (
        encoded(Image.fromarray(samples), container)
        if " " not in container
        else big_endian_tiff(samples)
    )
    image = decoded(data)
    assert (image == (samples // 257)[..., None]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a.swapaxes(0, 1), 2)),
        (8, np.rot90),
    ],
)
def test_the_exif_orientation_is_applied_once(form: str, orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    image = noise(height=2, width=3)
    assert np.array_equal(
        decoded(encoded(image, form, exif=exif, **options)),
        turn(np.asarray(image)),
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_decodes_as_pillow_decodes_it(options: dict[str, Any]) -> None:
    data = encoded(noise(), "JPEG", **options)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_cmyk_jpeg_keeps_its_colors() -> None:
    data = encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(data).astype(int) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("MPO", {"quality": 100}),
    ],
)
def test_the_first_frame_of_an_animation_is_taken(form: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    image = decoded(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert np.abs(image.astype(int) - RED).max() <= (2 if form == "MPO" else 0)


def test_a_gif_with_a_transparent_color_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert decoded(encoded(image, "GIF", transparency=0)).tolist() == [
        [[255, 255, 255], list(BLUE)]
    ]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_truncated_file_is_refused_and_never_filled_with_gray(
    form: str,
    options: dict[str, Any],
) -> None:
    data = encoded(noise(), form, **options)
    whole = decoded(data)
    reasons = set()
    for length in [*range(1, len(data), 53), *range(len(data) - 40, len(data))]:
        image = decode_or_refuse(data[:length])
        if isinstance(image, RowError):
            reasons.add(image.reason)
        else:  # only a trailer was cut off: not one pixel may differ
            assert length > len(data) - 30
            assert np.array_equal(image, whole)
    assert "not-an-image" in reasons <= {"truncated", "not-an-image"}
    assert isinstance(decode_or_refuse(data[: len(data) * 2 // 3]), RowError)


def decode_or_refuse(data: bytes) -> NDArray[np.uint8] | RowError:
    try:
        return decoded(data)
    except RowError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_file_gives_pixels_or_a_row_error_and_nothing_else(
    form: str,
    edits: list[tuple[float, int]],
) -> None:
    data = bytearray(encoded(noise(height=12, width=9), form))
    for where, byte in edits:
        data[int(where * len(data))] = byte
    decode_or_refuse(bytes(data))


@pytest.mark.parametrize("side", [8_000, 20_000, 2**31 - 1])
def test_a_file_over_the_pixel_limit_is_refused_by_its_header_alone(side: int) -> None:
    error = decode_or_refuse(png_header(side, side))
    assert isinstance(error, RowError)
    assert error.reason == "too-large"
    assert f"{MAX_PIXELS:,}" in error.detail


def test_the_pixel_limit_itself_is_allowed() -> None:
    for extra, reason in ((0, "truncated"), (1, "too-large")):
        error = decode_or_refuse(png_header(MAX_PIXELS // 5_000 + extra, 5_000, depth=1, color=0))
        assert isinstance(error, RowError)
        assert error.reason == reason


def test_a_bomb_in_the_metadata_is_refused() -> None:
    data = encoded(noise())
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (5 << 20)))
    error = decode_or_refuse(data[:33] + bomb + data[33:])  # between the header and the pixels
    assert isinstance(error, RowError)
    assert error.reason == "truncated"


def test_odd_metadata_neither_warns_nor_costs_the_image() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(data)).getexif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decoded(data).shape == (40, 30, 3)
    assert caught == []


# Files and paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one good image (sub/good.png) beside a folder that images must not come
    from."""
    for folder in ("root/sub", "root2"):
        (tmp_path / folder).mkdir(parents=True)
        noise().save(tmp_path / folder / "good.png")
    return tmp_path / "root"


def reason(key: str, root: Path) -> str:
    with pytest.raises(RowError) as caught:
        load_image(key, FolderMedia(root=root))
    assert key in caught.value.detail or repr(key) in caught.value.detail
    return caught.value.reason


def test_an_image_comes_with_the_hash_of_its_file(root: Path) -> None:
    loaded = load_image("sub/good.png", FolderMedia(root=root))
    assert loaded.digest == content_hash((root / "sub/good.png").read_bytes())
    assert np.array_equal(np.asarray(loaded.image), np.asarray(noise()))


@pytest.mark.parametrize(
    "key",
    ["./sub/good.png", "sub/../sub/good.png", "sub//good.png", "link.png", "folder/good.png"],
)
def test_paths_and_links_that_stay_below_the_root_are_read(root: Path, key: str) -> None:
    (root / "link.png").symlink_to("sub/good.png")
    (root / "folder").symlink_to(root / "sub")
    assert load_image(key, FolderMedia(root=root)).image.size == (30, 40)


def test_the_root_itself_may_be_a_link_and_keys_absolute_paths_below_it(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert load_image("sub/good.png", FolderMedia(root=link)).image.size == (30, 40)
    assert load_image(str(root / "sub/good.png"), FolderMedia(root=link)).image.size == (30, 40)


@pytest.mark.parametrize(
    "key",
    [
        "../root2/good.png",
        "sub/../../root2/good.png",
        "/etc/hostname",
        "..",
        "out.png",
        "outside/good.png",
        "sub/\0.png",
    ],
)
def test_a_path_that_leads_out_of_the_root_is_refused(root: Path, key: str) -> None:
    (root / "out.png").symlink_to("../root2/good.png")
    (root / "outside").symlink_to(root.parent / "root2")
    assert reason(key, root) == "outside-root"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("nowhere.png", "missing"),
        ("nowhere/good.png", "missing"),
        ("sub/good.png/x", "missing"),
        ("loop", "missing"),
        ("x" * 300 + ".png", "missing"),
        ("\ud800.png", "missing"),
        ("sub", "not-a-file"),
        (".", "not-a-file"),
        ("fifo.png", "not-a-file"),
        ("empty.png", "empty"),
        ("page.jpg", "not-an-image"),
        ("picture.ppm.png", "not-an-image"),
        ("icon.png", "not-an-image"),
        ("half.jpg", "truncated"),
        ("half.png", "truncated"),
        ("huge.png", "too-large"),
    ],
)
def test_a_file_that_cannot_be_an_image_is_refused_with_its_reason(
    root: Path,
    key: str,
    expected: str,
) -> None:
    os.mkfifo(root / "fifo.png")
    (root / "loop").symlink_to("loop")
    (root / "huge.png").write_bytes(png_header(10_000, 10_000))
    contents = {
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    }
    contents |= {"picture.ppm.png": encoded(noise(), "PPM"), "icon.png": encoded(noise(), "ICO")}
    for form in ("JPEG", "PNG"):
        whole = encoded(noise(), form)
        contents["half.jpg" if form == "JPEG" else "half.png"] = whole[: len(whole) // 2]
    for name, content in contents.items():
        (root / name).write_bytes(content)
    assert reason(key, root) == expected
