"""To freeze or not to freeze: the loss, what trains, and every step, against the published ones."""

import pytest
import torch
from encoder_fits import SmallFit, assert_gradients, assert_steps, batch_of, small_fit
from formulas import AdamW, bert_cls, contrastive, linear, vit_cls, warm_cosine
from recipes import pairs_of
from torch import Tensor

from apecache.recipes.recipe import freeze_names, load_recipe
from apecache.train.fit import StepCount
from apecache.train.live import ImageInputs
from apecache.train.loop import take_step

pytestmark = pytest.mark.usefixtures("one_thread")

N_SAMPLES = 12_800_000
N_STEPS = 3_125
RULE = AdamW(
    lr=warm_cosine(5e-4, n_warmup=500, n_steps=N_STEPS).__getitem__,
    betas=(0.9, 0.98),
    eps=1e-6,
)
CACHED = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
"""Image features, where the image tower is frozen."""
EMBEDDINGS = ("module.cls_token", "module.pos_embed", "module.patch_embed.", "module.embeddings.")
BLOCKS = ("module.blocks.", "module.norm.", "module.encoder.layer.")


def fit_of(shorthand: str) -> SmallFit:
    recipe = load_recipe(f"freeze/{shorthand}")
    return small_fit(recipe, cached=CACHED if shorthand.startswith("Vff") else None)


def may_train(name: str, shorthand: str) -> bool:
    """Whether a parameter trains, by the letters of a combination."""
    if name.startswith(("text.head.", "temperature.")):
        return True
    embeddings, blocks = shorthand[1:3] if name.startswith("image.") else shorthand[5:7]
    part = name.partition(".tower.")[2]
    if part in ("module.cls_token", "module.embeddings.word_embeddings.row"):
        return embeddings in "uc"
    if part.startswith(EMBEDDINGS):
        return embeddings == "u"
    assert part.startswith(BLOCKS), name
    return blocks == "u"


@pytest.mark.parametrize(
    "shorthand",
    ["Vuf-Tuu", "Vuu-Tff", "Vff-Tuf", "Vff-Tfu", "Vuf-Tfu", "Vcf-Tcf", "Vcu-Tcu"],
)
def test_raw_cls_is_contrasted_with_projected_cls_and_the_letters_say_what_learns(
    shorthand: str,
) -> None:
    small = fit_of(shorthand)
    batch = batch_of(2, 0, 1)
    assert small.trained() == {name for name in small.weights() if may_train(name, shorthand)}
    assert small.fit.model.temperature.scale().item() == pytest.approx(1 / 0.07)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        image = CACHED[batch.image]
        if not shorthand.startswith("Vff"):
            image = vit_cls(small.pixels, weights)
        text = bert_cls(*small.captions.take(batch.text.tolist()), weights)
        projected = linear(text, weights, "text.head.body")
        return contrastive(image, projected, weights["temperature.log_scale"].exp())

    assert_gradients(small, batch, loss)


def test_steps_and_rates_are_those_of_12_8_million_samples() -> None:
    for shorthand in ("Vuf-Tuu", "Vff-Tuu"):
        small = fit_of(shorthand)
        assert small.fit.recipe.schedule.batch_size == 4_096
        plan = StepCount.of(small.fit.recipe, pairs_of(N_SAMPLES, N_SAMPLES))
        assert (plan.n_steps, plan.accumulate) == (N_STEPS, 1)
        expected = [RULE.lr(step) for step in range(N_STEPS)]
        assert small.rates(plan) == pytest.approx(expected, rel=1e-12)
        assert max(expected) == expected[499] == 5e-4


@pytest.mark.parametrize("shorthand", ["Vuu-Tuu", "Vff-Tuu", "Vcf-Tcf"])
def test_a_step_is_adamw_with_the_published_numbers_and_without_clipping(shorthand: str) -> None:
    small = fit_of(shorthand)
    decays = {
        name: 0.2 if parameter.ndim >= 2 else 0.0
        for name, parameter in small.fit.model.named_parameters()
        if parameter.requires_grad
    }
    assert small.decays() == decays
    assert 0.2 in decays.values()
    plan = StepCount(n_steps=N_STEPS, per_epoch=N_STEPS, accumulate=1)
    assert_steps(small, plan, RULE, decays, first_step=499)


def test_the_scale_never_passes_100() -> None:
    small = fit_of("Vff-Tff")
    with torch.no_grad():
        small.fit.model.temperature.parameter.fill_(6.0)
    plan = StepCount(n_steps=N_STEPS, per_epoch=N_STEPS, accumulate=1)
    take_step(small.fit, iter([batch_of(0, 1, 2)]), plan)
    assert small.fit.model.temperature.scale().item() == pytest.approx(100, rel=1e-5)


def test_all_36_have_the_same_optimization() -> None:
    reference = load_recipe("freeze/Vuf-Tuu")
    assert len(freeze_names()) == 36
    for name in freeze_names():
        recipe = load_recipe(name)
        assert recipe.optimizer == reference.optimizer, name
        assert recipe.schedule == reference.schedule, name
        assert recipe.loss == reference.loss, name


def test_images_are_seen_in_random_resized_crops_of_90_to_100_percent() -> None:
    images = fit_of("Vuf-Tuu").fit.seen[0]
    assert isinstance(images, ImageInputs)
    views = images.views
    assert views is not None
    assert (views.count, views.scale, views.ratio) == (1, (0.9, 1.0), (3 / 4, 4 / 3))
    assert (views.flip, views.operations, views.jitter) == (False, 0, 0.0)
