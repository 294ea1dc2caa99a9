"""Fit heads in memory on a part of a store's pairs."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.heads.head import embed
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import run_training
from apecache.train.model import AlignmentModel


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Hold heads that were fitted in memory."""

    model: AlignmentModel
    """Heads with the best weights, in evaluation mode."""
    best_epoch: int
    """Epoch with the best recall on dev."""
    seconds: float
    """Time of the fit, with evaluation."""


def select_images(
    pairs: FeaturePairs,
    images: NDArray[np.int64],
    max_captions: int | None = None,
) -> FeaturePairs:
    """Return some images with their texts.

    Args:
        pairs: Images and texts.
        images: Positions of the images, each at most once.
        max_captions: Captions of each image to take, the first ones; None: all.
    """
    index = torch.from_numpy(np.asarray(images, np.int64))
    first = pairs.first_text[:-1][index]
    n_captions = pairs.first_text.diff()[index]
    if max_captions is not None:
        n_captions = n_captions.clamp_max(max_captions)
    ends = n_captions.cumsum(0)
    begins = torch.cat((torch.zeros(1, dtype=torch.long), ends))
    # Text j of the selection: the first text of its image, plus its number within the image.
    offsets = torch.arange(int(ends[-1])) - torch.repeat_interleave(begins[:-1], n_captions)
    texts = torch.repeat_interleave(first, n_captions) + offsets
    return replace(
        pairs,
        image=_take(pairs.image, index),
        text=_take(pairs.text, texts),
        first_text=begins,
        image_lengths=_take_lengths(pairs.image_lengths, index),
        text_lengths=_take_lengths(pairs.text_lengths, texts),
        content=None if pairs.content is None else pairs.content[index],
        caption_ids=None if pairs.caption_ids is None else pairs.caption_ids[texts],
        device=pairs.place,
    )


def _take(values: Tensor, rows: Tensor) -> Tensor:
    return values.index_select(0, rows.to(values.device))


def _take_lengths(lengths: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if lengths is None else _take(lengths, rows)


def fit_in_memory(
    recipe: Recipe,
    train: FeaturePairs,
    dev: FeaturePairs,
    seed: int = 0,
) -> MemoryFit:
    """Fit a recipe's heads without a run folder.

    Args:
        recipe: Recipe that trains heads alone.
        train: Training pairs.
        dev: Pairs that choose the epoch, or the settings of a closed form.
        seed: Seed of weights, batches and dropout.

    Raises:
        RecipeError, DataError: As `fit_head` does.
    """
    begin = time.perf_counter()
    model, _ = initial_model(recipe, train=train, dev=dev, seed=seed)
    training = HeadFit(model, recipe, seed)
    # As in fit_head, so that the same fit gives the same weights.
    with seeded(seed + 1, train.place):
        run_training(
            training,
            train=train,
            dev=dev,
            plan=StepCount.of(recipe, train),
            log=lambda _: None,
            save=lambda _: None,
        )
    # The model of a closed form has no weights to choose among.
    if training.best.weights:
        model.load_state_dict(training.best.weights)
    return MemoryFit(
        model=model.eval().requires_grad_(False),
        best_epoch=training.best.epoch,
        seconds=time.perf_counter() - begin,
    )


def embed_pairs(model: AlignmentModel, pairs: FeaturePairs) -> tuple[Tensor, Tensor]:
    """Embed images and texts, float32 [n, dim] and [m, dim], L2-normalized."""
    image = embed(model.image, pairs.image, pairs.image_lengths)
    text = embed(model.text, pairs.text, pairs.text_lengths)
    return image, text
