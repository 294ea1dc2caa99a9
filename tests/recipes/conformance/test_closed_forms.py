"""Closed forms of recipes against formulas written down from their publications."""

import pytest
import torch
from formulas import unit
from small_heads import draw
from torch import Tensor

from apecache.errors import RecipeError
from apecache.heads.fold import folded
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.train.batches import FeaturePairs
from apecache.train.initial import initial_model


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
