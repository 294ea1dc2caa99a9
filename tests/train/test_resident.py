"""Which features stay on a device, and how their rows get there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apecache.device import CPU
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train import resident
from apecache.train.batches import SplitSpec
from apecache.train.fit import HeadFit
from apecache.train.head_data import load_splits
from apecache.train.initial import initial_model
from apecache.train.resident import SideRows, choose_resident, fit_bytes, load_rows

N_IMAGES = 90


@pytest.fixture
def store(write_store: Any, tmp_path: Path) -> FeatureStore:
    """Three splits of 30 images with two captions each; captions of an image stand apart."""
    generator = np.random.default_rng(0)
    image = generator.normal(size=(N_IMAGES, 6)).astype(np.float16)
    text = generator.normal(size=(2 * N_IMAGES, 5)).astype(np.float16)
    opened: FeatureStore = write_store(
        tmp_path / "store",
        image,
        text,
        [*range(N_IMAGES), *range(N_IMAGES)],
        ["train", "dev", "test"] * (N_IMAGES // 3),
        bad_images=(3,),
        bad_texts=(7,),
        shard_rows=11,
    )
    return opened


@pytest.mark.parametrize(
    ("image_bytes", "text_bytes", "budget_bytes", "expected"),
    [
        (45, 10, 55, (True, True)),
        (45, 10, 54, (True, False)),
        (10, 45, 54, (False, True)),
        (60, 10, 50, (False, True)),
        (10, 60, 50, (True, False)),
        (60, 60, 50, (False, False)),
        (60, 60, 0, (False, False)),
        (10**12, 10**12, None, (True, True)),
    ],
)
def test_both_sides_are_decided_together(
    image_bytes: int,
    text_bytes: int,
    budget_bytes: int | None,
    expected: tuple[bool, bool],
) -> None:
    assert choose_resident(image_bytes, text_bytes, budget_bytes) == expected


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rows_are_loaded_in_the_order_given(store: FeatureStore, modality: Any) -> None:
    array = store.array(modality)
    order = np.random.default_rng(1).permutation(array.rows)
    splits = [order[:40], np.sort(order[40:70]), order[:0]]
    every_row = torch.from_numpy(array.load())
    for loaded, rows in zip(load_rows(array, splits, CPU), splits, strict=True):
        expected = every_row[torch.from_numpy(rows)]
        torch.testing.assert_close(loaded.values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("staging_rows", [1, 4, 50])
def test_rows_pass_through_a_buffer_of_any_size(
    store: FeatureStore,
    staging_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = store.array("text")
    staging = torch.full((staging_rows, *array.row_shape), torch.nan, dtype=torch.float16)
    monkeypatch.setattr(resident, "_staging_buffer", lambda *_: staging)
    rows = np.random.default_rng(2).permutation(array.rows)[:100]
    (loaded,) = load_rows(array, [rows], CPU)
    expected = torch.from_numpy(array.load())[torch.from_numpy(rows)]
    torch.testing.assert_close(loaded.values, expected, rtol=0, atol=0, equal_nan=True)


class Sizes(TorchDispatchMode):
    """Keep the largest number of rows of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim > 1:
                self.most_rows = max(self.most_rows, len(tensor))
        return out


def test_no_tensor_holds_rows_that_the_fit_does_not_use(store: FeatureStore) -> None:
    """An array of which a part is used must not be in memory as a whole."""
    with Sizes() as sizes:
        train, dev = load_splits(
            store,
            image=store.array("image"),
            text=store.array("text"),
            spec=SplitSpec(dev="dev"),
            device=CPU,
        )
    assert (len(train), len(dev)) == (29, 30)
    assert sizes.most_rows == max(len(train.text), len(dev.text))


@pytest.mark.parametrize("name", ["projection", "ridge", "asif", "fusemix", "freeze-align"])
def test_what_a_fit_needs_grows_with_what_it_computes(name: str) -> None:
    recipe = load_recipe(name)
    n_tokens = 16 if recipe.image.cut == "tokens" else 1
    row_shape = (n_tokens, 64) if n_tokens > 1 else (64,)

    def needed(n_train: int, dim: int = 64) -> int:
        shape = (*row_shape[:-1], dim)
        side = SideRows(row_shape=shape, row_bytes=2 * n_tokens * dim, n_train=n_train, n_dev=100)
        return fit_bytes(recipe, side, side)

    assert 0 < needed(1000) < needed(1000, dim=512)
    # A dictionary holds all training pairs; anything else works on some rows at a time.
    grows_without_end = needed(2_000_000) > 1.5 * needed(1_000_000)
    assert grows_without_end == (name == "asif")


def test_losses_on_the_cpu_are_kept_as_numbers(store: FeatureStore) -> None:
    """A tensor that stays between two steps would keep the memory of the first from the second."""
    recipe = load_recipe("projection")
    arrays = (store.array("image"), store.array("text"))
    train, dev = load_splits(store, *arrays, SplitSpec(dev="dev"), CPU, recipe)
    model, _ = initial_model(recipe, train=train, dev=dev, seed=0)
    training = HeadFit(model, recipe, 0)
    for loss in (1.5, 0.1):
        training.add_loss(torch.tensor(loss))
    assert not any(isinstance(loss, torch.Tensor) for loss in training.losses)
    assert torch.equal(training.epoch_losses(), torch.tensor([1.5, 0.1]))


def test_the_weights_of_a_fit_are_counted_with_their_states(store: FeatureStore) -> None:
    recipe = load_recipe("projection")
    arrays = (store.array("image"), store.array("text"))
    train, dev = load_splits(store, *arrays, SplitSpec(dev="dev"), CPU, recipe)
    model, _ = initial_model(recipe, train=train, dev=dev, seed=0)
    training = HeadFit(model, recipe, 0)
    weights = sum(parameter.numel() for parameter in training.model.parameters())
    sides = [
        resident.side_rows(array, n_train, 0)
        for array, n_train in zip(arrays, (len(train.image), len(train.text)), strict=True)
    ]
    # Value, gradient and two moments are the least of a step of Adam.
    assert fit_bytes(recipe, *sides) > 4 * 4 * weights
