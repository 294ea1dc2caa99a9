"""Dropout by sample: the same mask in whatever slice, process and padding, and masks that are
random."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from small_towers import pictures, sentences, small_bert, small_t5, small_vit
from torch import Tensor
from torch.nn import functional as F

from apecache.encoders.sample_draws import SampleDraws
from apecache.encoders.tower import Tower, build_tower

RATES = {
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "drop_path_rate": 0.3,
}
BERT_RATES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def dropping_bert() -> Tower:
    return small_bert(**BERT_RATES)


def eager_bert() -> Tower:
    return small_bert(**BERT_RATES, attn_implementation="eager")


def dropping_vit() -> Tower:
    return small_vit(**RATES)


def dropping_t5() -> Tower:
    tower = small_t5()
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.1
    return tower


def dropping_beit() -> Tower:
    """transformers' own stochastic depth."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = hf.BeitConfig(image_size=16, patch_size=4, drop_path_rate=0.3, **sizes, **BERT_RATES)
    return build_tower(hf.BeitModel(config, add_pooling_layer=False).eval(), "image", "cls")


def timm_beit() -> Tower:
    torch.manual_seed(0)
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "num_heads": 2,
        "depth": 3,
        "num_classes": 0,
    }
    module = timm.create_model("beit_base_patch16_224", pretrained=False, **sizes, **RATES)
    return build_tower(module.eval(), "image", "cls")


TOWERS = [dropping_bert, eager_bert, dropping_t5, dropping_vit, dropping_beit, timm_beit]


def inputs_of(tower: Tower, n: int) -> tuple[Tensor, Tensor | None]:
    if tower.modality == "image":
        return pictures(n).to(next(tower.parameters()).dtype), None
    ids, mask = sentences(n)
    ids[n // 2 :, 5:] = 0  # the second half is padded to five tokens where it is alone
    mask[n // 2 :, 5:] = 0
    return ids, mask


def encode(tower: Tower, samples: Sequence[int], seed: int, n: int = 8) -> Tensor:
    inputs, mask = inputs_of(tower, n)
    rows = torch.tensor(samples)
    length = None if mask is None else int(mask[rows].sum(1).max())
    with SampleDraws(seed, samples):
        chosen = inputs[rows] if mask is None else inputs[rows, :length]
        encoded: Tensor = tower(chosen, None if mask is None else mask[rows, :length])
        return encoded


@pytest.mark.parametrize("build", TOWERS)
def test_a_sample_is_encoded_alike_in_every_slice(build: Callable[[], Tower]) -> None:
    """Up to rounding in double precision: slices have other matrix products."""
    tower = build().double().train()
    before = torch.get_rng_state()
    whole = encode(tower, range(8), seed=1)
    sliced = torch.cat(
        [encode(tower, part, seed=1) for part in (range(3), range(3, 4), range(4, 8))]
    )
    torch.testing.assert_close(sliced, whole, rtol=1e-9, atol=1e-9)
    mixed = [6, 0, 3]
    torch.testing.assert_close(encode(tower, mixed, seed=1), whole[mixed], rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), before), "something is drawn otherwise"
    assert not torch.allclose(encode(tower, range(8), seed=2), whole)
    assert not torch.allclose(whole, tower.eval()(*inputs_of(tower, 8)))


@pytest.mark.parametrize("build", [dropping_bert, dropping_vit])
def test_a_block_that_is_run_again_draws_the_same(build: Callable[[], Tower]) -> None:
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        tower = build().double().train()
        tower.checkpointing = checkpointing
        embedded = encode(tower, range(8), seed=1)
        embedded.square().sum().backward()
        gradients.append([p.grad for p in tower.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_have_their_rate_and_are_independent(rate: float) -> None:
    """Of 640,000 draws the share is within five standard deviations, and so is the agreement of any
    two masks."""
    ones = torch.ones(64, 100, 100)
    with SampleDraws(7, range(64)):
        masks = [F.dropout(ones, rate) == 0 for _ in range(2)]
    with SampleDraws(8, range(64)):
        masks.append(F.dropout(ones, rate) == 0)
    tolerance = 5 * (rate * (1 - rate) / masks[0].numel()) ** 0.5
    assert all(abs(float(mask.double().mean()) - rate) < tolerance for mask in masks)
    shifted = [masks[0].roll(1, dim) for dim in range(3)]
    for other in (*masks[1:], *shifted, masks[0].roll(4, 2)):
        both = float((masks[0] & other).double().mean())
        assert abs(both - rate**2) < 5 * (rate**2 / masks[0].numel()) ** 0.5


def test_dropout_keeps_the_mean_and_zeroes_gradients_of_what_it_drops() -> None:
    x = torch.ones(50, 1000, dtype=torch.float64, requires_grad=True)
    with SampleDraws(3, range(50)):
        y = F.dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3], rel=1e-12)


def test_attention_without_dropout_and_evaluation_are_left_alone() -> None:
    q = torch.randn(4, 2, 5, 8)
    with SampleDraws(3, range(4)):
        assert torch.equal(F.dropout(q, 0.5, training=False), q)
        inside = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(inside, F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_attention_with_little_dropout_is_nearly_that_without(mask: str | None) -> None:
    """The products are those of torch: at the lowest rate above 0 hardly a weight is dropped."""
    q, k, v = torch.randn(
        3,
        4,
        2,
        5,
        8,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    kept = torch.tensor([True, True, True, False, False]).expand(4, 1, 1, 5)
    chosen: Any = {None: None, "bool": kept, "added": (~kept).double() * -1e9}[mask]
    with SampleDraws(3, range(4)):
        drawn = F.scaled_dot_product_attention(q, k, v, attn_mask=chosen, dropout_p=1e-6)
    torch.testing.assert_close(drawn, F.scaled_dot_product_attention(q, k, v, attn_mask=chosen))
