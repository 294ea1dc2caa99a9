"""Heads of recipes against formulas written down from their publications: values, gradients, and
the weights at the start."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from formulas import gelu, layer_norm, linear, unit
from small_heads import draw, small_pairs, small_recipe
from torch import Tensor, nn

from apecache.heads.build import build_head, build_heads
from apecache.heads.head import Head
from apecache.recipes.recipe import load_recipe
from apecache.train.augment import mix
from apecache.train.batches import Batch, FeaturePairs, batches
from apecache.train.model import build_model

Weights = dict[str, Tensor]
Formula = Callable[[Tensor, Tensor, Weights], Tensor]
"""Of features, the mask of valid tokens and the weights by their names in the head."""
STEP = 39
"""At which the losses are compared."""


# --- layers ---------------------------------------------------------------------------------------


def batch_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centered = x - x.mean(0, keepdim=True)
    deviation = (centered.square().mean(0, keepdim=True) + 1e-5).sqrt()
    return centered / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    is_token = mask.unsqueeze(-1)
    return (x * is_token).sum(1) / is_token.sum(1)


# --- heads ----------------------------------------------------------------------------------------


def identity(x: Tensor, _mask: Tensor, _weights: Weights) -> Tensor:
    return x


def one_linear(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    return linear(x, weights, "body")


def ape(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    """Six linear layers in all: one, two residual blocks of two, one."""
    y = linear(x, weights, "body.0")
    for block in ("body.1.branch", "body.2.branch"):
        inner = gelu(linear(layer_norm(y, weights, f"{block}.0"), weights, f"{block}.1"))
        y = y + linear(inner, weights, f"{block}.3")
    return linear(layer_norm(y, weights, "body.3"), weights, "body.4")


def sharelock(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    """Four linear layers, the first three with batch norm and ReLU."""
    for layer in (0, 4, 8):
        x = linear(x, weights, f"body.{layer}")
        x = batch_norm(x, weights, f"body.{layer + 1}").clamp_min(0)
    return linear(x, weights, "body.12")


def fusemix(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    """Two inverted bottlenecks, a norm and a linear layer."""
    for block in ("body.0.branch", "body.1.branch"):
        inner = gelu(linear(layer_norm(x, weights, f"{block}.0"), weights, f"{block}.1"))
        x = x + linear(inner, weights, f"{block}.4")
    return linear(layer_norm(x, weights, "body.2"), weights, "body.3")


def sail(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    normed = layer_norm(x, weights, "body.norm")
    gate = linear(normed, weights, "body.gate").clamp(0, 6)
    return linear(gate * linear(normed, weights, "body.value"), weights, "body.last")


def patch_projection(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = layer_norm(x, weights, f"{name}.norm")
    inner = gelu(linear(x, weights, f"{name}.mlp.0"))
    return linear(x, weights, f"{name}.linear") + linear(inner, weights, f"{name}.mlp.2")


def freeze_align_image(x: Tensor, _mask: Tensor, weights: Weights) -> Tensor:
    """The mean projected patch plus CLS, which has a projector of its own."""
    patches = patch_projection(x[:, 1:], weights, "body.tokens").mean(1)
    return patches + patch_projection(x[:, 0], weights, "body.cls")


def freeze_align_text(x: Tensor, mask: Tensor, weights: Weights) -> Tensor:
    """The residual goes round the second layer only."""
    pooled = masked_mean(patch_projection(x, weights, "body.tokens"), mask)
    first = linear(pooled, weights, "body.refine.first")
    second = linear(gelu(first), weights, "body.refine.second")
    return layer_norm(first + second, weights, "body.refine.norm")


def token_anchors(x: Tensor, mask: Tensor, weights: Weights) -> Tensor:
    """The attention is exp(scale x cosine) over its sum; the score the weighted mean cosine."""
    cosines = unit(layer_norm(x, weights, "body.norm")) @ unit(weights["body.anchors"]).T
    attention = (weights["body.log_scale"].exp() * cosines).exp() * mask.unsqueeze(-1)
    return (attention * cosines).sum(1) / attention.sum(1)


def deep_adapter(x: Tensor, mask: Tensor, weights: Weights) -> Tensor:
    """One pre-norm block with two attention heads, a norm, and a projection of the first token."""
    block = "body.blocks.0"
    normed = layer_norm(x, weights, f"{block}.norm1")
    query, key, value = linear(normed, weights, f"{block}.attention.qkv").chunk(3, dim=-1)
    half = x.shape[-1] // 2
    attended = []
    for features in (slice(0, half), slice(half, None)):
        logits = query[..., features] @ key[..., features].mT / math.sqrt(half)
        shares = logits.exp() * mask.unsqueeze(1)
        attended.append(shares / shares.sum(-1, keepdim=True) @ value[..., features])
    x = x + linear(torch.cat(attended, dim=-1), weights, f"{block}.attention.out")
    inner = gelu(linear(layer_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.0"))
    x = x + linear(inner, weights, f"{block}.mlp.2")
    return linear(layer_norm(x[:, 0], weights, "body.norm"), weights, "body.last")


FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "ape": (identity, ape),
    "deep-adapter": (deep_adapter, deep_adapter),
    "freeze-align": (freeze_align_image, freeze_align_text),
    "fusemix": (fusemix, fusemix),
    "lilt-projection": (one_linear, one_linear),
    "sail": (sail, sail),
    "sharelock": (identity, sharelock),
    "structure": (one_linear, one_linear),
    "token-anchors": (token_anchors, token_anchors),
}
"""Image before text."""
STANDARDIZED = {"ape", "fusemix", "sharelock", "structure", "token-anchors"}


# --- losses ---------------------------------------------------------------------------------------


def info_nce(image: Tensor, text: Tensor, weights: Weights) -> Tensor:
    """The mean of both cross-entropies of cosines over T; the parameter is T or log(1 / T)."""
    if "temperature.temperature" in weights:
        logits = image @ text.T / weights["temperature.temperature"]
    else:
        logits = image @ text.T * weights["temperature.log_scale"].exp()
    right = logits.diagonal()
    to_text = (logits.exp().sum(1).log() - right).mean()
    to_image = (logits.exp().sum(0).log() - right).mean()
    return (to_text + to_image) / 2


def sail_loss(image: Tensor, text: Tensor, weights: Weights) -> Tensor:
    """The mean over two N x N blocks, one for each caption; an image's captions stand together."""
    n = len(image)
    signs = 2 * torch.eye(n, dtype=torch.float64) - 1
    losses = []
    for caption in (0, 1):
        cosines = image @ text[caption::2].T
        logits = weights["temperature.log_scale"].exp() * cosines + weights["temperature.bias"]
        losses.append((1 + (-signs * logits).exp()).log().sum() / n)
    return (losses[0] + losses[1]) / 2


def bent(before: Tensor, after: Tensor) -> Tensor:
    """STRUCTURE: the Jensen-Shannon divergence of the similarities before and after a head."""
    rows = []
    for features in (before.detach(), after):
        centered = unit(features) - unit(features).mean(0)
        weights = (centered @ centered.T / 0.05).exp()
        rows.append(weights / weights.sum(1, keepdim=True))
    mean = (rows[0] + rows[1]) / 2
    terms = [(p * (p / mean).log()).sum(1).mean() for p in rows]
    return (terms[0] + terms[1]) / 2


# --- values and gradients -------------------------------------------------------------------------


def standardized(x: Tensor, train: Tensor, lengths: Tensor | None) -> Tensor:
    """Features less the mean of all training features, over their deviation; no padding."""
    if lengths is not None:
        train = train[torch.arange(train.shape[1]) < lengths.unsqueeze(1)]
    rows = train.flatten(0, -2).double()
    mean = rows.mean(0)
    return (x - mean) / (rows - mean).square().mean(0).sqrt()


def perturbed(*heads: Head) -> None:
    """Moves all weights: norms of 1 and biases of 0 would hide what is left out."""
    for head in heads:
        for number, parameter in enumerate(head.parameters()):
            with torch.no_grad():
                parameter.add_(0.4 * draw(*parameter.shape, seed=number))


def batch_of(name: str, pairs: FeaturePairs) -> Batch:
    generator = torch.Generator().manual_seed(0)
    captions = load_recipe(name).loss.captions
    return next(batches(pairs, batch_size=8, generator=generator, captions=captions))


def by_formula(
    name: str,
    side: str,
    features: Tensor,
    mask: Tensor | None,
    pairs: FeaturePairs,
    weights: Weights,
) -> Tensor:
    """The embeddings of one side, in double precision."""
    if mask is None:
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
    if name in STANDARDIZED:
        lengths = pairs.text_lengths if side == "text" else None
        features = standardized(features, train=getattr(pairs, side), lengths=lengths)
    side_weights = {
        key.removeprefix(f"{side}."): value
        for key, value in weights.items()
        if key.startswith(f"{side}.")
    }
    formula = FORMULAS[name][side == "text"]
    return unit(formula(features, mask, side_weights))


@pytest.mark.parametrize("name", FORMULAS)
def test_embeddings_losses_and_all_gradients_are_those_of_the_formulas(name: str) -> None:
    recipe = small_recipe(name)
    pairs = small_pairs(recipe)
    model = build_model(recipe, pairs, seed=0).train()
    perturbed(model.image, model.text)
    batch = batch_of(name, pairs)
    own_inputs = (batch.image.requires_grad_(), batch.text.requires_grad_())
    image, text = (x.detach().double().requires_grad_() for x in own_inputs)
    weights = {key: p.detach().double().requires_grad_() for key, p in model.named_parameters()}

    own = model(batch, STEP)
    embedded_image = by_formula(name, "image", image, batch.image_mask, pairs, weights)
    embedded_text = by_formula(name, "text", text, batch.text_mask, pairs, weights)
    loss_formula = sail_loss if name == "sail" else info_nce
    loss = loss_formula(embedded_image, embedded_text, weights)
    if name == "structure":
        terms = bent(image, embedded_image) + bent(text, embedded_text)
        loss = loss + 10 * (STEP + 1) / 100 * terms / 2

    own_image = model.image(batch.image, batch.image_mask)
    torch.testing.assert_close(own_image.double(), embedded_image, rtol=1e-4, atol=1e-5)
    own_text = model.text(batch.text, batch.text_mask)
    torch.testing.assert_close(own_text.double(), embedded_text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.double(), loss, rtol=1e-5, atol=1e-5)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys() - FIXED.get(name, set())
    own_gradients = torch.autograd.grad(own, [*own_inputs, *trained.values()])
    gradients = torch.autograd.grad(loss, [image, text, *(weights[key] for key in trained)])
    keys = ["image features", "text features", *trained]
    for key, own_gradient, gradient in zip(keys, own_gradients, gradients, strict=True):
        torch.testing.assert_close(
            own_gradient.double(),
            gradient,
            rtol=1e-3,
            atol=1e-5,
            msg=named(key),
        )


def named(name: str) -> Callable[[str], str]:
    """Put a name in front of the message of a comparison."""
    return lambda text: f"{name}: {text}"


FIXED = {name: {"temperature.log_scale"} for name in ("sharelock", "structure")}
"""Parameters that get no gradient."""


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "layer", "share"),
    [
        ("freeze-align", "image", "body.tokens.linear", 0.1),
        ("freeze-align", "image", "body.cls.mlp.0", 0.1),
        ("freeze-align", "text", "body.tokens.mlp.0", 0.1),
        ("fusemix", "image", "body.0.branch.4", 0.6),
        ("fusemix", "text", "body.1.branch.4", 0.6),
        ("sail", "image", "body.last", 0.3),
        ("sail", "text", "body.last", 0.3),
        ("sharelock", "text", "body.4", 0.2),
        ("sharelock", "text", "body.12", 0.2),
    ],
)
def test_dropout_takes_its_share_of_what_enters_a_layer(
    name: str,
    side: str,
    layer: str,
    share: float,
) -> None:
    """Freeze-align drops before its projectors, FuseMix within a bottleneck, SAIL before W3."""
    spec = getattr(load_recipe(name), side).model_copy(update={"width": 64})
    x = draw(400, 12) if spec.cut == "pooled" else draw(400, 3, 12)
    seen: list[Tensor] = []
    # ReLU gives zeros of its own, hence the ratio.
    for dropout in (spec.dropout, 0.0):
        torch.manual_seed(0)
        head = build_head(spec.model_copy(update={"dropout": dropout}), 12, 10).train()
        head.get_submodule(layer).register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0])
        )
        head(x)
    dropped, whole = (float((values != 0).float().mean()) for values in seen)
    assert 1 - dropped / whole == pytest.approx(share, abs=0.03)


# --- weights at the start -------------------------------------------------------------------------


def torch_bound(n_in: int, _n_out: int) -> float:
    """PyTorch's linear layers: weights and biases uniform in +-1 / sqrt(n_in)."""
    return 1 / math.sqrt(n_in)


def xavier_bound(n_in: int, n_out: int) -> float:
    """Glorot and Bengio 2010: weights uniform in +-sqrt(6 / (n_in + n_out)), biases 0."""
    return math.sqrt(6 / (n_in + n_out))


@pytest.mark.parametrize(
    ("name", "bound_of"),
    [
        ("ape", torch_bound),
        ("deep-adapter", torch_bound),
        ("freeze-align", torch_bound),
        ("fusemix", torch_bound),
        ("lilt-projection", torch_bound),
        ("sail", xavier_bound),
        ("sharelock", torch_bound),
        ("structure", torch_bound),
        ("token-anchors", torch_bound),
    ],
)
def test_weights_begin_with_the_published_deviations(
    name: str,
    bound_of: Callable[[int, int], float],
) -> None:
    """Linear layers as `bound_of` says, norms 1 and 0, anchors N(0, 1 / width), their scale 10."""
    recipe = load_recipe(name)
    torch.manual_seed(0)
    heads = build_heads(recipe.image, text=recipe.text, image_dim=64, text_dim=48)
    for head in heads:
        unchecked = dict(head.named_parameters())
        for path, module in head.named_modules():
            if isinstance(module, nn.Linear):
                bound = bound_of(module.in_features, module.out_features)
                assert_uniform(unchecked.pop(f"{path}.weight"), bound)
                bias = unchecked.pop(f"{path}.bias").detach()
                if bound_of is xavier_bound:
                    assert not bias.any()
                else:
                    assert 0.8 * bound < float(bias.abs().max()) <= bound
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
                assert bool((unchecked.pop(f"{path}.weight") == 1).all())
                assert not unchecked.pop(f"{path}.bias").any()
        if name == "token-anchors":
            anchors = unchecked.pop("body.anchors").detach()
            assert float(anchors.std()) == pytest.approx(1 / math.sqrt(head.in_dim), rel=0.02)
            assert float(anchors.abs().max()) > 3.5 / math.sqrt(head.in_dim)
            assert float(unchecked.pop("body.log_scale").detach().exp()) == pytest.approx(10)
        assert not unchecked


def assert_uniform(weight: Tensor, bound: float) -> None:
    values = weight.detach()
    assert 0.98 * bound < float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(values.mean()) == pytest.approx(0, abs=0.05 * bound)


@pytest.mark.parametrize(
    ("name", "side", "widths"),
    [
        ("ape", "text", [1024, 1024, 1024, 1024, 1024, 768]),
        ("fusemix", "image", [3072, 768, 3072, 768, 512]),
        ("lilt-projection", "image", [256]),
        ("sail", "image", [3072, 3072, 1024]),
        ("sail", "text", [6144, 6144, 1024]),
        ("sharelock", "text", [2048, 2048, 2048, 768]),
    ],
)
def test_linear_layers_have_the_named_widths(name: str, side: str, widths: list[int]) -> None:
    """On features of width 768."""
    spec = getattr(load_recipe(name), side)
    with torch.device("meta"):
        head = build_head(spec, in_dim=768, out_dim=spec.dim or 768)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == widths


def test_mixup_halves_a_batch_with_one_coefficient_for_both_sides() -> None:
    batch = Batch(image=draw(8, 3), text=draw(8, 4, seed=1))
    torch.manual_seed(3)
    mixed = mix(batch, 1.0)
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    torch.testing.assert_close(mixed.image, share * batch.image[:4] + (1 - share) * batch.image[4:])
    torch.testing.assert_close(mixed.text, share * batch.text[:4] + (1 - share) * batch.text[4:])
    assert F.cosine_similarity(mixed.image, batch.image[:4]).mean() > 0
