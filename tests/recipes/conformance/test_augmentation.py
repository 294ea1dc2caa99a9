"""Augmented images against the statistics of the published operations."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from apecache.data.augment import FILL, Views
from apecache.recipes.recipe import freeze_names, load_recipe

N_VIEWS = 1500
LILT = Views(N_VIEWS, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, operations=2, magnitude=7.0)


def landscape(side: int = 64) -> Image.Image:
    """Smooth shades over the whole range of values, with texture and without the gray of the
    fill."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    texture = 0.15 * np.sin(40 * x) * np.cos(31 * y)
    channels = [x, y, 1 - (x + y) / 2]
    pixels = np.stack([np.clip(channel + texture, 0, 1) for channel in channels], axis=2)
    values = np.round(255 * pixels).astype(np.uint8)
    values[0, 0] = 0
    values[-1, -1] = 255
    return Image.fromarray(values)


def views() -> list[NDArray[np.int_]]:
    image = landscape()
    return [np.asarray(view).astype(int) for view in LILT.of(image, "a")]


def test_lilt_leaves_36_percent_of_full_range_images_untouched() -> None:
    """Each of two draws changes nothing if it is not applied (1/2), or identity or autocontrast of
    a full range (2 of 10): (1/2 + 1/2 x 2/10)^2 = .36."""
    image = np.asarray(landscape()).astype(int)
    share = np.mean([np.array_equal(view, image) for view in views()])
    assert share == pytest.approx(0.36, abs=0.04)


def test_lilt_fills_three_percent_and_changes_pixels_as_much_as_the_formulas_say() -> None:
    """Written down again: per draw with probability 1/2 one of ten operations."""
    image = landscape()
    original = np.asarray(image).astype(int)
    changes = [np.abs(view - original).mean() for view in views()]
    filled = [np.all(view == np.array(FILL), axis=2).mean() for view in views()]
    reference = [reference_view(image, seed) for seed in range(N_VIEWS)]
    reference_changes = [np.abs(view - original).mean() for view in reference]
    reference_filled = [np.all(view == np.array(FILL), axis=2).mean() for view in reference]
    # Standard errors of the means over 1,500 views are about 2 to 4 % of the means.
    assert np.mean(changes) == pytest.approx(np.mean(reference_changes), rel=0.15)
    assert np.mean(filled) == pytest.approx(np.mean(reference_filled), rel=0.2)
    assert 0.015 < np.mean(filled) < 0.05


def reference_view(image: Image.Image, seed: int) -> NDArray[np.int_]:
    """RandAugment(2, 7) by its formulas on arrays: nearest pixels where ours interpolates."""
    chance = np.random.default_rng(seed)
    pixels = np.asarray(image).astype(float)
    for _ in range(2):
        operation = int(chance.integers(10))
        if chance.random() < 0.5:
            pixels = operate(pixels, operation, 1.0 if chance.random() < 0.5 else -1.0)
    return np.clip(pixels, 0, 255).astype(int)


def operate(pixels: NDArray[np.float64], operation: int, sign: float) -> NDArray[np.float64]:
    side = len(pixels)
    center = (side - 1) / 2
    angle = np.deg2rad(21.0) * sign
    cosine = np.cos(angle)
    sine = np.sin(angle)
    shift = 7 * side / 256 * sign
    moves = {
        5: np.array([[1, 0.21 * sign, 0], [0, 1, 0]]),
        6: np.array([[1, 0, 0], [0.21 * sign, 1, 0]]),
        7: np.array([[1, 0, shift], [0, 1, 0]]),
        8: np.array([[1, 0, 0], [0, 1, shift]]),
        9: np.array(
            [
                [cosine, sine, center - center * (cosine + sine)],
                [-sine, cosine, center + center * (sine - cosine)],
            ]
        ),
    }
    match operation:
        case 0 | 1:  # identity, and autocontrast of a full range
            return pixels
        case 2:
            return equalized(pixels)
        case 3:
            return np.clip(1.36 * pixels, 0, 255)
        case 4:
            return np.clip(pixels + 0.36 * (pixels - smoothed(pixels)), 0, 255)
    return moved(pixels, moves[operation])


def equalized(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    channels = []
    for channel in np.moveaxis(pixels, 2, 0):
        counts = np.bincount(channel.astype(int).ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step == 0:
            channels.append(channel)
            continue
        before = np.concatenate([[step // 2], counts[:-1]]).cumsum()
        table = np.clip(before // step, 0, 255)
        channels.append(table[channel.astype(int)].astype(float))
    return np.stack(channels, axis=2)


def smoothed(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel of ones with 5 in the middle, over 13; the border stays."""
    result = pixels.copy()
    inner = 4 * pixels[1:-1, 1:-1]
    side = len(pixels)
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            inner = inner + pixels[down : side - 2 + down, right : side - 2 + right]
    result[1:-1, 1:-1] = inner / 13
    return result


def moved(pixels: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each output pixel takes that at `matrix` of its place, or the fill outside."""
    side = len(pixels)
    y, x = np.mgrid[0:side, 0:side]
    from_x = np.round(matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]).astype(int)
    from_y = np.round(matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]).astype(int)
    inside = (from_x >= 0) & (from_x < side) & (from_y >= 0) & (from_y < side)
    result = np.full_like(pixels, FILL[0])
    result[inside] = pixels[from_y[inside], from_x[inside]]
    return result


@pytest.mark.parametrize("row", "bdeghijkmop")
def test_lilts_rows_that_train_the_image_tower_crop_mirror_and_distort(row: str) -> None:
    spec = load_recipe(f"lilt-{row}").augmentation.image
    assert spec is not None
    assert (spec.scale, spec.flip, spec.operations, spec.magnitude) == ((0.2, 1.0), True, 2, 7.0)
    assert spec.jitter == 0


@pytest.mark.parametrize("name", ["shared-encoder", "see-hear-read"])
def test_the_shared_encoder_crops_mirrors_and_jitters_colors(name: str) -> None:
    spec = load_recipe(name).augmentation.image
    assert spec is not None
    assert (spec.scale, spec.flip, spec.operations, spec.jitter) == ((0.9, 1.0), True, 0, 0.4)


def test_jitter_multiplies_brightness_contrast_and_saturation_by_uniform_factors() -> None:
    """The mean of a gray image changes by its brightness alone: uniform in .6 to 1.4."""
    gray = Image.new("RGB", (16, 16), (100, 100, 100))
    jittered = Views(2000, scale=(1, 1), ratio=(1, 1), flip=False, operations=0, jitter=0.4)
    factors = np.array([np.asarray(view).mean() / 100 for view in jittered.of(gray, "a")])
    assert factors.min() == pytest.approx(0.6, abs=0.02)
    assert factors.max() == pytest.approx(1.4, abs=0.02)
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert factors.std() == pytest.approx(0.8 / 12**0.5, abs=0.02)


@pytest.mark.parametrize("name", freeze_names())
def test_freezing_crops_where_the_image_tower_trains(name: str) -> None:
    spec = load_recipe(name).augmentation.image
    if name.startswith("freeze/Vff"):
        assert spec is None
    else:
        assert spec is not None
        assert (spec.scale, spec.flip, spec.operations, spec.jitter) == ((0.9, 1.0), False, 0, 0.0)
