"""Steps, learning rates and temperatures of recipes against the formulas of their publications."""

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import lilt_rates
from recipes import pairs_of
from torch import Tensor

from apecache.losses.contrastive import Temperature, info_nce, temperature_in
from apecache.losses.registry import build_temperature
from apecache.recipes.recipe import load_recipe
from apecache.train.batches import batches
from apecache.train.fit import StepCount
from apecache.train.optim import build_optimizer, learning_rate_factor

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


def embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(64, 32, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(image + 0.3 * torch.randn(64, 32, generator=generator), dim=-1)
    return image, text


@pytest.mark.parametrize("name", ["lilt-c", "lilt-projection", "fusemix"])
def test_the_temperature_itself_is_learnt_as_published(name: str) -> None:
    """T is an AdamW parameter; the loss is the mean of two cross-entropies of cosines over T."""
    recipe = load_recipe(name)
    image, text = embeddings()
    temperature = build_temperature(recipe.loss)
    optimizer = build_optimizer([(temperature.parameter, 1.0)], recipe.optimizer)
    reference = torch.tensor(0.07, requires_grad=True)
    decay = recipe.optimizer.weight_decay if name != "fusemix" else 0.0
    rule = torch.optim.AdamW(
        [reference],
        lr=recipe.optimizer.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=decay,
    )
    for _ in range(100):
        logits = image @ text.T / reference
        targets = torch.arange(64)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        rule.zero_grad()
        loss.backward()
        optimizer.zero_grad()
        own_loss = info_nce(image, text, temperature.scale())
        own_loss.backward()
        assert float(own_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert reference.grad is not None
        assert temperature.parameter.grad is not None
        torch.testing.assert_close(temperature.parameter.grad, reference.grad, rtol=1e-4, atol=1e-6)
        rule.step()
        optimizer.step()
        temperature.clamp()
        with torch.no_grad():
            reference.clamp_(0.001, 0.5)
    learnt = temperature_in({"temperature.temperature": temperature.parameter})
    assert learnt == pytest.approx(float(reference.detach()), rel=1e-4)
    # A hundred steps of 1e-4 or 1e-3 take T far; the logarithm would have moved by as much only.
    assert learnt < 0.062


def test_structures_temperature_stays() -> None:
    loss = load_recipe("structure").loss
    assert (loss.temperature, loss.learnable) == (0.05, False)


def test_both_parameters_have_one_scale_and_the_slope_of_autograd() -> None:
    for parameter in ("log_scale", "temperature"):
        temperature = Temperature(0.05, parameter=parameter)
        scale = temperature.scale()
        assert float(scale.detach()) == pytest.approx(20, rel=1e-6)
        (gradient,) = torch.autograd.grad(scale, temperature.parameter)
        assert float(temperature.scale_slope().detach()) == pytest.approx(float(gradient), rel=1e-6)
        temperature.set_scale(1e6)
        assert float(temperature.scale().detach()) == pytest.approx(100, rel=1e-5)
        assert temperature_in({f"temperature.{parameter}": temperature.parameter}) == pytest.approx(
            0.01, rel=1e-5
        )
