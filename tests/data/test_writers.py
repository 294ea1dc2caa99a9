"""Inputs that clip_benchmark's and img2dataset's own writers make."""

import contextlib
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from google_crc32c import value as crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import CAPTIONS, image_bytes

from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, RowError

pytest.importorskip("webdataset")
pytestmark = [
    # The writers leave files to the garbage collector, and ask for more processes than there are.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clip_benchmark writes, but without eight processes for five images."""
    import torch.utils.data

    class Loader(torch.utils.data.DataLoader[Any]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "num_workers": 0})

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)


@pytest.mark.parametrize("below", [".", "test"])
def test_clip_benchmarks_retrieval_data(below: str, tmp_path: Path, one_process: None) -> None:
    builder = pytest.importorskip("clip_benchmark.webdataset_builder")
    captions = [[f"{caption} {number}" for number in range(3)] for caption in CAPTIONS]
    images = [image_bytes(number) for number in range(5)]
    builder.convert_retrieval_dataset(
        list(zip(images, captions, strict=True)),
        "test",
        str(tmp_path),
        image_format="png",
        max_count=2,
        verbose=False,
    )
    source = open_pairs(tmp_path / below)
    assert [list(pair.captions) for pair in source] == captions
    assert [source.media.read(key) for key in source.keys] == images
    assert source.skipped == {}


def test_clip_benchmarks_classification_data(tmp_path: Path, one_process: None) -> None:
    builder = pytest.importorskip("clip_benchmark.webdataset_builder")

    class Labeled(list[tuple[bytes, int]]):
        classes = ("cat", "dog")
        templates = ("a {c}",)

    dataset = Labeled((image_bytes(number), number % 2) for number in range(5))
    builder.convert_dataset(dataset, "test", str(tmp_path), image_format="png", verbose=False)
    source = open_pairs(tmp_path)
    assert [pair.label for pair in source] == ["cat", "dog", "cat", "dog", "cat"]
    assert source.captions == []


def img2dataset_writers() -> Any:
    """The module of writers alone: the package itself imports what downloads and resizes."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or not package.submodule_search_locations:
        pytest.skip("img2dataset is not installed")
    path = Path(package.submodule_search_locations[0]) / "writer.py"
    spec = importlib.util.spec_from_file_location("img2dataset_writer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    ["FilesSampleWriter", "WebDatasetSampleWriter", "ParquetSampleWriter"],
)
def test_img2datasets_output(name: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    writers = img2dataset_writers()
    columns = ["key", "caption", "url", "status"]
    if name == "ParquetSampleWriter":
        columns.append("txt")
    schema = pa.schema([(column, pa.string()) for column in columns])
    for shard in range(2):
        writer = getattr(writers, name)(shard, str(tmp_path), True, 5, schema, "png")
        for number in range(5):
            key = f"{shard:05d}{number:04d}"
            caption = None if number == 4 else f"{CAPTIONS[number]} {shard}"
            meta = {"key": key, "caption": caption, "url": f"http://x/{key}", "status": "success"}
            writer.write(image_bytes(number), key, caption, meta)
        writer.close()
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 5}))
    source = open_pairs(tmp_path, OpenSpec(key_column="key"))
    assert source.keys == [f"{shard:05d}{row:04d}" for shard in range(2) for row in range(5)]
    expected = [(f"{CAPTIONS[row]} {shard}",) for shard in range(2) for row in range(4)]
    assert [pair.captions for pair in source if pair.captions] == expected
    assert [source.media.read(key) for key in source.keys[:5]] == [*map(image_bytes, range(5))]
    assert source.skipped["rows without a caption"] == 2
    assert source.skipped["files .json"] == 2
    assert {pair.label for pair in source} == {""}


# --- TFRecord, by its published layout: TensorFlow is too large to install for it -----------------


def varint(number: int) -> bytes:
    number %= 2**64
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value: Any) -> bytes:
    match value:
        case bytes():
            return message(1, message(1, value))
        case float():
            return message(2, message(1, struct.pack("<f", value)))
        case _:
            return message(3, message(1, varint(value)))


def tfrecord(features: dict[str, Any]) -> bytes:
    entries = b"".join(
        message(1, message(1, name.encode()) + message(2, feature(value)))
        for name, value in features.items()
    )
    data = message(1, entries)
    length = struct.pack("<Q", len(data))

    def masked(content: bytes) -> bytes:
        checksum = crc32c(content)
        rotated = checksum >> 15 | checksum << 17
        return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)

    return length + masked(length) + data + masked(data)


def img2dataset_tfrecords(folder: Path) -> list[Path]:
    paths = []
    for shard in range(2):
        records = []
        for number in range(3):
            features = {
                "key": f"{shard}{number}".encode(),
                "png": image_bytes(number),
                "txt": b"" if number == 2 else f"caption {number}".encode(),
                "width": 40,
                "similarity": 0.5,
                "label": -number,
                "url": b"",
            }
            records.append(tfrecord(features))
        paths.append(folder / f"{shard:05d}.tfrecord")
        paths[-1].write_bytes(b"".join(records))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"not read")
    return paths


@pytest.mark.parametrize("form", ["", "{00000..00001}.tfrecord", "*.tfrecord"])
def test_img2datasets_tfrecords(form: str, tmp_path: Path) -> None:
    img2dataset_tfrecords(tmp_path)
    source = open_pairs(str(tmp_path / form))
    assert source.keys == ["00", "01", "02", "10", "11", "12"]
    assert [pair.captions for pair in source] == [("caption 0",), ("caption 1",), ()] * 2
    assert [pair.label for pair in source] == ["0", "-1", "-2"] * 2
    assert source.media.read("11") == image_bytes(1)
    assert source.media.sizes(["02"]) == [len(image_bytes(2))]
    by_width = open_pairs(tmp_path, OpenSpec(caption_template="{width} px, {similarity}"))
    assert by_width.captions[0] == "40 px, 0.5"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 0.999), new=st.binary(max_size=3))
def test_a_damaged_tfrecord_gives_pairs_or_a_manifest_error(
    tmp_path: Path,
    where: float,
    new: bytes,
) -> None:
    path = img2dataset_tfrecords(tmp_path)[0]
    data = path.read_bytes()
    at = int(where * len(data))
    path.write_bytes(data[:at] + new if where < 0.5 else data[:at] + new + data[at + 1 :])
    try:
        source = open_pairs(path)
    except ManifestError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    for key in source.keys:
        with contextlib.suppress(RowError):
            source.media.read(key)
