"""LilT: gradients of its rows, with adapters and without, groups, steps and updates."""

import pytest
import torch
from encoder_fits import SmallFit, assert_gradients, assert_steps, batch_of, small_fit
from formulas import AdamW, bert_cls, contrastive, lilt_rates, linear, vit_cls
from recipes import pairs_of
from torch import Tensor

from apecache.recipes.recipe import load_recipe
from apecache.train.batches import Batch
from apecache.train.fit import StepCount

pytestmark = pytest.mark.usefixtures("one_thread")

CACHED = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
"""Image features, where the image tower is frozen."""
ADAPTERS = {"f": "deep", "g": "deep", "h": "layerwise", "i": "layerwise"}
PER_EPOCH = 4_623
"""Steps of an epoch of COCO."""
WARM = AdamW(lr=lambda step: 1e-4, betas=(0.9, 0.999), eps=1e-8)
"""From iteration 1,001 to the end of the first epoch."""


def fit_of(row: str) -> SmallFit:
    return small_fit(load_recipe(f"lilt-{row}"), cached=CACHED if row in "cl" else None)


def may_train(name: str, row: str) -> bool:
    """Whether a parameter trains in a row of Table 1."""
    is_norm = any(part in name for part in (".norm", ".LayerNorm"))
    if name.startswith("temperature.") or ".head." in name:
        return True
    if row == "l":
        return "token_type" not in name
    if row in ADAPTERS and ".adapters." in name:
        return True
    if row == "e":
        return name.endswith(".bias")
    if row == "f":
        return name.startswith("image.tower.module.norm.")
    return row in "dgi" and is_norm


def loss_of(small: SmallFit, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
    """Both projected, CLS to CLS; T itself divides."""
    rows = batch.image.tolist()
    image = CACHED[rows] if not len(small.pixels) else vit_cls(small.pixels, weights)
    text = bert_cls(*small.captions.take(rows), weights)
    return contrastive(
        linear(image, weights, "image.head.body"),
        text=linear(text, weights, "text.head.body"),
        scale=1 / weights["temperature.temperature"],
    )


@pytest.mark.parametrize("row", "cdefghil")
def test_what_a_row_trains_has_the_gradients_of_the_formula_and_nothing_else_has_any(
    row: str,
) -> None:
    small = fit_of(row)
    weights = small.weights()
    assert small.trained() == {name for name in weights if may_train(name, row)}
    kinds = {name.split(".")[3] for name in weights if ".adapters." in name}
    assert kinds == ({ADAPTERS[row]} if row in ADAPTERS else set())
    assert weights["image.head.body.weight"].shape == (256, 16)
    assert weights["temperature.temperature"].item() == pytest.approx(0.07)
    batch = batch_of(2, 0, 1)
    assert_gradients(small, batch, lambda own: loss_of(small, batch, own))


@pytest.mark.parametrize("row", "cgi")
def test_a_step_is_adamw_and_decays_matrices_and_the_temperature(row: str) -> None:
    small = fit_of(row)
    decays = {
        name: 0.0 if parameter.ndim == 1 else 0.02
        for name, parameter in small.fit.model.named_parameters()
        if parameter.requires_grad
    }
    assert small.decays() == decays
    assert decays["temperature.temperature"] == 0.02
    # Sharper, so that no gradient is small.
    small.fit.model.temperature.set_scale(50)
    plan = StepCount(n_steps=15 * PER_EPOCH, per_epoch=PER_EPOCH, accumulate=1)
    assert_steps(small, plan, WARM, decays, first_step=1_001)


@pytest.mark.parametrize("per_epoch", [1_200, 40])
def test_stairs_and_cosine_of_epochs_reach_every_group_of_the_optimizer(per_epoch: int) -> None:
    small = fit_of("c")
    plan = StepCount.of(small.fit.recipe, pairs_of(per_epoch * 128, per_epoch * 128))
    assert (plan.n_steps, plan.per_epoch) == (15 * per_epoch, per_epoch)
    assert small.rates(plan) == pytest.approx(lilt_rates(per_epoch), rel=1e-12)
