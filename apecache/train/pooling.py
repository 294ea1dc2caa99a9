"""Find the cached features with the pooling that a recipe asks for."""

from collections.abc import Mapping
from typing import Any

from apecache.errors import MismatchError
from apecache.fingerprint import Modality
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.layout import ArrayRecord
from apecache.store.reader import FeatureStore

TIMM_POOLINGS = {"token": "cls", "avg": "mean"}
"""Pooling of a timm model's own head, by timm's name of it."""


def cached_array(
    store: FeatureStore,
    recipe: Recipe,
    side: Modality,
    name: str | None,
) -> FeatureArray:
    """Return the cached features of a side that a recipe reads.

    Without a name these are the only ones of the side, or the only ones that are pooled as the
    recipe's `towers.image_pooling` and `towers.text_pooling` say.

    Raises:
        StoreError: As `FeatureStore.array`.
        MismatchError: The features are pooled in another way. The message has the command that adds
            those that are needed.
    """
    towers = recipe.towers
    pooling = towers.image_pooling if side == "image" else towers.text_pooling
    if pooling == "default":
        return store.array(side, name)
    arrays = store.arrays(side)
    if name is None:
        suited = [array for array in arrays if is_pooled_by(array, pooling)]
        if len(suited) == 1:
            return suited[0]
        if suited or not arrays:
            # The store's own message lists the features to choose from.
            return store.array(side, name)
    array = arrays[0] if name is None else store.array(side, name)
    require_pooling(array, recipe)
    return array


def require_pooling(array: FeatureArray, recipe: Recipe) -> None:
    """Check that cached features are pooled as the recipe says.

    Raises:
        MismatchError: They are not. The message has the command that adds those that are needed.
    """
    record = array.record
    side = record.modality
    towers = recipe.towers
    pooling = towers.image_pooling if side == "image" else towers.text_pooling
    # Heads on tokens pool themselves, and other heads refuse tokens.
    if pooling == "default" or array.tokens is not None or is_pooled_by(array, pooling):
        return
    raise MismatchError(
        f"recipe {recipe.name}: towers.{side}_pooling is {pooling}, but the {side} features "
        f"{record.name} are pooled by {pooling_of(record)}; add the others with: apecache extract "
        f"SOURCE --store STORE --add --{side} {record.spec} --{side}-cut {pooling}"
    )


def is_pooled_by(array: FeatureArray, pooling: str) -> bool:
    """Tell whether features are one vector of the encoder's end, pooled in this way."""
    record = array.record
    is_end = record.spec.layer is None and array.tokens is None
    return is_end and pooling_of(record) == pooling


def pooling_of(record: ArrayRecord) -> str:
    """Return the pooling of features, also where it is the encoder's own.

    `default` where the fingerprint does not say what the encoder's own pooling is.
    """
    if record.spec.pooling != "default":
        return record.spec.pooling
    fields = record.encoder.fields
    recorded = _at(fields, "inputs", "pooling")
    if recorded in (None, "default", "model"):
        recorded = TIMM_POOLINGS.get(str(_at(fields, "architecture", "pool")))
    return "default" if recorded is None else str(recorded)


def _at(fields: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a value of a fingerprint; None if it is not there."""
    values = fields.get(section)
    return values.get(key) if isinstance(values, Mapping) else None
