"""The scikit-learn face: scikit-learn's own checks (none is expected to fail), and that it finds
planted pairs."""

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from apecache.errors import RecipeError
from apecache.recipes.recipe import load_recipe
from apecache.train.estimator import AlignmentHead

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = (
    "schedule.epochs=8",
    "schedule.batch_size=64",
    "optimizer.lr=0.01",
    "image.dim=16",
    "text.dim=16",
)
LINEAR = AlignmentHead("lilt-projection", ("schedule.epochs=2", "image.dim=8", "text.dim=8"))


ROUNDED = {"check_methods_sample_order_invariance", "check_methods_subset_invariance"}
"""Checks that compare at a relative 1e-7. Heads compute in float32, and how a row of a product is
rounded depends on its position and on the processor: the test below stands for them."""


@parametrize_with_checks([LINEAR, AlignmentHead("cca")])
def test_it_is_an_estimator(estimator: Any, check: Any) -> None:
    if check.func.__name__ in ROUNDED:
        pytest.skip("compared at the tolerance of float32 in the test below")
    check(estimator)


@pytest.mark.parametrize("estimator", [LINEAR, AlignmentHead("cca")], ids=["linear", "cca"])
def test_a_row_is_transformed_alike_in_any_order_and_company(estimator: Any) -> None:
    X, Y = planted(60)  # noqa: N806
    fitted = clone(estimator).fit(X, Y)
    expected = fitted.transform(X)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(fitted.transform(X[order]), expected[order], rtol=0, atol=1e-5)
    one_by_one = np.concatenate([fitted.transform(row[None]) for row in X])
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-5)


def planted(n: int = 300, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    maps = np.random.default_rng(7)
    hidden = rng.normal(size=(n, 6))
    X = hidden @ maps.normal(size=(6, 12)) + 0.1 * rng.normal(size=(n, 12))  # noqa: N806
    Y = hidden @ maps.normal(size=(6, 10)) + 0.1 * rng.normal(size=(n, 10))  # noqa: N806
    return X, Y


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("projection", SHORT), ("gated", SHORT), ("cca", ()), ("ridge", ()), ("asif", ())],
)
def test_closed_forms_and_trained_recipes_find_new_pairs(
    recipe: str,
    settings: tuple[str, ...],
) -> None:
    model = AlignmentHead(recipe, settings).fit(*planted())
    X, Y = planted(60, seed=1)  # noqa: N806
    assert model.score(X, Y) > 0.3
    assert model.score(X, Y[::-1]) < 0.1
    image, text = model.transform(X, Y)
    assert image.shape == text.shape == (60, model.model_.image.out_dim)
    assert image.dtype == text.dtype == np.float32
    assert np.abs((image * image).sum(1) - 1).max() < 1e-5
    assert np.array_equal(model.transform(X), image)
    assert (image @ text.T).argmax(1).tolist().count(0) < 30


def test_the_score_is_the_mean_of_both_ways_by_its_definition() -> None:
    model = AlignmentHead("cca").fit(*planted())
    X, Y = planted(40, seed=2)  # noqa: N806
    image, text = model.transform(X, Y)
    scores = image @ text.T
    hits = [(scores.argmax(axis) == np.arange(40)).mean() for axis in (0, 1)]
    assert model.score(X, Y) == pytest.approx(sum(hits) / 2)


def test_it_works_in_pipelines_clones_and_cross_validation() -> None:
    X, Y = planted()  # noqa: N806
    model = make_pipeline(StandardScaler(), AlignmentHead("cca"))
    assert cross_val_score(clone(model), X, Y, cv=3).min() > 0.2
    fitted = model.fit(X, Y)
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    assert np.array_equal(again.transform(X), fitted.transform(X))
    names = fitted[-1].get_feature_names_out()
    assert names[0] == "alignmenthead0"


def test_the_seed_decides_and_a_recipe_object_is_a_recipe() -> None:
    X, Y = planted(80)  # noqa: N806
    one, same, other = (
        AlignmentHead("projection", SHORT, random_state=s).fit(X, Y).transform(X) for s in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    given = AlignmentHead(load_recipe("projection", SHORT)).fit(X, Y).transform(X)
    assert np.array_equal(given, one)


def test_what_does_not_fit_is_named() -> None:
    X, Y = planted(40)  # noqa: N806
    with pytest.raises(RecipeError, match="needs more than pooled features"):
        AlignmentHead("deep-adapter").fit(X, Y)
    with pytest.raises(ValueError, match=r"dev_fraction 0\.9: expected"):
        AlignmentHead("cca", dev_fraction=0.9).fit(X, Y)
    model = AlignmentHead("cca").fit(X, Y)
    with pytest.raises(ValueError, match="y has 9 features, but AlignmentHead was fitted with 10"):
        model.transform(X, Y[:, :9])
    with pytest.raises(ValueError, match="X has 40 rows and y 39"):
        model.score(X, Y[:39])
