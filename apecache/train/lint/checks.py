"""Check a fit for the traps of published training code: faults that do not stop it from running.

An error stops a fit. A warning is recorded in its ledger. Models are checked on real features: two
steps of the recipe's own optimizer, on a copy of the model and a few images.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.errors import counted
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.train.augment import mixed_groups
from apecache.train.batches import (
    Batch,
    FeaturePairs,
    SplitSpec,
    batches,
    choose_splits,
    n_items,
)
from apecache.train.lint.findings import Finding
from apecache.train.lint.model_checks import PROBE_IMAGES, lint_model
from apecache.train.model import AlignmentModel

LEAST_DEV_IMAGES = 100
"""Dev images below which lint warns.

A recall of 50 % among 100 has a standard error of 5 points, more than recipes differ by.
"""
EQUAL_SHARE = 0.1
"""Share of the negatives that equal captions and images may remove before lint warns."""
BLOCK_ROWS = 8192
"""Rows of features that are converted to float64 at once."""


def lint_fit(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
    train: FeaturePairs,
    model: AlignmentModel,
    optimizer: torch.optim.Optimizer | None,
) -> list[Finding]:
    """Run every check on a fit of heads before it begins.

    Args:
        store: Store of the features.
        arrays: Image and text features.
        recipe: Recipe of the fit.
        splits: Training and dev split.
        report_split: Split that results will be reported on, if the store has it.
        train: Training pairs.
        model: Model before training.
        optimizer: Optimizer of the fit; None: nothing trains.

    Raises:
        RecipeError: The splits do not work.
    """
    findings = [
        *lint_recipe(recipe, len(train), train),
        *lint_splits(store, arrays=arrays, spec=splits, report_split=report_split),
        *lint_positives(train, recipe),
    ]
    if optimizer is not None:
        findings += lint_model(model, optimizer=optimizer, recipe=recipe, train=train)
    return findings


def lint_encoder_data(
    store: FeatureStore,
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
    train: FeaturePairs,
) -> list[Finding]:
    """Check recipe, splits and positives of a fit within towers. See `lint_fit`.

    `train` holds rows of the store's table.
    """
    findings = [*lint_recipe(recipe, len(train), train), *lint_groups_of_captions(train, recipe)]
    images = store.arrays("image")
    texts = store.arrays("text")
    # Any features will do: splits are compared by the content that they were made of.
    if images and texts:
        findings += lint_splits(
            store,
            arrays=(images[0], texts[0]),
            spec=splits,
            report_split=report_split,
        )
    return findings


# --- the recipe -----------------------------------------------------------------------------------


def n_negatives(recipe: Recipe, n_images: int, train: FeaturePairs | None = None) -> int:
    """Count the wrong candidates of each query in a batch.

    Accumulation adds none, and mixing halves them. A recipe that trains nothing has none.

    Args:
        recipe: Recipe of the fit.
        n_images: Training images.
        train: Training pairs. If captions or images among them are equal, the result is the mean
            over one batch, rounded.
    """
    if recipe.schedule.epochs == 0 and recipe.schedule.steps == 0:
        return 0
    n_candidates = n_images if train is None else n_items(train, recipe.schedule.epoch)
    n_candidates = min(recipe.schedule.batch_size, n_candidates)
    if recipe.augmentation.mixup:
        n_candidates //= 2
    max_negatives = n_candidates - 1
    if train is None or (train.content is None and train.caption_ids is None):
        return max_negatives
    generator = torch.Generator().manual_seed(0)
    groups = next(
        batches(
            _rows_alone(train),
            batch_size=recipe.schedule.batch_size,
            generator=generator,
            captions=recipe.loss.captions,
            epoch=recipe.schedule.epoch,
        )
    ).groups
    if groups is None:
        return max_negatives
    group_of_image = groups.image.cpu()
    if recipe.augmentation.mixup:
        group_of_image = mixed_groups(group_of_image)
    # Each image of a group has all images outside the group for negatives.
    n_rows = len(group_of_image)
    _, group_sizes = group_of_image.unique(return_counts=True)
    n_all_negatives = float((group_sizes * (n_rows - group_sizes)).sum())
    return round(n_all_negatives / n_rows)


def _rows_alone(train: FeaturePairs) -> FeaturePairs:
    """Return the same pairs with row numbers instead of features, which are fast to draw."""
    return FeaturePairs(
        image=torch.arange(len(train.image)),
        text=torch.arange(len(train.text)),
        first_text=train.first_text,
        content=train.content,
        caption_ids=train.caption_ids,
    )


def lint_recipe(
    recipe: Recipe,
    n_images: int | None = None,
    train: FeaturePairs | None = None,
) -> Iterator[Finding]:
    """Check what the recipe alone shows: whether batches have as many negatives as they seem to.

    Args:
        recipe: Recipe of the fit.
        n_images: Training images, if known.
        train: Training pairs, if known.
    """
    schedule = recipe.schedule
    if train is not None:
        n_images = n_items(train, schedule.epoch)
    size = schedule.batch_size if n_images is None else min(schedule.batch_size, n_images)
    negatives = n_negatives(recipe, size, train)
    nominal = size * schedule.accumulate
    max_negatives = n_negatives(recipe, size)
    has_equal_pairs = negatives < (1 - EQUAL_SHARE) * max_negatives
    if has_equal_pairs or 0 < max_negatives < nominal - 1:
        reasons: list[str] = []
        if schedule.accumulate > 1:
            reasons.append(f"accumulate {schedule.accumulate} adds none")
        if recipe.augmentation.mixup:
            reasons.append("mixup halves them")
        if has_equal_pairs:
            reasons.append("equal captions and images are none")
        text = (
            f"the nominal batch is {nominal}, but each query has {negatives} negatives "
            f"({', '.join(reasons)})"
        )
        yield Finding(
            check="negatives",
            level="warning",
            message=f"{text}; for more raise schedule.batch_size",
        )


# --- the splits -----------------------------------------------------------------------------------


def lint_splits(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    spec: SplitSpec,
    report_split: str,
) -> Iterator[Finding]:
    """Check that the splits for training, choosing and reporting are separate.

    Args:
        store: Store of the features.
        arrays: Image and text features, whose content is compared.
        spec: Training and dev split.
        report_split: Split that results will be reported on.
    """
    pairs = store.pairs
    train, dev = choose_splits(pairs, spec, equal_images(arrays[0]))
    if (pairs.splits[dev] == report_split).any():
        text = (
            f"the dev split is {report_split!r}, which is reported too: figures of a split on "
            "which an epoch was chosen are too high"
        )
        yield Finding(
            check="selection",
            level="error",
            message=f"{text}; give another --dev-split, or another --report-split",
        )
    elif (pairs.splits[train] == report_split).any():
        text = f"training images are of {report_split!r}, which is to be reported"
        yield Finding(
            check="selection",
            level="error",
            message=f"{text}; give another --train-split, or another --report-split",
        )
    # What a fit leaves out is no reason to trust its dev split.
    measured_texts = dev[pairs.image_rows] & _has_features(pairs, arrays)
    n_dev = len(np.unique(pairs.image_rows[measured_texts]))
    if n_dev < LEAST_DEV_IMAGES:
        # Standard error of a share of one half, in points.
        error = 50 / max(1, n_dev) ** 0.5
        text = (
            f"the dev split has {counted(n_dev, 'image')}: a recall of 50 % is known to "
            f"{error:.0f} points"
        )
        yield Finding(
            check="dev-size",
            level="warning",
            message=f"{text}; choose on at least {LEAST_DEV_IMAGES}",
        )
    yield from _few_captions(pairs, measured_texts)
    yield from _overlaps(store, arrays=arrays, train=train, dev=dev)


def _has_features(
    pairs: PairTable,
    arrays: tuple[FeatureArray, FeatureArray],
) -> NDArray[np.bool_]:
    """Return bool [n_texts]: captions that have features and an image with features."""
    image, text = arrays
    return text.load_ok() & image.load_ok()[pairs.image_rows]


def _few_captions(pairs: PairTable, measured_texts: NDArray[np.bool_]) -> Iterator[Finding]:
    """Check that the captions of the dev split, bool [n_texts], differ enough.

    It needs as many different ones as images, or at least `LEAST_DEV_IMAGES`.
    """
    texts = np.flatnonzero(measured_texts)
    usable = [row for row in texts.tolist() if str(pairs.captions[row]).strip()]
    n_captions = len(np.unique(pairs.caption_ids[usable]))
    n_images = len(np.unique(pairs.image_rows[usable]))
    if n_captions < min(LEAST_DEV_IMAGES, n_images):
        text = (
            f"the dev split has {counted(n_captions, 'different caption')} for "
            f"{counted(n_images, 'image')}: recall "
            "cannot rank well on it"
        )
        remedy = "compare runs with apecache evaluate --task zeroshot, or give captions that differ"
        yield Finding(check="dev-captions", level="warning", message=f"{text}; {remedy}")


def lint_named(splits: SplitSpec, n_dev: int, report_split: str) -> list[Finding]:
    """Check what names and counts of a run show without its data."""
    findings: list[Finding] = []
    if report_split in (splits.dev, splits.train):
        text = f"trained or chosen on {report_split!r}, which is to be reported"
        findings.append(
            Finding(
                check="selection",
                level="error",
                message=f"{text}; fit again with another split",
            )
        )
    if n_dev < LEAST_DEV_IMAGES:
        text = f"the dev split had {counted(n_dev, 'image')}"
        findings.append(
            Finding(
                check="dev-size",
                level="warning",
                message=f"{text}; choose on at least {LEAST_DEV_IMAGES}",
            )
        )
    return findings


def _overlaps(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    train: NDArray[np.bool_],
    dev: NDArray[np.bool_],
) -> Iterator[Finding]:
    """Check that no training image or caption is in another split, by hashes."""
    pairs = store.pairs
    # A list: a drawn dev split and another split may both be called "dev".
    compared: list[tuple[str, NDArray[np.bool_], Literal["error", "warning"]]] = [
        ("dev", dev, "warning")
    ]
    for name in pairs.split_counts():
        mask = (pairs.splits == name) & ~train & ~dev
        if mask.any():
            label = f"the split {name!r}" if name == "dev" else name or "(none)"
            compared.append((label, mask, "error"))
    contents = [np.array(array.content(), object) for array in arrays]
    for name, mask, level in compared:
        images = _in_both(contents[0], train, mask)
        if images:
            verb = "has" if images == 1 else "have"
            text = f"{counted(images, 'image')} of {name} {verb} the content of a training image"
            yield Finding(
                check="overlap",
                level=level,
                message=f"{text}; take one of each out of the table",
            )
        texts = _in_both(contents[1], train[pairs.image_rows], mask[pairs.image_rows])
        # Equal captions of different images are common, so they are never an error.
        if texts:
            yield Finding(
                check="overlap",
                level="warning",
                message=f"{counted(texts, 'caption')} of {name}, word for word, in training too",
            )


def _in_both(
    content: NDArray[np.object_],
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
) -> int:
    """Count the rows of `second` whose content is in `first`. Unknown content is empty."""
    first_digests = set(content[first].tolist()) - {""}
    return sum(digest in first_digests for digest in content[second].tolist())


# --- the batches ----------------------------------------------------------------------------------


def lint_positives(train: FeaturePairs, recipe: Recipe) -> Iterator[Finding]:
    """Check that captions of one image are not each other's negatives.

    They can be in a batch, or because the image is in several rows.
    """
    yield from lint_groups_of_captions(train, recipe)
    count = _rows_of_equal_features(train)
    if count:
        text = (
            f"{count} training images have the features of another one, and the captions of "
            "one are negatives of the other"
        )
        yield Finding(
            check="captions",
            level="warning",
            message=f"{text}; give all captions of an image one key",
        )


def lint_groups_of_captions(train: FeaturePairs, recipe: Recipe) -> Iterator[Finding]:
    """Check that captions of one image are not each other's negatives in a batch."""
    batch = next(
        batches(
            train,
            batch_size=PROBE_IMAGES,
            generator=torch.Generator().manual_seed(0),
            captions=recipe.loss.captions,
            epoch=recipe.schedule.epoch,
        )
    )
    if wrong_negatives(batch):
        text = (
            f"{recipe.loss.captions} captions of each image stand in a batch, and they are each "
            "other's negatives"
        )
        yield Finding(check="captions", level="error", message=f"{text}; give the batch groups")


def wrong_negatives(batch: Batch) -> bool:
    """Check whether some captions of an image, which stand in a row, are not its positives."""
    captions = len(batch.text) // len(batch.image)
    if captions == 1:
        return False
    if batch.groups is None:
        return True
    return not torch.equal(batch.groups.text, batch.groups.image.repeat_interleave(captions))


def _rows_of_equal_features(train: FeaturePairs) -> int:
    """Count the images that have the features of another one, but not its known content.

    Of tokens and views the first one is compared.
    """
    # Rows are compared by one random projection in float64: equal rows have equal projections, and
    # different rows practically never do.
    device = train.image.device
    generator = torch.Generator().manual_seed(0)
    dim = train.image.shape[-1]
    direction = torch.randn(dim, generator=generator, dtype=torch.float64).to(device)
    first = train.image if train.image.ndim == 2 else train.image[:, 0]
    projections = [block.double().nan_to_num() @ direction for block in first.split(BLOCK_ROWS)]
    _, feature_ids = torch.cat(projections).unique(return_inverse=True)
    if train.content is None:
        content_ids = torch.arange(len(train), device=feature_ids.device)
    else:
        content_ids = train.content.to(feature_ids.device)
    n_different = len(torch.stack((feature_ids, content_ids)).unique(dim=1).T)
    return n_different - len(feature_ids.unique())
