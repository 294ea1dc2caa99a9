"""Augmented images against the statistics and the formulas of the published operations."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny import draw_landscape

from apecache.data.augment import FILL, OPERATIONS, Views
from apecache.recipes.recipe import freeze_names, load_recipe

Pixels = NDArray[np.float64]
N_VIEWS = 2000
LILT = Views(N_VIEWS, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, operations=2, magnitude=7.0)
SIDE = 64
FULL = (0, 255)
DULL = (40, 200)
"""Darkest and lightest value of an image that autocontrast changes."""


def landscape(shades: tuple[int, int] = FULL) -> Image.Image:
    return draw_landscape(SIDE, SIDE, shades)


def array_of(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(float)


def changes_of(view: Pixels, original: Pixels) -> tuple[bool, float, float]:
    """Whether it is changed, mean absolute change of the values, and share of fill."""
    filled = np.all(view == np.array(FILL), axis=2).mean()
    return not np.array_equal(view, original), np.abs(view - original).mean(), float(filled)


@pytest.mark.parametrize(("shades", "untouched"), [(FULL, 0.36), (DULL, 0.3025)])
def test_lilts_views_change_as_often_and_as_much_as_the_formulas_say(
    shades: tuple[int, int],
    untouched: float,
) -> None:
    """Each of two draws changes nothing if it is not applied (1/2), or identity (1 of 10), or
    autocontrast of a full range (1 of 10): (1/2 + 1/2 x 2/10)^2 = .36, or (1/2 + 1/2 x 1/10)^2.

    The tolerances are small enough to notice operations at twice their strength, which raise the
    change by half or more, and a missing identity, which lowers the share by a ninth.
    """
    image = landscape(shades)
    original = array_of(image)
    views = [array_of(view) for view in LILT.of(image, "a")]
    changed, change, filled = np.mean([changes_of(view, original) for view in views], axis=0)
    expected_changed, expected_change, expected_filled = expected_changes(original)
    assert 1 - expected_changed == pytest.approx(untouched)
    # Standard errors over 2,000 views are 0.011 of the share, and about 2 % of the means.
    assert changed == pytest.approx(expected_changed, abs=0.025)
    assert change == pytest.approx(expected_change, rel=0.06)
    assert filled == pytest.approx(expected_filled, rel=0.1)


def expected_changes(original: Pixels) -> NDArray[np.float64]:
    """The mean of `changes_of` over all outcomes of two draws, by their probabilities."""
    draws: list[tuple[float, str, int]] = [(0.5, "identity", 1)]
    for name in FORMULAS:
        signs = (1, -1) if name in SIGNED else (1,)
        draws += [(0.5 / len(FORMULAS) / len(signs), name, sign) for sign in signs]
    total = np.zeros(3)
    for first_share, first, first_sign in draws:
        once = FORMULAS[first](original, first_sign)
        for second_share, second, second_sign in draws:
            twice = FORMULAS[second](once, second_sign)
            total += first_share * second_share * np.array(changes_of(twice, original))
    return total


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shades", [FULL, DULL])
def test_each_operation_at_magnitude_7_is_its_formula(shades: tuple[int, int], sign: int) -> None:
    image = landscape(shades)
    assert OPERATIONS.keys() == FORMULAS.keys()
    for name, operation in OPERATIONS.items():
        found = array_of(operation(image, 0.7, sign))
        expected = FORMULAS[name](array_of(image), sign)
        # At the rim of the fill a rounding decides between it and the image.
        is_close = np.all(np.abs(found - expected) <= 2, axis=2)
        assert is_close.mean() > 0.98, name


# --- the operations by their formulas -------------------------------------------------------------


def identity(pixels: Pixels, _sign: int) -> Pixels:
    return pixels


def stretched(pixels: Pixels, _sign: int) -> Pixels:
    """Autocontrast: each channel from its own darkest value to its lightest becomes 0 to 255."""
    low = pixels.min((0, 1))
    high = pixels.max((0, 1))
    return np.floor((pixels - low) * 255 / (high - low))


def equalized(pixels: Pixels, _sign: int) -> Pixels:
    """Each value becomes the share of darker pixels, as Pillow counts them."""
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


def brightened(pixels: Pixels, _sign: int) -> Pixels:
    return np.floor(np.clip(1.36 * pixels, 0, 255))


def sharpened(pixels: Pixels, _sign: int) -> Pixels:
    return np.floor(np.clip(pixels + 0.36 * (pixels - smoothed(pixels)), 0, 255))


def smoothed(pixels: Pixels) -> Pixels:
    """The kernel of ones with 5 in the middle, over 13; the border stays."""
    result = pixels.copy()
    inner = 4 * pixels[1:-1, 1:-1]
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            inner = inner + pixels[down : SIDE - 2 + down, right : SIDE - 2 + right]
    result[1:-1, 1:-1] = inner / 13
    return result


def sheared_x(pixels: Pixels, sign: int) -> Pixels:
    return moved(pixels, np.array([[1, 0.21 * sign, 0], [0, 1, 0]]))


def sheared_y(pixels: Pixels, sign: int) -> Pixels:
    return moved(pixels, np.array([[1, 0, 0], [0.21 * sign, 1, 0]]))


def shifted_x(pixels: Pixels, sign: int) -> Pixels:
    """Seven pixels of LilT's 256."""
    return moved(pixels, np.array([[1, 0, 7 * SIDE / 256 * sign], [0, 1, 0]]))


def shifted_y(pixels: Pixels, sign: int) -> Pixels:
    return moved(pixels, np.array([[1, 0, 0], [0, 1, 7 * SIDE / 256 * sign]]))


def rotated(pixels: Pixels, sign: int) -> Pixels:
    """By 21 degrees about the center, counterclockwise."""
    angle = np.deg2rad(21.0) * sign
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = np.full(2, SIDE / 2)
    return moved(pixels, np.column_stack([turn, center - turn @ center]))


def moved(pixels: Pixels, matrix: Pixels) -> Pixels:
    """Each output pixel takes what is at `matrix` of its middle, between pixels a mean of the four
    around, or the fill outside."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    from_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    from_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    inside = (from_x >= 0) & (from_x < SIDE) & (from_y >= 0) & (from_y < SIDE)
    left = np.floor(from_x - 0.5).astype(int)
    top = np.floor(from_y - 0.5).astype(int)
    right_share = (from_x - 0.5 - left)[..., None]
    lower_share = (from_y - 0.5 - top)[..., None]

    def at(row: NDArray[np.int_], column: NDArray[np.int_]) -> Pixels:
        return pixels[row.clip(0, SIDE - 1), column.clip(0, SIDE - 1)]

    upper = (1 - right_share) * at(top, left) + right_share * at(top, left + 1)
    lower = (1 - right_share) * at(top + 1, left) + right_share * at(top + 1, left + 1)
    result = np.full_like(pixels, FILL[0])
    result[inside] = np.round((1 - lower_share) * upper + lower_share * lower)[inside]
    return result


FORMULAS = {
    "identity": identity,
    "autocontrast": stretched,
    "equalize": equalized,
    "brightness": brightened,
    "sharpness": sharpened,
    "shear_x": sheared_x,
    "shear_y": sheared_y,
    "translate_x": shifted_x,
    "translate_y": shifted_y,
    "rotate": rotated,
}
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


# --- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0)])
def test_crops_have_the_areas_and_ratios_of_random_resized_crops(
    scale: tuple[float, float],
) -> None:
    """Red and green tell where a pixel comes from, so a view tells its box."""
    side = 200
    y, x = np.mgrid[0:side, 0:side].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, x], axis=2))
    views = Views(600, scale=scale, flip=False, operations=0).of(image, "a")
    boxes = np.array([box_of(array_of(view)) for view in views]) / side
    chance = np.random.default_rng(0)
    expected = np.array([drawn_box(chance, scale) for _ in range(20_000)])
    # Area, ratio in its logarithm, place of the middle.
    for statistic in (
        lambda width, height, _left, _top: width * height,
        lambda width, height, _left, _top: np.log(width / height),
        lambda width, _height, left, _top: left + width / 2,
        lambda _width, height, _left, top: top + height / 2,
    ):
        found = statistic(*boxes.T)
        by_rule = statistic(*expected.T)
        # Four standard errors, and the rounding to pixels.
        limit = 4 * by_rule.std() / len(found) ** 0.5 + 0.002
        assert abs(found.mean() - by_rule.mean()) < limit
        assert found.std() == pytest.approx(by_rule.std(), rel=0.2)
    whole = [np.mean(drawn[:, :2].min(1) > 0.995) for drawn in (boxes, expected)]
    assert whole[0] == pytest.approx(whole[1], abs=0.05)


def box_of(view: Pixels) -> tuple[float, float, float, float]:
    """Width, height, left and top edge of the box that was stretched to a square view."""
    side = len(view)
    inner = np.arange(side // 10, side - side // 10)
    width, left = np.polyfit((inner + 0.5) / side, view[:, inner, 0].mean(0) + 0.5, 1)
    height, top = np.polyfit((inner + 0.5) / side, view[inner, :, 1].mean(1) + 0.5, 1)
    return width, height, left, top


def drawn_box(
    chance: np.random.Generator,
    scale: tuple[float, float],
) -> tuple[float, float, float, float]:
    """A box in a square of side 1: uniform area, ratio uniform in its logarithm, uniform place; the
    whole square after ten draws that do not fit."""
    for _ in range(10):
        area = chance.uniform(*scale)
        ratio = np.exp(chance.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = (area * ratio) ** 0.5
        height = (area / ratio) ** 0.5
        if max(width, height) <= 1:
            return width, height, chance.uniform(0, 1 - width), chance.uniform(0, 1 - height)
    return 1.0, 1.0, 0.0, 0.0


# --- what recipes ask for -------------------------------------------------------------------------


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
