"""Whole views: what a preprocessing crops is measured, and a view is shown uncropped."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from apecache.encoders.whole_view import whole_view


def transform(edge: int | list[int], crop: list[int]) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(edge, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(crop),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]),
        ]
    )


@pytest.mark.parametrize(
    ("edge", "crop", "height_share", "width_share"),
    [
        (256, [224, 224], 0.875, 0.875),
        (128, [112, 96], 0.875, 0.75),
        ([64, 64], [64, 64], 1.0, 1.0),
        (64, [32, 64], 0.5, 1.0),
    ],
)
def test_the_share_that_is_kept_is_measured(
    edge: int | list[int],
    crop: list[int],
    height_share: float,
    width_share: float,
) -> None:
    found = whole_view(transform(edge, crop))
    assert found.height_share == pytest.approx(height_share, abs=0.004)
    assert found.width_share == pytest.approx(width_share, abs=0.004)


def test_a_view_is_resized_and_not_cropped() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    view = small.resize((448, 448), Image.Resampling.BICUBIC)
    cropped = transform(256, [224, 224])
    whole = whole_view(cropped)(view)
    expected = transform([224, 224], [224, 224])(view)
    assert whole.shape == expected.shape
    # Up to the last pixels, whose filter reaches into the margin.
    inner = (slice(None), slice(3, -3), slice(3, -3))
    assert float((whole - expected)[inner].abs().mean()) < 0.05
    assert float((cropped(view) - expected)[inner].abs().mean()) > 0.3
