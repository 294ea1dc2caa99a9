"""What a training step reads: views of live images that depend on seed, epoch and key alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apecache.data.augment import Views
from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.train.live import ImageInputs

KEYS = [f"images/{color}-circle-0.png" for color in ("red", "green", "blue")]


@pytest.fixture
def inputs(tiny_image_encoder: Path, shapes_once: Path) -> ImageInputs:
    media = FolderMedia(root=shapes_once.parent)
    encoder = load_image_encoder(parse_encoder(f"timm:{tiny_image_encoder}", "image"), "cpu")
    return ImageInputs(
        keys=KEYS,
        open_image=lambda key: load_image(key, media).image,
        preprocess=encoder.preprocess,
        device=encoder.device,
    )


def test_without_views_images_are_preprocessed_as_for_extraction(inputs: ImageInputs) -> None:
    pixels, mask = inputs.take([0, 2])
    assert mask is None
    assert torch.equal(pixels[1], inputs.preprocess(inputs.open_image(KEYS[2])))


@pytest.mark.parametrize("views", [Views(1, 0), Views(1, 0, (0.3, 0.6), flip=False, operations=0)])
def test_a_view_depends_on_seed_epoch_and_image_alone(views: Views, inputs: ImageInputs) -> None:
    plain = inputs.take([0, 1, 2])[0]
    first = inputs.augmented(views, 1).take([0, 1, 2])[0]
    assert not torch.equal(first, plain)
    assert torch.equal(inputs.augmented(views, 1).take([2, 0])[0], first[[2, 0]])
    others: list[Any] = [
        inputs.augmented(views, 2),
        inputs.augmented(Views(1, 1, *views_of(views)), 1),
    ]
    assert not any(torch.equal(other.take([0, 1, 2])[0], first) for other in others)
    assert torch.equal(inputs.take([0, 1, 2])[0], plain)


def views_of(views: Views) -> tuple[Any, ...]:
    return views.scale, views.ratio, views.flip, views.operations, views.magnitude


def test_flipping_alone_mirrors_half_of_the_epochs(inputs: ImageInputs) -> None:
    views = Views(1, seed=0, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True, operations=0)
    halves = Image.new("RGB", (32, 32), "white")
    halves.paste((0, 0, 0), (0, 0, 16, 32))
    inputs = replace(inputs, open_image=lambda _: halves)
    plain = inputs.take([0])[0]
    found = [inputs.augmented(views, epoch).take([0])[0] for epoch in range(40)]
    assert 8 < sum(torch.equal(pixels, plain) for pixels in found) < 32
    assert all(
        torch.equal(pixels, plain) or torch.equal(pixels, plain.flip(-1)) for pixels in found
    )
