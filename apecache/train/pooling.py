"""Find the cached features with the pooling that a recipe asks for, or say how to add them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from apecache.encoders.spec import EncoderSpec, Pooling, parse_cut
from apecache.errors import MismatchError, RecipeError
from apecache.fingerprint import Modality
from apecache.recipes.recipe import Recipe
from apecache.recipes.sections import DistillationSpec
from apecache.store.array import FeatureArray
from apecache.store.joined import JoinedArray
from apecache.store.layout import ArrayRecord
from apecache.store.reader import FeatureStore

TIMM_POOLINGS = {"token": "cls", "avg": "mean"}
"""Pooling of a timm model's own head, by timm's name of it."""
TEACHER_CUTS = {"contrastive": "cls@-1", "mse": "cls@-1", "classes": "default"}
"""Cut of a teacher's features by `distillation.kind`: the CLS of the last block, before the final
norm; for `classes` the encoder's own pooling, which its classifier takes."""


def asked_pooling(recipe: Recipe, side: Modality) -> Pooling:
    """Return the pooling of cached features that a recipe asks for; `default`: it takes any.

    Heads on tokens pool themselves, so they ask for none.
    """
    head = recipe.image if side == "image" else recipe.text
    if head.cut == "tokens":
        return "default"
    towers = recipe.towers
    return towers.image_pooling if side == "image" else towers.text_pooling


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
    pooling = asked_pooling(recipe, side)
    if name is None and pooling != "default":
        arrays = store.arrays(side)
        suited = [array for array in arrays if has_asked_pooling(array, recipe)]
        if len(suited) == 1:
            return suited[0]
        if arrays and not suited:
            # Refuses them, and names those that are nearest to what is asked for.
            require_pooling(store, min(arrays, key=_n_differences), recipe)
    # With no features, or several suited ones, the store's own message lists what there is.
    array = store.array(side, name)
    require_pooling(store, array, recipe)
    return array


def cached_arrays(
    store: FeatureStore,
    recipe: Recipe,
    image_name: str | None,
    text_name: str | None,
) -> tuple[FeatureArray, FeatureArray]:
    """Return the cached features of images and of texts; raises as `cached_array` does."""
    return (
        cached_array(store, recipe=recipe, side="image", name=image_name),
        cached_array(store, recipe=recipe, side="text", name=text_name),
    )


def has_asked_pooling(array: FeatureArray, recipe: Recipe) -> bool:
    """Tell whether features are pooled as the recipe says."""
    return not _unsuited_parts(array, recipe)


def require_pooling(store: FeatureStore, array: FeatureArray, recipe: Recipe) -> None:
    """Check that cached features are pooled as the recipe says; joined ones part by part.

    Raises:
        MismatchError: They are not. The message says how to add those that are needed.
    """
    unsuited = _unsuited_parts(array, recipe)
    if not unsuited:
        return
    side = array.record.modality
    pooling = asked_pooling(recipe, side)
    described = " and ".join(f"{part.name} {_state(part)}" for part in unsuited)
    specs = [part.record.spec for part in unsuited]
    commands = [_extract_again(store, spec, pooling) for spec in specs if not spec.is_imported]
    steps: list[str] = []
    if any(spec.is_imported for spec in specs):
        steps.append(
            f"import {side} features that are pooled by {pooling}, and set "
            f"towers.{side}_pooling=default, for an import does not record how features are pooled"
        )
    if commands:
        # Two cuts of one encoder have one command.
        steps.append(
            f"add those pooled by {pooling} with: {'; and with: '.join(dict.fromkeys(commands))}"
        )
    raise MismatchError(
        f"recipe {recipe.name}: towers.{side}_pooling is {pooling}, but the {side} features "
        f"{described}; {'; '.join(steps)}"
    )


def _unsuited_parts(array: FeatureArray, recipe: Recipe) -> list[FeatureArray]:
    """Return the features that are pooled in another way; of joined ones, those parts."""
    pooling = asked_pooling(recipe, array.record.modality)
    if pooling == "default":
        return []
    parts = array.arrays if isinstance(array, JoinedArray) else (array,)
    return [part for part in parts if not is_pooled_by(part, pooling)]


def is_pooled_by(array: FeatureArray, pooling: str) -> bool:
    """Tell whether features are one vector of the encoder's output, pooled in this way."""
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


def _n_differences(array: FeatureArray) -> int:
    """Count in how many ways features differ from pooled ones of an encoder; imported ones most."""
    spec = array.record.spec
    return (spec.layer is not None) + (array.tokens is not None) + 4 * spec.is_imported


def _state(array: FeatureArray) -> str:
    """Say how features are pooled."""
    record = array.record
    if record.spec.is_imported:
        return "were imported without their encoder"
    if array.tokens is not None:
        return "are tokens"
    if record.spec.layer is not None:
        return f"are of an inner layer ({record.spec.pooling}@{record.spec.layer})"
    pooling = pooling_of(record)
    if pooling == "default":
        return "have their encoder's own pooling"
    return f"are pooled by {pooling}"


# --- teachers -------------------------------------------------------------------------------------


def teacher_array(
    store: FeatureStore,
    distillation: DistillationSpec,
    recipe_name: str,
) -> FeatureArray:
    """Return the features of a recipe's teacher.

    Without a name these are the only image features of the cut that `distillation.kind` learns
    from.

    Raises:
        RecipeError: The store has no features of that name, or several of that cut.
        MismatchError: It has none of that cut. The message has the command that adds them.
    """
    arrays = store.arrays("image")
    names = [array.name for array in arrays]
    available = f"{store.path} has the image features {', '.join(names) or 'none'}"
    cut = TEACHER_CUTS[distillation.kind]
    if distillation.teacher:
        if distillation.teacher in names:
            return arrays[names.index(distillation.teacher)]
        raise RecipeError(
            f"recipe {recipe_name}: {available}, but not the teacher {distillation.teacher!r}; set "
            f"distillation.teacher, or add it with: {extract_command(store, 'image', cut)}"
        )
    suited = [array for array in arrays if _is_cut_at(array, cut)]
    if len(suited) == 1:
        return suited[0]
    if suited:
        raise RecipeError(
            f"recipe {recipe_name}: {available}, of which {len(suited)} could be the teacher's; "
            "set distillation.teacher to one of them"
        )
    # The encoder of a single array is the likeliest teacher.
    command = extract_command(store, "image", cut)
    if len(arrays) == 1 and not arrays[0].record.spec.is_imported:
        command = _extract_again(store, arrays[0].record.spec, cut)
    needed = "their encoder's own pooling" if cut == "default" else f"the cut {cut}"
    raise MismatchError(
        f"recipe {recipe_name}: {available}, and none with {needed}, from which "
        f"distillation.kind {distillation.kind} learns; name others with distillation.teacher, or "
        f"add the teacher's with: {command}"
    )


def _is_cut_at(array: FeatureArray, cut: str) -> bool:
    """Tell whether features are those of one view that an encoder gives with this cut."""
    spec = array.record.spec
    is_plain = array.tokens is None and array.views is None and not spec.is_imported
    return is_plain and (spec.pooling, spec.layer) == parse_cut(cut)


# --- commands -------------------------------------------------------------------------------------


def extract_command(
    store: FeatureStore,
    side: Modality,
    cut: str,
    encoder: str = "ENCODER",
    options: Sequence[str] = (),
) -> str:
    """Return the command that adds features to a store; the user puts in the source."""
    words = ["apecache", "extract", "SOURCE", "--store", str(store.path), "--add"]
    words += [f"--{side}", encoder, *options]
    if cut != "default":
        words += [f"--{side}-cut", cut]
    return shlex.join(words)


def _extract_again(store: FeatureStore, spec: EncoderSpec, cut: str) -> str:
    """Return the command that adds another cut of an encoder, with the same inputs."""
    options = {
        "--resolution": spec.resolution,
        "--max-tokens": spec.max_tokens,
        "--text-prefix": spec.prefix,
        "--resize": None if spec.resize == "reference" else spec.resize,
    }
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    return extract_command(
        store,
        side=spec.modality,
        cut=cut,
        encoder=str(spec),
        options=words,
    )
