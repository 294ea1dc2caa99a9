"""One picture is one vector, in whatever form it is given: every way in times every kind of
picture."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_kinds import Kind, picture_kinds
from PIL import Image, ImageOps
from tiny import tree

import apecache
from apecache.data.images import open_picture
from apecache.errors import DataError, OptionError, RowError
from apecache.evaluate.embeddings import embed_rows
from apecache.runs.model import ImageTextModel
from apecache.search.query import Query, SearchIndex
from apecache.store.reader import FeatureStore

KINDS = picture_kinds()


class Named(os.PathLike[str]):
    """A path that is neither a str nor a Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def read_to_its_end(kind: Kind) -> io.BytesIO:
    file = io.BytesIO(kind.data)
    file.read()
    return file


class Unseekable(io.RawIOBase):
    """A pipe or a socket: each call of `read` returns a few bytes, whatever it asks for."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.data.read(min(size, 7) if size >= 0 else 7)


class Endless:
    """An object that counts what it was asked for, and returns bytes for ever."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.n_bytes = 0

    def read(self, size: int) -> bytes:
        self.n_bytes += self.chunk
        return b"x" * self.chunk


class Sizeless:
    """An object that can only be read whole."""

    def read(self) -> bytes:
        return KINDS["L"].data


def loaded(kind: Kind) -> Image.Image:
    image = Image.open(io.BytesIO(kind.data))
    image.load()
    return image


def copied(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


WAYS: dict[str, Callable[[Kind, Path], Any]] = {
    "str": lambda kind, path: str(path),
    "Path": lambda kind, path: path,
    "PathLike": lambda kind, path: Named(path),
    "bytes": lambda kind, path: kind.data,
    "bytearray": lambda kind, path: bytearray(kind.data),
    "file": lambda kind, path: path.open("rb"),
    "BytesIO read to its end": lambda kind, path: read_to_its_end(kind),
    "stream": lambda kind, path: Unseekable(kind.data),
    "PIL, lazy": lambda kind, path: Image.open(path),
    "PIL, loaded": lambda kind, path: loaded(kind),
    "PIL, copied": lambda kind, path: copied(path),
    "PIL, transposed": lambda kind, path: ImageOps.exif_transpose(loaded(kind)),
    "PIL, RGB": lambda kind, path: loaded(kind).convert("RGB"),
    "array": lambda kind, path: kind.pixels,
    "PIL of an array": lambda kind, path: Image.fromarray(np.ascontiguousarray(kind.pixels)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    paths = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        paths[name] = folder / f"{number}{kind.suffix}"
        paths[name].write_bytes(kind.data)
    return paths


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> ImageTextModel:
    return apecache.load(str(tiny_run), device="cpu")


@pytest.fixture(scope="module")
def index(tiny_index: Path) -> SearchIndex:
    return SearchIndex.open(tiny_index, device="cpu")


def given(way: str, name: str, files: dict[str, Path]) -> Any:
    """None where the way loses what the picture shows, before it is given."""
    if way == "PIL, RGB" and not KINDS[name].survives_convert:
        return None
    return WAYS[way](KINDS[name], files[name])


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_has_the_pixels_that_it_stands_for(name: str, files: dict[str, Path]) -> None:
    found = np.asarray(open_picture(files[name], "picture"))
    assert np.array_equal(found, KINDS[name].pixels)


@pytest.mark.parametrize("way", WAYS)
def test_one_picture_is_one_vector_by_every_way_in(
    way: str,
    model: ImageTextModel,
    files: dict[str, Path],
) -> None:
    """Both lists are one batch with each picture at the same row, so the difference is exactly 0 on
    any machine."""
    expected = model.encode_image([files[name] for name in KINDS])
    pictures = {name: given(way, name, files) for name in KINDS}
    found = model.encode_image(
        [files[name] if picture is None else picture for name, picture in pictures.items()]
    )
    for picture in pictures.values():
        if isinstance(picture, Image.Image | io.IOBase):
            picture.close()
    differences = np.abs(found - expected).max(axis=1)
    row = {
        name: float(d)
        for name, d, p in zip(KINDS, differences, pictures.values(), strict=True)
        if p is not None
    }
    assert row == dict.fromkeys(row, 0.0)
    assert len(row) >= len(KINDS) - 5


@pytest.mark.parametrize("way", WAYS)
def test_a_query_takes_a_picture_by_every_way_in(
    way: str,
    index: SearchIndex,
    files: dict[str, Path],
) -> None:
    for name in ("JPEG, EXIF 6", "RGBA", "CMYK", "16-bit"):
        picture = given(way, name, files)
        if picture is not None:
            expected = index.embed(Query(images=(files[name],)))
            found = index.embed(Query(images=(picture,)))
            if isinstance(picture, Image.Image | io.IOBase):
                picture.close()
            assert float((found - expected).abs().max()) == 0.0, name


def test_the_kinds_are_told_apart(model: ImageTextModel, files: dict[str, Path]) -> None:
    """Without this a vector that ignores the picture would pass. Cosine 0.9999 is far above what
    turns leave."""
    names = [f"JPEG, EXIF {number}" for number in range(1, 9)]
    vectors = model.encode_image([files[name] for name in names])
    cosines = vectors @ vectors.T
    assert cosines[~np.eye(8, dtype=bool)].max() < 0.9999


def test_the_frame_that_is_open_is_taken(model: ImageTextModel, files: dict[str, Path]) -> None:
    with Image.open(files["animated GIF"]) as image:
        image.seek(1)
        later = image.convert("RGB")
        found, expected, first = model.encode_image([image, later, files["animated GIF"]])
    assert (found @ expected) > 1 - 1e-5
    assert (found @ first) < 0.9999


@pytest.mark.parametrize(
    "mode",
    ["1", "La", "RGBa", "PA", "YCbCr", "HSV", "LAB", "I", "F", "RGBX", "I;16B"],
)
def test_every_mode_of_pillow_is_taken(mode: str, model: ImageTextModel) -> None:
    assert model.encode_image([Image.new(mode, (40, 30))]).shape == (1, model.dim)


def test_the_picture_that_was_given_is_not_changed(model: ImageTextModel) -> None:
    image = loaded(KINDS["JPEG, EXIF 6"])
    before = image.tobytes()
    model.encode_image([image, image])
    assert (image.tobytes(), image.getexif()[274], image.mode) == (before, 6, "RGB")


def test_a_file_object_stays_open_and_can_be_given_again(
    model: ImageTextModel,
    files: dict[str, Path],
) -> None:
    with files["RGBA"].open("rb") as file:
        first, second = model.encode_image([file, file])
        assert not file.closed
    assert (first @ second) > 1 - 1e-5


ARRAYS = {
    "of one channel": np.zeros((4, 4), np.uint8),
    "with alpha": np.zeros((4, 4, 4), np.uint8),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "a batch": np.zeros((1, 4, 4, 3), np.uint8),
    "float": np.zeros((4, 4, 3), np.float32),
    "int64": np.zeros((4, 4, 3), np.int64),
    "without a row": np.zeros((0, 4, 3), np.uint8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_another_array_is_refused_with_its_shape_and_dtype(
    name: str,
    model: ImageTextModel,
) -> None:
    array = ARRAYS[name]
    with pytest.raises(OptionError) as caught:
        model.encode_image([array])
    assert f"found an array {list(array.shape)} of {array.dtype}" in str(caught.value)
    assert "uint8 array [height, width, 3]" in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 3, 3.5, object(), [1, 2], {"a": 1}, io.StringIO("text")])
def test_what_is_no_picture_is_refused_before_any_is_opened(
    wrong: Any,
    model: ImageTextModel,
    index: Any,
) -> None:
    missing = "nowhere.jpg"
    with pytest.raises(
        OptionError,
        match=r"images\[1\]: expected a path, bytes, a binary file object, a PIL image",
    ):
        model.encode_image([missing, wrong])
    with pytest.raises(OptionError, match=r"images\[1\]: expected a path"):
        index.find(Query(images=(missing, wrong)))


@pytest.mark.parametrize(
    "single",
    [
        "photo.jpg",
        Path("photo.jpg"),
        b"data",
        io.BytesIO(b"data"),
        Image.new("RGB", (2, 2)),
        np.zeros((2, 2, 3), "u1"),
    ],
)
def test_a_single_picture_is_refused_with_the_advice_to_use_brackets(
    single: Any,
    model: ImageTextModel,
) -> None:
    with pytest.raises(
        OptionError,
        match=r"images: a list is expected, found a single .*; put it in brackets",
    ):
        model.encode_image(single)


@pytest.mark.parametrize("wrong", [None, 3, {"a.jpg": 1}, {"a.jpg"}])
def test_what_is_no_list_is_refused(wrong: Any, model: ImageTextModel) -> None:
    with pytest.raises(OptionError, match="images: expected a list of pictures"):
        model.encode_image(wrong)


def test_pictures_may_come_from_a_generator_or_a_stack(
    model: ImageTextModel,
    files: dict[str, Path],
) -> None:
    names = ["L", "P", "RGBA"]
    expected = model.encode_image([files[name] for name in names])
    assert np.array_equal(model.encode_image(files[name] for name in names), expected)
    stack = np.stack([KINDS[name].pixels for name in names])
    assert np.array_equal(model.encode_image(stack), expected)


def test_a_large_picture_is_read_to_the_end_of_an_unbuffered_pipe() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    # More than a pipe holds: one call of `read` cannot return all of it.
    assert len(data) > 1 << 18
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb", buffering=0) as file:
        found = open_picture(file, "picture")
    writer.join()
    assert np.array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("chunk", [1, 1000, 10_000_000])
def test_a_file_object_that_never_ends_stops_at_the_limit(
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apecache.data.images.MAX_IMAGE_BYTES", 20_000)
    file: Any = Endless(chunk)
    with pytest.raises(
        RowError,
        match="too-large: picture has more bytes than the limit of 20,000",
    ):
        open_picture(file, "picture")
    assert file.n_bytes <= 20_000 + chunk


def test_a_file_object_of_exactly_the_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS["L"].data
    monkeypatch.setattr("apecache.data.images.MAX_IMAGE_BYTES", len(data))
    assert open_picture(io.BytesIO(data), "picture").size == (30, 40)
    monkeypatch.setattr("apecache.data.images.MAX_IMAGE_BYTES", len(data) - 1)
    with pytest.raises(RowError, match="too-large"):
        open_picture(io.BytesIO(data), "picture")


def test_a_file_object_whose_read_takes_no_size_is_refused(
    model: ImageTextModel,
    index: SearchIndex,
) -> None:
    file: Any = Sizeless()
    expected = r"images\[0\]: expected a path, .* found a file object whose read\(size\) fails"
    with pytest.raises(OptionError, match=expected):
        model.encode_image([file])
    with pytest.raises(OptionError, match=expected):
        index.embed(Query(images=(file,)))


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


def cut() -> Image.Image:
    """Opened, but its pixels end too early."""
    return Image.open(io.BytesIO(KINDS["RGBA"].data[:200]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", r"images\[0\] has 0 bytes"),
        (lambda: b"<html>", r"images\[0\] is a web page; expected JPEG"),
        (
            lambda: Image.new("RGB", (0, 0)),
            r"images\[0\] has 0 x 0 pixels; expected at least 1 x 1",
        ),
        (
            lambda: Image.new("RGBA", (0, 3)),
            r"images\[0\] has 0 x 3 pixels; expected at least 1 x 1",
        ),
        (closed_file, r"images\[0\]: I/O operation on closed file"),
        (cut, r"images\[0\] cannot be decoded"),
        (lambda: KINDS["L"].data[:-60], r"images\[0\] cannot be decoded"),
        (lambda: "a\0b.jpg", r"'a\\x00b\.jpg' is not the name of a file"),
        (lambda: "nowhere.jpg", r"nowhere\.jpg: no such file"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(
    make: Callable[[], Any],
    reason: str,
    model: ImageTextModel,
    index: SearchIndex,
) -> None:
    with pytest.raises(DataError, match=f"^image cannot be read: {reason}"):
        model.encode_image([make()])
    with pytest.raises(DataError, match=f"^query image cannot be read: {reason}"):
        index.embed(Query(images=(make(),)))


def test_the_limit_of_pixels_holds_for_every_way_in(
    model: ImageTextModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apecache.data.images.MAX_PIXELS", 1199)
    for picture in (KINDS["L"].data, loaded(KINDS["L"]), KINDS["L"].pixels):
        with pytest.raises(DataError, match="30 x 40 pixels; the limit is 1,199"):
            model.encode_image([picture])


@pytest.mark.parametrize("way", ["str", "bytes", "file", "PIL, lazy", "array"])
def test_a_function_that_opens_images_may_return_any_form(
    way: str,
    model: ImageTextModel,
    files: dict[str, Path],
    tiny_store: Path,
) -> None:
    """For a tower that trained, `embed_rows` calls the user's `open_image`; the encoder stands for
    such a tower."""

    class Live:
        def embed(self, inputs: Any, batch: int = 64) -> Any:
            assert all(type(image) is Image.Image and image.mode == "RGB" for image in inputs)
            return model._embed_images(inputs)

    side: Any = Live()
    rows = np.array([0])
    store = FeatureStore.open(tiny_store)
    for name in ("JPEG, EXIF 6", "RGBA"):
        picture = given(way, name, files)
        found = embed_rows(
            side,
            store=store,
            modality="image",
            rows=rows,
            open_image=lambda _, picture=picture: picture,
        )
        if isinstance(picture, Image.Image | io.IOBase):
            picture.close()
        assert np.array_equal(found.numpy(), model.encode_image([files[name]]))


def test_nothing_is_written(model: ImageTextModel, files: dict[str, Path]) -> None:
    folder = files["L"].parent
    before = tree(folder)
    model.encode_image(list(files.values()))
    assert tree(folder) == before
