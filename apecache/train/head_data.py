"""Load what the head trainer reads: the training and dev pairs of a store."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from apecache.arguments import AnyPath, as_path
from apecache.device import CPU
from apecache.errors import RecipeError
from apecache.heads.head import HeadSpec
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.joined import widths_of
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
    SplitSpec,
    choose_splits,
    require_images,
)
from apecache.train.keep_list import read_keep_list
from apecache.train.paired_rows import SelectedRows, pairs_of, select_rows
from apecache.train.resident import (
    choose_resident,
    feature_budget_bytes,
    fit_bytes,
    load_rows,
    side_rows,
)


@dataclass(frozen=True)
class FitSpec:
    """Say what a fit of heads reads, and how it runs.

    Features, splits and seed identify a fit: with another value an interrupted fit is not resumed.
    """

    image_features: str | None = None
    """Name of the image features; needed if the store has several.

    Names with commas between them: the features of several encoders, side by side.
    """
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
    keep: AnyPath | None = None
    """Keep list of `apecache curate`: only its pairs train. The dev split stays whole."""
    extract_report: AnyPath | None = None
    """File with the output of `apecache extract --json`, for the ledger."""


def load_splits(
    store: FeatureStore,
    image: FeatureArray,
    text: FeatureArray,
    spec: SplitSpec,
    device: torch.device,
    recipe: Recipe | None = None,
    reserved_bytes: int = 0,
    keep: AnyPath | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Load training and dev pairs, on the device where they fit. Raises as `fit_head` does.

    Args:
        store: Store of the features.
        image: Image features.
        text: Text features.
        spec: Training and dev split.
        device: Device of the batches.
        recipe: Recipe whose heads must take these features, and whose memory is left free on the
            device; None: not checked.
        reserved_bytes: Other memory that is left free on the device.
        keep: Keep list of the pairs that train; None: all train.
    """
    if recipe is not None:
        require_kind(image, recipe.image, recipe.name)
        require_kind(text, recipe.text, recipe.name)
    pairs = store.pairs
    # Splits first: a wrong name is reported before gigabytes are read.
    content = equal_images(image)
    train_mask, dev_mask = choose_splits(pairs, spec, content)
    ok_images = image.load_ok()
    ok_texts = text.load_ok()
    train_texts = ok_texts
    if keep is not None:
        train_texts = ok_texts & read_keep_list(as_path(keep, "keep"), pairs)
    # Dev stays whole: results with and without a keep list are compared on the same images.
    selected = [
        select_rows(pairs.image_rows, train_mask & ok_images, train_texts),
        select_rows(pairs.image_rows, dev_mask & ok_images, ok_texts),
    ]
    image_device, text_device = _devices_of_features(
        image,
        text=text,
        selected=selected,
        device=device,
        recipe=recipe,
        reserved_bytes=reserved_bytes,
    )
    image_features = load_rows(image, [rows.images for rows in selected], image_device)
    text_features = load_rows(text, [rows.texts for rows in selected], text_device)
    splits: list[FeaturePairs] = []
    for rows, of_images, of_texts in zip(selected, image_features, text_features, strict=True):
        joined = pairs_of(
            rows,
            image=of_images,
            text=of_texts,
            image_rows=pairs.image_rows,
            content=content,
            caption_ids=pairs.caption_ids,
        )
        split = replace(
            joined,
            image_views=image.views is not None,
            text_views=text.views is not None,
            image_widths=widths_of(image),
            text_widths=widths_of(text),
            device=device,
        )
        splits.append(split)
    train, dev = splits
    require_images(train, dev)
    return train, dev


def _devices_of_features(
    image: FeatureArray,
    text: FeatureArray,
    selected: Sequence[SelectedRows],
    device: torch.device,
    recipe: Recipe | None,
    reserved_bytes: int,
) -> tuple[torch.device, torch.device]:
    """Decide for both sides together whether features stay on the device or on the host."""
    train, dev = selected
    image_side = side_rows(image, len(train.images), len(dev.images))
    text_side = side_rows(text, len(train.texts), len(dev.texts))
    if recipe is not None:
        # Heads that cannot be built are refused where they are built, with the better message.
        with suppress(RecipeError):
            reserved_bytes += fit_bytes(recipe, image_side, text_side)
    budget_bytes = feature_budget_bytes(device, reserved_bytes)
    image_stays, text_stays = choose_resident(image_side.n_bytes, text_side.n_bytes, budget_bytes)
    return device if image_stays else CPU, device if text_stays else CPU


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
