"""Pixels that are sent as uint8 and normalized on the device, and results that are copied back."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from pretended_device import register
from pretended_device.register import DEVICE, Counts, largest_distance
from tiny import make_shapes

import apecache.extraction.device_decoding as device_decoding
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.device import HostCopy
from apecache.encoders.encoder import encode_images
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.extraction.encode import ArrayTarget, ImageJob, RowCopy
from apecache.extraction.run import extract
from apecache.extraction.spec import ExtractSpec
from apecache.store.reader import FeatureStore


@pytest.fixture
def spec(tiny_image_encoder: Path) -> Any:
    return replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), resize="torchvision")


def test_uint8_pixels_give_the_features_of_normalized_ones(spec: Any) -> None:
    there = load_image_encoder(spec, register.NAME)
    preprocess = there.pixel_preprocess
    assert preprocess is not None
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 50, 40), generator=generator, dtype=torch.uint8)
    pixels = torch.stack([preprocess.pixels(image) for image in images])
    floats = torch.stack([there.preprocess(image) for image in images])  # type: ignore[arg-type]
    (sent_as_bytes,) = encode_images([there], pixels)
    (sent_as_floats,) = encode_images([there], floats)
    assert largest_distance([sent_as_bytes], [sent_as_floats]) < 1e-6


def test_normalizing_on_the_device_never_waits(spec: Any) -> None:
    there = load_image_encoder(spec, register.NAME)
    pixels = torch.zeros(2, *there.input_shape, dtype=torch.uint8).pin_memory()
    there.move(pixels)
    with Counts() as counts:
        there.move(pixels)
    assert counts.waits == {}
    assert counts.races == []


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), (register.NAME, torch.uint8)]
)
def test_only_an_accelerator_is_sent_bytes(spec: Any, device: str, dtype: torch.dtype) -> None:
    encoder = load_image_encoder(spec, device)
    # Of the record only the fingerprint is looked at, which says where images are decoded.
    record: Any = SimpleNamespace(fingerprint=encoder.fingerprint)
    target = ArrayTarget(encoder=encoder, record=record)
    source: Any = None
    assert ImageJob(source=source, targets=(target,), workers=0).pixel_dtype == dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_extracted_features_are_those_of_the_cpu(
    spec: Any,
    tmp_path: Path,
    workers: int,
) -> None:
    table = make_shapes(tmp_path / "shapes", copies=1)
    loaded = []
    for device in (register.NAME, "cpu"):
        asked = ExtractSpec(
            image=spec,
            image_batch=4,
            shard_rows=6,
            storage_dtype="float32",
            precision="float32",
            workers=workers,
            device=device,
        )
        extract(open_pairs(table), tmp_path / device, asked)
        loaded.append(FeatureStore.open(tmp_path / device).arrays("image")[0].load())
    assert np.allclose(loaded[0], loaded[1], atol=1e-5)


def test_a_copy_to_the_host_is_not_waited_for_before_it_is_read() -> None:
    there = torch.arange(6.0, device=DEVICE).view(2, 3)
    with Counts() as counts:
        copy = HostCopy(there)
    assert counts.waits == {}
    assert copy.read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert HostCopy(torch.ones(2)).read().tolist() == [1, 1]


def test_jpegs_that_the_device_decodes_give_the_features_of_the_cpu(
    spec: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in for nvJPEG decodes as the CPU does, but puts the pixels onto the device."""
    real: Any = torchvision.io.decode_jpeg
    sizes: list[int] = []

    def decode_jpeg(files: Any, mode: str, device: Any = "cpu") -> Any:
        if isinstance(files, torch.Tensor):
            return real(files, mode)
        sizes.append(len(files))
        return [real(file, mode).to(device) for file in files]

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(device_decoding, "can_decode_on", lambda device: device == DEVICE)
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(10):
        pixels = np.random.default_rng(row).integers(0, 256, (6, 7, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((40 + row, 50))
        picture.save(folder / f"{row}.jpg", "PNG" if row == 5 else "JPEG")
    pairs = tuple(Pair(key=f"{row}.jpg", captions=(), languages=()) for row in range(10))
    source = PairSource(pairs, media=FolderMedia(root=folder))
    loaded = []
    decoders: tuple[tuple[str, Any], ...] = ((register.NAME, "cuda"), ("cpu", "cpu"))
    for device, decode in decoders:
        asked = ExtractSpec(
            image=spec,
            image_batch=4,
            shard_rows=6,
            storage_dtype="float32",
            precision="float32",
            device=device,
            decode=decode,
        )
        extract(source, tmp_path / device, asked)
        loaded.append(FeatureStore.open(tmp_path / device).arrays("image")[0].load())
    assert sizes == [4, 1, 4]
    # Both resize by the same kernels here, but the pixels are rounded on either side.
    norms = np.linalg.norm(loaded[0], axis=1) * np.linalg.norm(loaded[1], axis=1)
    assert ((loaded[0] * loaded[1]).sum(1) / norms).min() > 0.9999


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_are_rounded_on_the_device_without_a_wait(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 2.0], [1e6, 0.1], [torch.nan, 1.0]])
    there = values.to(DEVICE)
    with Counts() as counts:
        copy = RowCopy(there, dtype)
    assert counts.waits == {}
    assert counts.races == []
    assert copy.finite().tolist() == [True, True, False]
    np.testing.assert_array_equal(copy.rows(), values.to(dtype).numpy())
