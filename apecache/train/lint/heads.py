"""The checks of `apecache.train.lint.checks` on heads that are to be fitted, and on a run of theirs
that exists."""

import copy
from pathlib import Path

import torch

from apecache.errors import MismatchError, RunError
from apecache.evaluate.embeddings import find_features
from apecache.losses.objective import build_temperature
from apecache.recipes.recipe import Recipe, parse_recipe
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.lint.checks import Finding, lint_fit, lint_named, lint_recipe
from apecache.train.loop import Training
from apecache.train.model import AlignmentModel


def lint_plan(
    recipe: Recipe,
    store: FeatureStore | None = None,
    spec: FitSpec | None = None,
) -> list[Finding]:
    """Of a recipe; with a store, of the fit that `fit_head` would begin there on the CPU.

    Raises:
        RecipeError, IncompleteError, DamagedError: as `fit_head` does.
    """
    if store is None:
        return list(lint_recipe(recipe))
    spec = spec or FitSpec()
    arrays = store.array("image", spec.image_features), store.array("text", spec.text_features)
    train, dev = load_splits(store, *arrays, spec.splits, torch.device("cpu"), recipe)
    model, _ = initial_model(recipe, train=train, dev=dev, seed=spec.seed)
    optimiser = Training(model, recipe, spec.seed).optimiser
    return lint_fit(
        store,
        arrays=arrays,
        recipe=recipe,
        splits=spec.splits,
        report_split=spec.report_split,
        train=train,
        model=model,
        optimiser=optimiser,
    )


def lint_run(
    run: Path,
    store: FeatureStore | None = None,
    report_split: str = "test",
) -> list[Finding]:
    """Of a finished run of `fit_head`: its recipe and splits; with its store, also its weights and
    data.

    Raises:
        RunError: no such run. MismatchError: the store is not the one that it was trained on.
    """
    heads = load_heads(run)
    try:
        recipe = parse_recipe(heads.training["recipe"], str(run))
        splits = SplitSpec(**heads.training["splits"])
        n_images = int(heads.training["n_train_images"])
        n_dev = int(heads.training["n_dev_images"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run} does not say how it was trained ({error}); lint takes a run of fit-head"
        ) from None
    if store is None:
        return [*lint_recipe(recipe, n_images), *lint_named(splits, n_dev, report_split)]
    if heads.training["data"] != store.digest:
        raise MismatchError(
            f"{run} was trained on other pairs than those of {store.path}; give its own store"
        )
    arrays = find_features(heads.image, store, "image"), find_features(heads.text, store, "text")
    train, _ = load_splits(store, *arrays, splits, torch.device("cpu"), recipe)
    model = _model(heads, recipe)
    return lint_fit(
        store,
        arrays=arrays,
        recipe=recipe,
        splits=splits,
        report_split=report_split,
        train=train,
        model=model,
        optimiser=Training(model, recipe, 0).optimiser,
    )


def _model(heads: TrainedHeads, recipe: Recipe) -> AlignmentModel:
    """As it was trained, ready to go on."""
    image, text = (copy.deepcopy(side.head).requires_grad_() for side in (heads.image, heads.text))
    return AlignmentModel(
        image,
        text=text,
        temperature=build_temperature(recipe.loss),
        loss=recipe.loss,
    )
