"""Load what the head trainer reads: the training and dev pairs of a store."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

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
    """Say what a fit of heads reads, and how it runs.

    Features, splits and seed identify a fit: with another value an interrupted fit is not resumed.
    """

    image_features: str | None = None
    """Name of the image features; needed if the store has several."""
    text_features: str | None = None
    """Name of the text features, as `image_features`."""
    splits: SplitSpec = field(default_factory=SplitSpec)
    """Training and dev split."""
    seed: int = 0
    """Seed of weights, batches and dropout."""
    device: str = "auto"
    """Device of the fit."""
    overwrite: bool = False
    """Whether a finished run in the folder may be replaced."""
    save_seconds: float = 30.0
    """Least time between two checkpoints."""
    report_split: str = "test"
    """Split that results will be reported on. A fit that trains or chooses on it is refused."""
    price_per_hour: float | None = None
    """Price of this machine in any currency, for the ledger."""
    extract_report: AnyPath | None = None
    """File with the output of `apecache extract --json`, for the ledger."""


def load_splits(
    store: FeatureStore,
    image: FeatureArray,
    text: FeatureArray,
    spec: SplitSpec,
    device: torch.device,
    recipe: Recipe | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Load training and dev pairs, on the device where they fit. Raises as `fit_head` does.

    Args:
        store: Store of the features.
        image: Image features.
        text: Text features.
        spec: Training and dev split.
        device: Device of the batches.
        recipe: Recipe whose heads must take these features; None: not checked.
    """
    if recipe is not None:
        require_kind(image, recipe.image, recipe.name)
        require_kind(text, recipe.text, recipe.name)
    pairs = store.pairs
    # Splits first: a wrong name is reported before gigabytes are read.
    content = equal_images(image)
    train_mask, dev_mask = choose_splits(pairs, spec, content)
    image_features = load_on(image, device)
    text_features = load_on(text, device)
    ok_images = image.load_ok()
    ok_texts = text.load_ok()

    def pairs_of(mask: NDArray[np.bool_]) -> FeaturePairs:
        return select_pairs(
            image_features,
            text=text_features,
            image_rows=pairs.image_rows,
            keep_images=mask & ok_images,
            ok_texts=ok_texts,
            content=content,
            caption_ids=pairs.caption_ids,
        )

    train = pairs_of(train_mask)
    dev = pairs_of(dev_mask)
    require_images(train, dev)
    image_views = image.views is not None
    text_views = text.views is not None
    train = replace(train, image_views=image_views, text_views=text_views, device=device)
    dev = replace(dev, image_views=image_views, text_views=text_views, device=device)
    return train, dev


def require_kind(array: FeatureArray, head: HeadSpec, recipe: str) -> None:
    """Check that a head can take these features.

    Raises:
        RecipeError: The features are tokens and the head takes pooled features, or they are views
            of tokens, which no head takes.
    """
    side = array.record.modality
    if array.tokens is not None and (head.cut == "pooled" or array.views is not None):
        held_values = "views of tokens" if array.views is not None else "tokens"
        raise RecipeError(
            f"recipe {recipe}: {side}.kind {head.kind} takes one vector for each {side}, but "
            f"{array.name} holds {held_values};"
            f" choose other features with --{side}-features"
        )
