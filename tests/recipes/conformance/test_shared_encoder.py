"""The shared encoder: gradients of contrast and distillation, groups, steps and learning rates."""

import math

import pytest
import torch
from encoder_fits import SmallFit, assert_gradients, assert_steps, batch_of, small_fit
from formulas import (
    AdamW,
    attend,
    bert_embeddings,
    bert_layer,
    contrastive,
    gelu,
    layer_norm,
    linear,
    unit,
    vit_block,
    vit_embeddings,
    warm_cosine,
)
from recipes import pairs_of
from torch import Tensor

from apecache.recipes.recipe import load_recipe
from apecache.train.batches import Batch
from apecache.train.fit import StepCount

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
BANK = 4
SMALL = ("shared.image_blocks=2", "shared.text_blocks=1", "shared.n_heads=2")
UNDECAYED = {
    "image.tower.module.pos_embed",
    "image.layers.types",
    "text.tower.module.embeddings.word_embeddings.weight",
    "text.tower.module.embeddings.position_embeddings.weight",
    "text.tower.module.embeddings.token_type_embeddings.weight",
}
"""What has two dimensions and is not decayed: words, positions, token types."""


def fit_of(*settings: str) -> SmallFit:
    recipe = load_recipe("shared-encoder", [*SMALL, f"distillation.bank={BANK}", *settings])
    return small_fit(recipe, teacher=TEACHER)


def shared_outputs(
    x: Tensor,
    mask: Tensor | None,
    weights: dict[str, Tensor],
    modality: int,
) -> tuple[Tensor, Tensor]:
    """CLS at the first layer of the feed-forward before its GELU, and at the block's output."""
    layers = "image.layers"
    block = f"{layers}.block"
    x = x + weights[f"{layers}.types"][modality] * weights[f"{layers}.type_scale"]
    normed = layer_norm(x, weights, f"{block}.norm1", 1e-6)
    query, key, value = linear(normed, weights, f"{block}.qkv").chunk(3, -1)
    attended = linear(attend(query, key, value, 2, mask), weights, f"{block}.project")
    x = x + weights[f"{block}.scale1"] * attended
    inner = linear(layer_norm(x, weights, f"{block}.norm2", 1e-6), weights, f"{block}.up")
    output = x + weights[f"{block}.scale2"] * linear(gelu(inner), weights, f"{block}.down")
    return inner[:, 0], output[:, 0]


def distilled(output: Tensor, teacher: Tensor, bank: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """-log of the share that a student gives to its own teacher among batch and bank, averaged."""
    name = "shared.distillation"
    student = unit(
        linear(layer_norm(output, weights, f"{name}.norm", 1e-6), weights, f"{name}.project")
    )
    own = student @ unit(teacher).T / 0.07
    others = student @ bank.T / 0.07
    total = own.exp().sum(1) + others.exp().sum(1)
    return (total.log() - own.diagonal()).mean()


def loss_of(small: SmallFit, batch: Batch, bank: Tensor, weights: dict[str, Tensor]) -> Tensor:
    rows = batch.image.tolist()
    x = vit_embeddings(small.pixels, weights, "image.tower.module")
    for block in range(2):
        x = vit_block(x, weights, f"image.tower.module.blocks.{block}")
    ids, mask = small.captions.take(rows)
    y = bert_embeddings(ids, weights, "text.tower.module.embeddings")
    y = bert_layer(y, mask, weights, "text.tower.module.encoder.layer.0")
    image_inner, image_output = shared_outputs(x, None, weights, 0)
    text_inner, text_output = shared_outputs(y, mask, weights, 1)
    inner_scale = weights["shared.inner.log_scale"].exp()
    outer_scale = weights["temperature.log_scale"].exp()
    inner = contrastive(image_inner, text_inner, inner_scale)
    outer = contrastive(image_output, text_output, outer_scale)
    of_image = distilled(image_output, TEACHER[rows], bank, weights)
    of_text = distilled(text_output, TEACHER[rows], bank, weights)
    return (inner + outer) / 2 + (of_image + of_text) / 2


def test_two_contrasts_and_the_distillation_from_batch_and_bank_give_the_gradients() -> None:
    small = fit_of()
    shared = small.fit.model.shared
    assert shared is not None
    assert shared.distillation is not None
    with torch.no_grad():
        shared.inner.log_scale.fill_(math.log(5))
    entries = shared.distillation.bank.entries
    bank = entries.clone()
    assert bank.shape == (BANK, 5)
    # Two steps: the teacher's features of the first are wrong answers of the second.
    for rows in ((2, 0, 1), (5, 3, 4)):
        batch = batch_of(*rows)
        assert_gradients(
            small, batch, lambda weights, b=batch, e=bank: loss_of(small, b, e, weights)
        )
        # First in, first out.
        bank = torch.cat([bank[3:], unit(TEACHER[batch.image])])
        assert sorted(entries[:, 0].tolist()) == pytest.approx(sorted(bank[:, 0].tolist()))


def test_only_words_positions_and_token_types_are_spared_the_decay_of_matrices() -> None:
    small = fit_of()
    names = dict(small.fit.model.named_parameters())
    assert small.trained() == names.keys() - {
        "image.tower.module.norm.weight",
        "image.tower.module.norm.bias",
    }
    assert names.keys() >= UNDECAYED
    decays = small.decays()
    for name, decay in decays.items():
        is_decayed = names[name].ndim >= 2 and name not in UNDECAYED
        assert decay == (0.01 if is_decayed else 0.0), name


def test_a_step_is_adamw_with_the_published_numbers_and_without_clipping() -> None:
    small = fit_of()
    rule = AdamW(
        lr=warm_cosine(2e-4, n_warmup=700, n_steps=7_000).__getitem__,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    plan = StepCount(n_steps=7_000, per_epoch=1_000, accumulate=1)
    assert_steps(small, plan, rule, small.decays(), first_step=699)


@pytest.mark.parametrize("name", ["shared-encoder", "see-hear-read"])
def test_seven_epochs_of_pairs_warm_up_for_a_tenth_of_the_steps(name: str) -> None:
    """1,000 batches of 512 pairs in each epoch; 1e-4 x 512 / 256 at the top."""
    recipe = load_recipe(name, SMALL)
    teacher = TEACHER if name == "shared-encoder" else TEACHER.softmax(-1)
    small = small_fit(recipe, teacher=teacher)
    plan = StepCount.of(recipe, pairs_of(102_400, 512_000))
    assert (plan.n_steps, plan.per_epoch) == (7_000, 1_000)
    expected = warm_cosine(1e-4 * 512 / 256, n_warmup=700, n_steps=7_000)
    assert small.rates(plan) == pytest.approx(expected, rel=1e-12)
