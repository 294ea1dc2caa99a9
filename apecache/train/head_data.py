"""What the head trainer works on: its settings, and the training and dev pairs of a store."""

from dataclasses import dataclass, field, replace

import torch

from apecache.arguments import AnyPath
from apecache.errors import RecipeError
from apecache.heads.head import HeadSpec
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
    SplitSpec,
    choose_splits,
    load_on,
    require_images,
    select_pairs,
)


@dataclass(frozen=True)
class FitSpec:
    """Which features, which splits, where. Names of features are needed only if the store has
    several.

    `report_split` will be reported: a fit that trains or chooses on it is refused
    (`apecache.train.lint.checks`). A checkpoint is written at most every `save_seconds`. For the
    ledger: `price_per_hour` of this machine in any currency, and `extract_report`, what `apecache
    extract --json` printed. Features, splits and seed are part of what a fit is: with another value
    a fit that was broken off does not go on.
    """

    image_features: str | None = None
    text_features: str | None = None
    splits: SplitSpec = field(default_factory=SplitSpec)
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    save_seconds: float = 30.0
    report_split: str = "test"
    price_per_hour: float | None = None
    extract_report: AnyPath | None = None


def load_splits(
    store: FeatureStore,
    image: FeatureArray,
    text: FeatureArray,
    spec: SplitSpec,
    device: torch.device,
    recipe: Recipe | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Training and dev pairs, on the device where they fit. Raises as `fit_head` does."""
    for array, head in ((image, recipe.image), (text, recipe.text)) if recipe else ():
        require_kind(array, head, recipe.name if recipe else "")
    pairs = store.pairs
    content = equal_images(image)
    masks = choose_splits(pairs, spec, content)
    features = load_on(image, device), load_on(text, device)
    ok_images = image.load_ok()
    ok_texts = text.load_ok()
    equal = content, pairs.caption_ids
    found = [
        select_pairs(*features, pairs.image_rows, mask & ok_images, ok_texts, *equal)
        for mask in masks
    ]
    require_images(found[0], found[1])
    views = image.views is not None, text.views is not None
    train, dev = (
        replace(x, image_views=views[0], text_views=views[1], device=device) for x in found
    )
    return train, dev


def require_kind(array: FeatureArray, head: HeadSpec, recipe: str) -> None:
    """Raises RecipeError for a head of pooled features on tokens, and for what no head takes."""
    side = array.record.modality
    if array.tokens is not None and (head.cut == "pooled" or array.views is not None):
        what = "views of tokens" if array.views is not None else "tokens"
        raise RecipeError(
            f"recipe {recipe}: {side}.kind {head.kind} takes one vector for each {side}, but "
            f"{array.name} holds {what};"
            f" choose other features with --{side}-features"
        )
