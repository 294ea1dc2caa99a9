"""Choose what heads are fitted with: by a run, or by a recipe and the names of features."""

from dataclasses import dataclass

from apecache.arguments import AnyPath, as_path
from apecache.errors import RecipeError, RunError
from apecache.evaluate.embeddings import find_features
from apecache.recipes.recipe import Recipe, load_recipe, parse_recipe
from apecache.runs.heads import load_heads
from apecache.runs.load import require_head_run
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.pooling import cached_arrays, require_pooling


@dataclass(frozen=True, kw_only=True)
class FitFeatures:
    """Hold a recipe of heads and the features that it reads."""

    recipe: Recipe
    image: FeatureArray
    text: FeatureArray
    splits: SplitSpec | None = None
    """Splits of the run; None if a recipe was named instead of a run."""


def features_of_recipe(
    store: FeatureStore,
    recipe_name: str,
    image_features: str | None,
    text_features: str | None,
) -> FitFeatures:
    """Open the features that a recipe reads.

    Raises:
        RecipeError: There is no such recipe, or it trains within the towers.
        StoreError, MismatchError: As `cached_array`.
    """
    recipe = load_recipe(recipe_name)
    _require_heads(recipe)
    image, text = cached_arrays(
        store,
        recipe=recipe,
        image_name=image_features,
        text_name=text_features,
    )
    return FitFeatures(recipe=recipe, image=image, text=text)


def features_of_run(store: FeatureStore, run: AnyPath, command: str) -> FitFeatures:
    """Open the features of a run of `fit_head`, whose recipe is fitted again.

    Args:
        store: Store that has the features of the run.
        run: Folder of the run.
        command: Name of the command, for messages.

    Raises:
        RunError: `run` is unfinished, is not of fit-head, or combines several runs.
        RecipeError: Its recipe trains within the towers.
        MismatchError: The store lacks its features, or they are pooled in another way than its
            recipe says.
    """
    run = as_path(run, "run")
    require_head_run(run, command)
    heads = load_heads(run)
    if "recipe" not in heads.training:
        raise RunError(f"{run} is a combination of runs; give one of the runs it is made of")
    recipe = parse_recipe(heads.training["recipe"], str(run))
    _require_heads(recipe)
    image = find_features(heads.image, store, "image")
    text = find_features(heads.text, store, "text")
    # Runs of earlier versions read features of any pooling.
    require_pooling(store, image, recipe)
    require_pooling(store, text, recipe)
    return FitFeatures(
        recipe=recipe,
        image=image,
        text=text,
        splits=SplitSpec(**heads.training["splits"]),
    )


def _require_heads(recipe: Recipe) -> None:
    if not recipe.trains_heads_alone:
        raise RecipeError(
            f"recipe {recipe.name} trains within the towers, or freezes a head; give one of heads"
        )
