"""Check a fit of heads by `apecache.train.lint.checks`: one to come, or a finished run."""

import copy
from collections.abc import Iterator, Sequence

import torch

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.errors import MismatchError, RunError
from apecache.evaluate.embeddings import find_features
from apecache.losses.registry import build_temperature
from apecache.recipes.recipe import Recipe, as_recipe, parse_recipe
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit import HeadFit
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.lint.checks import lint_fit, lint_named, lint_recipe
from apecache.train.lint.findings import Finding
from apecache.train.model import AlignmentModel
from apecache.train.pooling import cached_array, require_pooling


def lint_plan(
    recipe: Recipe | AnyPath,
    store: FeatureStore | None = None,
    spec: FitSpec | None = None,
) -> list[Finding]:
    """Check a recipe, or the fit that `fit_head` would begin with it on the CPU.

    Args:
        recipe: Recipe of the fit.
        store: Store of the features; None: only the recipe is checked.
        spec: Settings of the fit.

    Raises:
        RecipeError, IncompleteError, DamagedError: As `fit_head` does.
    """
    recipe = as_recipe(recipe)
    require_type(store, FeatureStore, "store", optional=True)
    require_spec(spec, FitSpec, "spec", optional=True)
    # Without a store only what the recipe says can be checked.
    if store is None:
        return list(lint_recipe(recipe))
    spec = spec or FitSpec()
    image = cached_array(store, recipe=recipe, side="image", name=spec.image_features)
    text = cached_array(store, recipe=recipe, side="text", name=spec.text_features)
    train, dev = load_splits(
        store,
        image=image,
        text=text,
        spec=spec.splits,
        device=torch.device("cpu"),
        recipe=recipe,
    )
    model, _ = initial_model(recipe, train=train, dev=dev, seed=spec.seed)
    optimizer = HeadFit(model, recipe, spec.seed).optimizer
    return lint_fit(
        store,
        arrays=(image, text),
        recipe=recipe,
        splits=spec.splits,
        report_split=spec.report_split,
        train=train,
        model=model,
        optimizer=optimizer,
    )


def lint_run(
    run: AnyPath,
    store: FeatureStore | None = None,
    report_split: str = "test",
) -> list[Finding]:
    """Check a finished run of `fit_head`.

    Args:
        run: Folder of the run.
        store: Store of the run; None: only recipe and splits are checked, not weights and data.
        report_split: Split that results will be reported on.

    Raises:
        RunError: There is no such run.
        MismatchError: The store is not the one that the run was trained on.
    """
    run = as_path(run, "run")
    heads = load_heads(run)
    # The description may be of an older version, or edited by hand.
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
            f"{store.hint(heads.training['data'])}"
        )
    image = find_features(heads.image, store, "image")
    text = find_features(heads.text, store, "text")
    train, _ = load_splits(
        store,
        image=image,
        text=text,
        spec=splits,
        device=torch.device("cpu"),
        recipe=recipe,
    )
    model = _model(heads, recipe)
    return [
        *_lint_pooling(store, arrays=(image, text), recipe=recipe),
        *lint_fit(
            store,
            arrays=(image, text),
            recipe=recipe,
            splits=splits,
            report_split=report_split,
            train=train,
            model=model,
            optimizer=HeadFit(model, recipe, 0).optimizer,
        ),
    ]


def _lint_pooling(
    store: FeatureStore,
    arrays: Sequence[FeatureArray],
    recipe: Recipe,
) -> Iterator[Finding]:
    """Check that a run read features of the pooling that its recipe asks for."""
    for array in arrays:
        try:
            require_pooling(store, array, recipe)
        except MismatchError as error:
            yield Finding(check="pooling", level="error", message=str(error))


def _model(heads: TrainedHeads, recipe: Recipe) -> AlignmentModel:
    """Return the trained heads as a model that can train."""
    # Loaded heads are frozen, and the caller keeps them.
    image = copy.deepcopy(heads.image.head).requires_grad_()
    text = copy.deepcopy(heads.text.head).requires_grad_()
    return AlignmentModel(
        image,
        text=text,
        temperature=build_temperature(recipe.loss),
        loss=recipe.loss,
    )
