"""JPEG files decoded on the device, with a stand-in for nvJPEG: batches, fallbacks, refusals."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from torch import Tensor

import apecache.extraction.device_decoding as device_decoding
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.data.tensors import decode_tensor, plain_jpeg_or_pixels
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import MismatchError, OptionError, RowError
from apecache.extraction.run import ExtractSpec, extract
from apecache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")
N_ROWS = 11
REFUSED = 4
"""Row of a JPEG that the device refuses and the CPU decodes."""
PNG = 6
BROKEN = 8


def picture(row: int) -> Image.Image:
    pixels = np.random.default_rng(row).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((40 + row, 50), Image.Resampling.BICUBIC)


def jpeg(row: int) -> bytes:
    file = io.BytesIO()
    picture(row).save(file, "JPEG", quality=60 + row)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> PairSource:
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(N_ROWS):
        path = folder / f"{row}.jpg"
        if row == PNG:
            picture(row).save(path, "PNG")
        elif row == BROKEN:
            path.write_bytes(jpeg(row)[:-200])
        else:
            path.write_bytes(jpeg(row))
    pairs = tuple(Pair(key=f"{row}.jpg", captions=(), languages=()) for row in range(N_ROWS))
    return PairSource(pairs, media=FolderMedia(root=folder))


@pytest.fixture
def encoder(tiny_image_encoder: Path) -> EncoderSpec:
    return replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), resize="torchvision")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for nvJPEG on the CPU, whose pixels are 3 brighter; sizes of its batches."""
    sizes: list[int] = []
    real: Callable[..., Any] = torchvision.io.decode_jpeg
    refused = jpeg(REFUSED)

    def decode_jpeg(files: Any, mode: str, device: Any = "cpu") -> Any:
        if isinstance(files, Tensor):
            return real(files, mode)
        sizes.append(len(files))
        assert torch.device(device).type == "cpu"
        if any(file.numpy().tobytes() == refused for file in files):
            raise RuntimeError("nvjpegDecode failed: 4")
        # As this one, the real decoder warns that it is deprecated.
        return [(real(file, mode).int() + 3).clamp(max=255).to(torch.uint8) for file in files]

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(device_decoding, "can_decode_on", lambda device: True)
    return sizes


def spec_of(encoder: EncoderSpec, **settings: Any) -> ExtractSpec:
    return ExtractSpec(
        image=encoder,
        image_batch=4,
        shard_rows=6,
        storage_dtype="float32",
        max_bad=0.5,
        device="cpu",
        workers=0,
        **settings,
    )


def test_jpegs_are_decoded_in_batches_and_all_else_on_the_cpu(
    source: PairSource,
    encoder: EncoderSpec,
    batches: list[int],
    tmp_path: Path,
) -> None:
    extract(source, tmp_path / "device", spec_of(encoder, decode="cuda"))
    # Shards of 6 and 5 rows in batches of 4, 2, 4 and 1; one is no JPEG, one is cut short. The
    # batch with a file that is refused is decoded again one by one.
    assert batches == [4, 2, 1, 1, 2, 1]
    extract(source, tmp_path / "cpu", spec_of(encoder))
    on_device = FeatureStore.open(tmp_path / "device").array("image")
    on_cpu = FeatureStore.open(tmp_path / "cpu").array("image")
    same = [
        bool((there == here).all())
        for there, here in zip(on_device.load(), on_cpu.load(), strict=True)
    ]
    rows_ok = on_device.load_ok()
    assert np.flatnonzero(~rows_ok).tolist() == np.flatnonzero(~on_cpu.load_ok()).tolist()
    assert np.flatnonzero(~rows_ok).tolist() == [BROKEN]
    assert [row for row in range(N_ROWS) if same[row]] == [REFUSED, PNG]
    contents = [shard.content for shard in on_device.commits.values()]
    assert contents == [shard.content for shard in on_cpu.commits.values()]


def test_it_has_a_fingerprint_of_its_own_and_a_later_run_goes_the_same_way(
    source: PairSource,
    encoder: EncoderSpec,
    batches: list[int],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    extract(source, store, spec_of(encoder, decode="cuda"))
    array = FeatureStore.open(store).array("image")
    assert array.record.fingerprint.fields["decode"] == "cuda"
    whole = array.load()
    (store / f"records/image/{array.name}/commits/00000001.json").unlink()
    batches.clear()
    # Without the option, and with the check of the rows that are committed.
    extract(source, store, spec_of(encoder))
    assert batches
    assert FeatureStore.open(store).array("image").load().tobytes() == whole.tobytes()
    with pytest.raises(MismatchError, match="decode"):
        extract(source, store, spec_of(encoder, decode="cpu"))
    extract(source, tmp_path / "cpu", spec_of(encoder))
    with pytest.raises(MismatchError, match="decode"):
        extract(source, tmp_path / "cpu", spec_of(encoder, decode="cuda"))


def test_where_there_is_no_cuda_it_is_refused(
    source: PairSource,
    encoder: EncoderSpec,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match="expected a CUDA device, found cpu; use --device cuda"):
        extract(source, tmp_path / "store", spec_of(encoder, decode="cuda"))


def test_encoders_that_resize_images_of_pillow_are_refused(
    source: PairSource,
    encoder: EncoderSpec,
    batches: list[int],
    tmp_path: Path,
) -> None:
    reference = replace(encoder, resize="reference")
    with pytest.raises(OptionError, match="add --resize torchvision"):
        extract(source, tmp_path / "store", spec_of(reference, decode="cuda"))


def test_a_file_is_left_to_the_device_only_if_it_is_a_plain_and_complete_jpeg() -> None:
    data = jpeg(0)
    assert plain_jpeg_or_pixels(data, "key").numpy().tobytes() == data
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    picture(1).save(turned, "JPEG", exif=exif)
    pixels = plain_jpeg_or_pixels(turned.getvalue(), "key")
    assert torch.equal(pixels, decode_tensor(turned.getvalue(), "key"))
    assert pixels.shape == (3, 41, 50)
    with pytest.raises(RowError) as refusal:
        plain_jpeg_or_pixels(data[:-100], "key")
    assert refusal.value.reason == "truncated"
