"""Pixels that are sent as uint8 and normalized on the device, and results that are copied back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_device import register
from pretended_device.register import DEVICE, Counts, largest_distance
from tiny import make_shapes

from apecache.data.sources import open_pairs
from apecache.device import HostCopy
from apecache.encoders.encoder import encode_images
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.extraction.encode import ArrayTarget, ImageJob
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
    record: Any = None
    target = ArrayTarget(encoder=load_image_encoder(spec, device), record=record)
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
