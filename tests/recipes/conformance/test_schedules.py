"""Steps and learning rates of recipes against the formulas of their publications."""

import math
from dataclasses import dataclass

import pytest
import torch
from formulas import lilt_rates, warm_cosine
from recipes import pairs_of
from small_heads import small_pairs, small_recipe

from apecache.recipes.recipe import load_recipe
from apecache.train.batches import batches
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import set_rates
from apecache.train.model import build_model
from apecache.train.optim import learning_rate_factor

COCO_PAIRS = 591_753
COCO_IMAGES = 118_287


def rates(name: str, plan: StepCount) -> list[float]:
    recipe = load_recipe(name)
    return [
        recipe.optimizer.lr
        * learning_rate_factor(step, plan.n_steps, recipe.schedule, plan.per_epoch)
        for step in range(plan.n_steps)
    ]


@pytest.mark.parametrize("name", ["lilt-a", "lilt-i", "lilt-p", "lilt-projection", "deep-adapter"])
def test_lilt_takes_the_published_steps_of_coco_at_the_published_rates(name: str) -> None:
    plan = StepCount.of(load_recipe(name), pairs_of(COCO_IMAGES, COCO_PAIRS))
    assert (plan.n_steps, plan.per_epoch) == (69_345, 4_623)
    assert rates(name, plan) == pytest.approx(lilt_rates(4_623), rel=1e-12)


def test_lilts_warm_up_ends_with_a_first_epoch_that_is_shorter() -> None:
    plan = StepCount.of(load_recipe("lilt-c"), pairs_of(5_500, 27_500))
    assert plan.per_epoch == 214
    assert rates("lilt-c", plan) == pytest.approx(lilt_rates(214), rel=1e-12)


def test_fusemix_warms_up_for_100_steps_and_its_cosine_counts_epochs() -> None:
    plan = StepCount.of(load_recipe("fusemix"), pairs_of(100_000, 500_000))
    assert plan.per_epoch == 500_000 // 2048
    expected = []
    for epoch in range(40):
        for iteration in range(plan.per_epoch):
            rate = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / 40))
            if epoch == 0:
                rate = min(1e-3, 1e-6 + (1e-3 - 1e-6) * iteration / 100)
            expected.append(rate)
    assert rates("fusemix", plan) == pytest.approx(expected, rel=1e-12)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of a recipe for so many images: a warm-up in equal parts, then a cosine to 0."""

    settings: tuple[str, ...] = ()
    n_images: int = 10_240
    n_steps: int
    n_warmup: int
    lr: float


PLANS = {
    "ape": Plan(n_steps=300, n_warmup=30, lr=1e-3),
    "freeze-align": Plan(n_steps=300, n_warmup=30, lr=5e-4),
    "sail": Plan(n_steps=600, n_warmup=60, lr=1e-4),
    "sharelock": Plan(n_steps=300, n_warmup=9, lr=1e-3),
    "sharelock as published": Plan(
        settings=("schedule.steps=5000", "schedule.accumulate=16"),
        n_images=50_000,
        n_steps=5_000,
        n_warmup=150,
        lr=1e-3,
    ),
    "structure": Plan(n_steps=500, n_warmup=50, lr=2e-3),
    "token-anchors": Plan(n_steps=300, n_warmup=30, lr=1e-3),
}


@pytest.mark.parametrize("row", PLANS)
def test_heads_take_so_many_steps_at_these_rates(row: str) -> None:
    """The rates that the optimizer of a fit has at every step, in all of its groups."""
    plan = PLANS[row]
    recipe = small_recipe(row.split()[0], *plan.settings)
    training = HeadFit(build_model(recipe, small_pairs(recipe), seed=0), recipe, seed=0)
    steps = StepCount.of(recipe, pairs_of(plan.n_images, plan.n_images))
    assert steps.n_steps == plan.n_steps
    assert training.optimizer is not None
    for step, expected in enumerate(warm_cosine(plan.lr, plan.n_warmup, plan.n_steps)):
        training.step = step
        set_rates(training, steps)
        for group in training.optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["lilt-c", "shared-encoder", "see-hear-read", "fusemix"])
def test_an_epoch_of_pairs_has_five_times_the_steps_on_five_captions(name: str) -> None:
    schedule = load_recipe(name).schedule
    assert schedule.epoch == "pairs"
    few = StepCount.of(load_recipe(name), pairs_of(20_480, 102_400))
    assert few.per_epoch == 102_400 // schedule.batch_size
    by_images = load_recipe(name, ["schedule.epoch=images"])
    assert StepCount.of(by_images, pairs_of(20_480, 102_400)).per_epoch * 5 == few.per_epoch


def test_an_epoch_of_pairs_shows_every_caption_once_with_its_own_image() -> None:
    pairs = pairs_of(40, 120)
    generator = torch.Generator().manual_seed(0)
    drawn = list(batches(pairs, batch_size=16, generator=generator, epoch="pairs"))
    assert len(drawn) == 7
    texts = torch.cat([batch.text.flatten() for batch in drawn])
    images = torch.cat([batch.image.flatten() for batch in drawn])
    assert len(texts.unique()) == len(texts) == 7 * 16
    assert torch.equal(images, pairs.image_of_text[texts])
    # Captions of one image that meet in a batch are each other's right answers.
    repeated = [batch for batch in drawn if len(batch.image.unique()) < len(batch.image)]
    assert repeated
    for batch in drawn:
        image = batch.image.flatten()
        groups = torch.arange(16) if batch.groups is None else batch.groups.image
        same = groups.unsqueeze(0) == groups.unsqueeze(1)
        assert torch.equal(same, image.unsqueeze(0) == image.unsqueeze(1))
