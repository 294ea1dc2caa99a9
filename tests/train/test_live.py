"""What a training step reads: views of live images that depend on seed, epoch and key alone."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import draw_landscape, squash

import apecache.train.encoder_data as encoder_data
from apecache.data.augment import Views
from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.device import CPU
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import DataError, RowError
from apecache.train.live import CachedInputs, ImageInputs, reading

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


def test_a_random_crop_is_shown_whole_by_an_encoder_that_crops(
    cropping_image_encoder: Path,
) -> None:
    photo = draw_landscape(60, 40)
    encoder = load_image_encoder(parse_encoder(f"timm:{cropping_image_encoder}", "image"), "cpu")
    inputs = ImageInputs(
        keys=["a"],
        open_image=lambda _: photo,
        preprocess=encoder.preprocess,
        device=CPU,
    )
    whole = Views(1, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=False, operations=0)
    shown = inputs.augmented(whole, 1).take([0])[0][0]
    cropped = encoder.preprocess(photo.resize((60, 60), Image.Resampling.BICUBIC))
    cut_away = float((cropped - squash(photo)).abs().mean())
    assert float((shown - squash(photo)).abs().mean()) < 0.25 * cut_away


def test_what_is_read_ahead_is_read_once_and_is_what_a_step_takes(inputs: ImageInputs) -> None:
    opened: list[str] = []

    def open_image(key: str) -> Any:
        opened.append(key)
        return inputs.open_image(key)

    counted = replace(inputs, open_image=open_image)
    counted.read_ahead([2, 0])
    pixels, _ = counted.take([2, 0])
    assert sorted(opened) == sorted([KEYS[2], KEYS[0]])
    assert torch.equal(pixels, inputs.take([2, 0])[0])
    # Taken images are forgotten, and those of another epoch or caption are other views.
    counted.take([2])
    replace(counted, epoch=1).read_ahead([1])
    counted.take([1])
    counted.reader.close()
    assert opened.count(KEYS[2]) == 2
    assert opened.count(KEYS[0]) == 1
    counted.reader.close()


def test_an_image_that_cannot_be_read_is_told_when_it_is_taken(inputs: ImageInputs) -> None:
    def refuse(key: str) -> Any:
        raise RowError("missing", f"{key} is gone")

    broken = replace(inputs, open_image=refuse)
    broken.read_ahead([1])
    with pytest.raises(DataError, match="image of row 1 cannot be read"):
        broken.take([1])
    broken.reader.close()


def test_the_threads_end_with_the_fit_and_no_image_is_read_after_it(inputs: ImageInputs) -> None:
    may_read = threading.Event()
    opened: list[str] = []

    def open_image(key: str) -> Any:
        assert may_read.wait(60)
        opened.append(key)
        return inputs.open_image(key)

    def fit() -> None:
        slow = replace(inputs, open_image=open_image, workers=1)
        with reading([slow]):
            slow.read_ahead([0, 1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit()
    may_read.set()
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(60)
    assert len(opened) <= 1


def test_cached_features_that_do_not_fit_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.zeros(100, 8)
    for free_bytes, device in ((4 * 3200, "meta"), (4 * 3200 - 1, "cpu"), (None, "meta")):
        monkeypatch.setattr(encoder_data, "free_memory_bytes", lambda _, n=free_bytes: n)
        placed = encoder_data._placed(features, torch.device("meta"))
        assert placed.device.type == device
    held = CachedInputs(features=torch.arange(12.0).view(4, 3).half(), device=CPU)
    taken, mask = held.take([3, 1])
    assert mask is None
    assert taken.dtype == torch.float32
    assert taken.tolist() == [[9, 10, 11], [3, 4, 5]]
