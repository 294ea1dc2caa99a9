"""Views: a function of the file's bytes, the number of the view and the seed, and of nothing
else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from apecache.data.augment import OPERATIONS, Views, views_from_json
from apecache.errors import StoreError


def picture(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def raw(images: list[Image.Image]) -> list[tuple[tuple[int, int], bytes]]:
    return [(image.size, image.tobytes()) for image in images]


def test_the_same_file_gives_the_same_views_and_another_file_seed_or_number_others() -> None:
    views = Views(3)
    image = picture()
    first = raw(views.of(image, "a"))
    assert raw(views.of(image, "a")) == first
    assert raw(replace(views, count=5).of(image, "a"))[:3] == first
    assert len(set(first)) == 3
    assert not set(raw(views.of(image, "b"))) & set(first)
    assert not set(raw(replace(views, seed=1).of(image, "a"))) & set(first)


def test_views_draw_nothing_from_shared_generators() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    Views(4).of(picture(), "a")
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


@pytest.mark.parametrize("size", [(60, 40), (1, 1), (1, 300), (300, 2)])
def test_crops_are_square_and_of_the_area_asked_for(size: tuple[int, int]) -> None:
    views = Views(20, scale=(0.25, 0.5), operations=0, flip=False)
    for view in views.of(picture(*size), "x"):
        assert view.mode == "RGB"
        assert view.width == view.height
        assert view.width >= 1
    if size == (60, 40):
        sides = [view.width for view in views.of(picture(*size), "x")]
        assert min(sides) >= round((0.25 * 2400) ** 0.5) - 1
        assert max(sides) <= round((0.5 * 2400 * 4 / 3) ** 0.5) + 1


def test_the_whole_square_without_operations_is_the_image_itself() -> None:
    image = picture(32, 32)
    (view,) = Views(1, scale=(1, 1), ratio=(1, 1), flip=False, operations=0).of(image, "a")
    assert view.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_size_and_mode_and_the_neutral_level_changes_nothing(
    name: str,
) -> None:
    image = picture()
    for level, sign in ((1.0, -1), (0.3, -1), (0.7, 1), (1.0, 1)):
        changed = OPERATIONS[name](image, level, sign)
        assert (changed.size, changed.mode) == (image.size, "RGB")
    # Factors of enhancements are 1 in the middle.
    neutral = 0.5 if name in ("brightness", "sharpness") else 0.0
    if name not in ("autocontrast", "equalize"):
        assert OPERATIONS[name](image, neutral, 1).tobytes() == image.tobytes()
        if name != "identity":
            assert OPERATIONS[name](image, 1.0, 1).tobytes() != image.tobytes()


def test_what_the_fingerprint_says_makes_the_views_again() -> None:
    views = Views(2, 7, (0.9, 1.0), operations=1)
    assert views_from_json(json.loads(json.dumps(views.to_json()))) == views
    with pytest.raises(StoreError, match="other operations"):
        views_from_json({**views.to_json(), "kinds": ["invert"]})
    former = {key: value for key, value in views.to_json().items() if key != "version"}
    with pytest.raises(StoreError, match="other operations"):
        views_from_json(former)
    with pytest.raises(StoreError, match="cannot make again"):
        views_from_json({**views.to_json(), "hue": 1})
