"""Heads of recipes against formulas written down from their publications: values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import gelu, layer_norm, linear, unit
from torch import Tensor, nn

from apecache.errors import RecipeError
from apecache.heads.build import build_head, build_heads
from apecache.heads.fold import folded
from apecache.heads.head import Head
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.train.augment import mix
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.initial import initial_model

Weights = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(name: str, side: str, in_dim: int = 12, out_dim: int = 10, **changes: object) -> Head:
    """The head of a recipe, at a small width, without dropout."""
    spec = getattr(load_recipe(name), side).model_copy(update={"dropout": 0.0, **changes})
    torch.manual_seed(0)
    return build_head(spec, in_dim, out_dim)


def assert_same(head: Head, inputs: tuple[Tensor, ...], expected: Tensor, weights: Weights) -> None:
    """Values, and gradients by every weight of the formula."""
    own = head(*inputs)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    target = draw(*own.shape, seed=9)
    own_gradients = torch.autograd.grad((own * target).sum(), list(head.parameters()))
    gradients = torch.autograd.grad((expected * target).sum(), list(weights.values()))
    by_name = dict(zip([name for name, _ in head.named_parameters()], own_gradients, strict=True))
    assert by_name.keys() == weights.keys()
    for name, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(by_name[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def copied(head: Head) -> Weights:
    return {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}


def patch_projection(x: Tensor, weights: Weights, name: str) -> Tensor:
    x = layer_norm(x, weights, f"{name}.norm")
    inner = gelu(linear(x, weights, f"{name}.mlp.0"))
    return linear(x, weights, f"{name}.linear") + linear(inner, weights, f"{name}.mlp.2")


def test_freeze_aligns_image_head_adds_a_projected_cls_to_the_mean_projected_patch() -> None:
    head = head_of("freeze-align", "image")
    weights = copied(head)
    x = draw(5, 7, 12)
    patches = patch_projection(x[:, 1:], weights, "body.tokens").mean(1)
    cls = patch_projection(x[:, 0], weights, "body.cls")
    assert_same(head, (x,), unit(patches + cls), weights)


def test_freeze_aligns_text_residual_goes_round_the_second_layer_only() -> None:
    head = head_of("freeze-align", "text")
    weights = copied(head)
    x = draw(5, 7, 12)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 2, 5]).unsqueeze(1)
    tokens = patch_projection(x, weights, "body.tokens")
    pooled = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    first = linear(pooled, weights, "body.refine.first")
    second = linear(gelu(first), weights, "body.refine.second")
    expected = unit(layer_norm(first + second, weights, "body.refine.norm"))
    assert_same(head, (x, mask), expected, weights)


@pytest.mark.parametrize("side", ["image", "text"])
def test_freeze_aligns_dropout_stands_before_the_projector(side: str) -> None:
    """Dropped values are inputs of the projector: its outputs are never zero themselves."""
    spec = getattr(load_recipe("freeze-align"), side)
    assert spec.dropout == 0.1
    head = build_head(spec.model_copy(update={"dropout": 0.5}), 12, 10).train()
    seen: list[Tensor] = []
    head.body.tokens.linear.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _module, inputs: seen.append(inputs[0])
    )
    torch.manual_seed(0)
    head(draw(5, 7, 12))
    share = float((seen[0] == 0).float().mean())
    assert 0.3 < share < 0.7


def test_fusemix_blocks_are_inverted_bottlenecks_before_a_norm_and_a_linear() -> None:
    head = head_of("fusemix", "text", standardize=False)
    weights = copied(head)
    x = draw(5, 12)
    y = x
    for block in range(2):
        name = f"body.{block}.branch"
        inner = gelu(linear(layer_norm(y, weights, f"{name}.0"), weights, f"{name}.1"))
        y = y + linear(inner, weights, f"{name}.4")
    expected = unit(linear(layer_norm(y, weights, "body.2"), weights, "body.3"))
    assert weights["body.0.branch.1.weight"].shape == (48, 12)
    assert_same(head, (x,), expected, weights)


def test_sail_multiplies_a_clipped_gate_and_begins_as_xavier_says() -> None:
    head = head_of("sail", "text", in_dim=64, out_dim=32)
    weights = copied(head)
    x = draw(5, 64)
    normed = layer_norm(x, weights, "body.norm")
    gate = linear(normed, weights, "body.gate").clamp(0, 6)
    expected = unit(linear(gate * linear(normed, weights, "body.value"), weights, "body.last"))
    assert_same(head, (x,), expected, weights)
    for name, n_in, n_out in (("gate", 64, 512), ("value", 64, 512), ("last", 512, 32)):
        weight = weights[f"body.{name}.weight"]
        assert weight.shape == (n_out, n_in)
        assert float(weight.detach().std()) == pytest.approx(
            math.sqrt(2 / (n_in + n_out)), rel=0.03
        )
        assert float(weight.detach().abs().max()) <= math.sqrt(6 / (n_in + n_out))
        assert not weights[f"body.{name}.bias"].any()


def test_sharelocks_layers_are_linear_batch_norm_relu() -> None:
    head = head_of("sharelock", "text", width=16, standardize=False).train()
    weights = copied(head)
    x = draw(32, 12)
    y = x
    for layer in range(3):
        y = linear(y, weights, f"body.{4 * layer}")
        centered = y - y.mean(0)
        y = centered / (centered.square().mean(0) + 1e-5).sqrt()
        y = y * weights[f"body.{4 * layer + 1}.weight"] + weights[f"body.{4 * layer + 1}.bias"]
        y = y.clamp_min(0)
    expected = unit(linear(y, weights, "body.12"))
    own = head(x)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_apes_text_head_has_4_to_6_linear_layers_in_all() -> None:
    recipe = load_recipe("ape")
    head = build_head(recipe.text, 12, 10)
    n_layers = sum(isinstance(module, nn.Linear) for module in head.modules())
    assert 4 <= n_layers <= 6
    assert recipe.image.kind == "identity"


def test_lilts_projection_is_one_linear_with_bias() -> None:
    image, text = build_heads(
        load_recipe("lilt-projection").image,
        text=load_recipe("lilt-projection").text,
        image_dim=768,
        text_dim=768,
    )
    for head in (image, text):
        weights = copied(head)
        assert sum(p.numel() for p in weights.values()) == 768 * 256 + 256
        x = draw(5, 768)
        assert_same(head, (x,), unit(linear(x, weights, "body")), weights)


# --- closed forms ---------------------------------------------------------------------------------


def correlated(n: int, seed: int) -> tuple[Tensor, Tensor]:
    hidden = draw(n, 5, seed=seed)
    image = hidden @ draw(5, 12, seed=1) + 0.5 * draw(n, 12, seed=seed + 1)
    text = hidden @ draw(5, 8, seed=2) + 0.5 * draw(n, 8, seed=seed + 2)
    return image, text


def as_pairs(image: Tensor, text: Tensor) -> FeaturePairs:
    return FeaturePairs(image=image, text=text, first_text=torch.arange(len(image) + 1))


def test_csa_normalizes_and_then_weights_by_the_correlations() -> None:
    """Similarity = sum of rho_k u_k v_k, of L2-normalized canonical variables u and v."""
    image, text = correlated(400, seed=10)
    new_image, new_text = correlated(30, seed=20)
    recipe = load_recipe("csa", ["closed_form.ridge=[1e-9]", "closed_form.rank=[6]"])
    model, _ = initial_model(
        recipe,
        train=as_pairs(image, text),
        dev=as_pairs(new_image, new_text),
        seed=0,
    )
    own = model.image(new_image) @ model.text(new_text).T
    # Canonical variables by their definition: whiten, then the singular vectors of the rest.
    x = image.double() - image.double().mean(0)
    y = text.double() - text.double().mean(0)
    x_root = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x)))
    y_root = torch.linalg.inv(torch.linalg.cholesky(y.T @ y / len(y)))
    u, rho, vh = torch.linalg.svd(x_root @ (x.T @ y / len(x)) @ y_root.T)
    x_new = (new_image.double() - image.double().mean(0)) @ x_root.T @ u[:, :6]
    y_new = (new_text.double() - text.double().mean(0)) @ y_root.T @ vh[:6].T
    expected = unit(x_new) * rho[:6] @ unit(y_new).T
    torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.image(new_image).norm(dim=-1), torch.ones(30))


def test_csas_heads_fold_their_standardization() -> None:
    image, text = correlated(200, seed=10)
    pairs = as_pairs(image, text)
    model, _ = initial_model(load_recipe("csa"), train=pairs, dev=pairs, seed=0)
    torch.testing.assert_close(folded(model.text)(text), model.text(text), rtol=1e-4, atol=1e-5)


def test_asif_compares_raw_features_and_keeps_the_largest_to_a_power() -> None:
    recipe = load_recipe("asif", ["image.top=5", "text.top=5"])
    assert (recipe.image.standardize, recipe.text.standardize) == (False, False)
    image, text = correlated(40, seed=10)
    image = image + 3  # a mean that standardizing would take away
    model, _ = initial_model(
        recipe,
        train=as_pairs(image, text),
        dev=as_pairs(image, text),
        seed=0,
    )
    cosines = unit(image[:7]) @ unit(image).T
    kept = torch.zeros_like(cosines)
    for row, values in enumerate(cosines):
        for place in values.argsort(descending=True)[:5]:
            kept[row, place] = values[place].clamp_min(0) ** 8
    torch.testing.assert_close(model.image(image[:7]), unit(kept), rtol=1e-4, atol=1e-5)


def test_weighting_before_the_normalization_is_another_similarity() -> None:
    """`weighted-cca` keeps what `csa` was before it followed the published code."""
    image, text = correlated(300, seed=10)
    pairs = as_pairs(image, text)
    closed = ["closed_form.ridge=[0.1]", "closed_form.rank=[6]"]
    published, _ = initial_model(load_recipe("csa", closed), train=pairs, dev=pairs, seed=0)
    ours, _ = initial_model(
        load_recipe("weighted-cca", [*closed, "closed_form.power=[1.0]"]),
        train=pairs,
        dev=pairs,
        seed=0,
    )
    assert not torch.allclose(
        published.image(image) @ published.text(text).T,
        ours.image(image) @ ours.text(text).T,
        atol=1e-3,
    )
    report = retrieval_report(ours.image(image), ours.text(text), torch.arange(300))
    assert report.mean_recall > 50


def test_a_canonical_head_is_refused_where_nothing_makes_its_weights() -> None:
    for settings in (["image.kind=linear"], ["init=ridge"], ["schedule.epochs=3"]):
        with pytest.raises(RecipeError, match="canonical"):
            load_recipe("csa", settings)


def test_mixup_halves_a_batch_with_one_coefficient_for_both_sides() -> None:
    batch = Batch(image=draw(8, 3), text=draw(8, 4, seed=1))
    torch.manual_seed(3)
    mixed = mix(batch, 1.0)
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    torch.testing.assert_close(mixed.image, share * batch.image[:4] + (1 - share) * batch.image[4:])
    torch.testing.assert_close(mixed.text, share * batch.text[:4] + (1 - share) * batch.text[4:])
    assert F.cosine_similarity(mixed.image, batch.image[:4]).mean() > 0
