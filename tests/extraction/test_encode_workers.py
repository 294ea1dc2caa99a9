"""Encoding beside decoding processes: the same bits as with threads, and a lost decoder costs one
row."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from apecache.data.sources import open_pairs
from apecache.encoders.encoder import ImageEncoder
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.extraction.encode import ArrayTarget, EncodedShard, ImageJob
from apecache.store.layout import ArrayLayout, ArrayRecord


def encoder_of(folder: Path, **settings: Any) -> ImageEncoder:
    return load_image_encoder(replace(parse_encoder(f"timm:{folder}", "image"), **settings), "cpu")


def shards(
    table: Path,
    encoder: ImageEncoder,
    workers: int,
    hang_seconds: float = 30.0,
) -> list[EncodedShard]:
    source = open_pairs(table)
    layout = ArrayLayout(
        rows=len(source),
        dim=encoder.dim,
        dtype="float32",
        shard_rows=5,
        batch_size=4,
        threads=1,
    )
    record = ArrayRecord(
        modality="image",
        name="name",
        spec=encoder.spec,
        fingerprint=encoder.fingerprint,
        layout=layout,
        metadata={},
        environment={},
        table="",
    )
    job = ImageJob(
        source=source,
        targets=(ArrayTarget(encoder=encoder, record=record),),
        workers=workers,
        views=None,
        hang_seconds=hang_seconds,
    )
    return list(job.shards(range(layout.n_shards), lambda n: None))


@pytest.mark.parametrize("resize", ["reference", "torchvision"])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_processes_give_the_bits_of_threads(
    shapes_once: Path,
    tiny_image_encoder: Path,
    resize: str,
    workers: int,
) -> None:
    encoder = encoder_of(tiny_image_encoder, resize=resize)
    there = shards(shapes_once, encoder, 0)
    here = shards(shapes_once, encoder, workers)
    for a, b in zip(there, here, strict=True):
        assert a.features[0].tobytes() == b.features[0].tobytes()
        assert a.content == b.content


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        (lambda: os._exit(1), "decoder-crash"),
        (lambda: os.kill(os.getpid(), 11), "decoder-crash"),
        (lambda: time.sleep(60), "decoder-hang"),
    ],
    ids=["exit", "segmentation fault", "hang"],
)
def test_a_lost_decoder_costs_one_row_and_leaves_its_neighbors_bits(
    shapes_once: Path,
    tiny_image_encoder: Path,
    death: Callable[[], None],
    reason: str,
) -> None:
    encoder = encoder_of(tiny_image_encoder)
    whole = shards(shapes_once, encoder, 0)
    deadly = np.asarray(
        Image.open(shapes_once.parent / open_pairs(shapes_once).keys[6]).convert("RGB")
    ).tobytes()

    def preprocess(image: Image.Image) -> Tensor:
        if image.tobytes() == deadly:
            death()
        return encoder.preprocess(image)

    found = shards(shapes_once, replace(encoder, preprocess=preprocess), 2, hang_seconds=1.0)
    bad = {5 * i + row: error for i, shard in enumerate(found) for row, error in shard.bad.items()}
    assert {row: error.reason for row, error in bad.items()} == {6: reason}
    assert open_pairs(shapes_once).keys[6] in bad[6].detail
    rows = [np.concatenate([shard.features[0] for shard in run]) for run in (whole, found)]
    kept = [row for row in range(12) if row != 6]
    assert rows[0][kept].tobytes() == rows[1][kept].tobytes()
    assert [
        row for row, digest in enumerate(d for shard in found for d in shard.content) if not digest
    ] == [6]


def test_tensor_encoders_get_tensors_and_others_images(
    shapes_once: Path,
    tiny_image_encoder: Path,
) -> None:
    for resize, kind in (("reference", Image.Image), ("torchvision", Tensor)):
        encoder = encoder_of(tiny_image_encoder, resize=resize)
        seen = list[type]()

        def preprocess(
            image: Any,
            encoder: ImageEncoder = encoder,
            seen: list[type] = seen,
        ) -> Tensor:
            seen.append(type(image))
            return encoder.preprocess(image)

        shards(shapes_once, replace(encoder, preprocess=preprocess), 0)
        assert len(seen) == 12
        assert all(issubclass(found, kind) for found in seen)
