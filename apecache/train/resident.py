"""Load the rows that a fit uses, onto the device where they fit beside all else that the fit needs.

Rows are selected while they are read, so that no array is in memory twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apecache.device import free_memory_bytes, is_accelerator, release_cached_memory
from apecache.evaluate.embeddings import load_lengths
from apecache.heads.head import Head, HeadSpec
from apecache.losses.registry import TILED_FROM
from apecache.recipes.recipe import Recipe, build_meta_heads
from apecache.store.array import FeatureArray
from apecache.train.batches import BLOCK
from apecache.train.paired_rows import Features

USED_SHARE = 0.9
"""Fraction of the free device memory to plan with; the rest allows for fragmentation."""
STAGING_BYTES = 2**25
"""Bytes of the pinned buffer through which rows are copied to a device."""
VALUES_PER_WEIGHT = 7
"""Values held for each weight: parameter, gradient, Adam's two moments, EMA, best checkpoint, and
the copy that is swapped out while the EMA is evaluated."""
PASSES = 3
"""Numbers kept for each input and output of a layer: forward, backward, and intermediate ones."""
MOMENT_COPIES = 21
"""Matrices of (image dim + text dim) squared that a closed form holds at most: moments, their
decompositions and the candidates of ridge, rank and power. A generous estimate."""
STATISTICS_ROWS = 4096
"""Rows whose statistics or moments are computed at once, in float64."""
EVALUATED_ROWS = 8192
"""Rows that are embedded at once for an evaluation."""
FLOAT_BYTES = 4
DOUBLE_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SideRows:
    """Hold the row shape, row size and row counts of one side's features."""

    row_shape: tuple[int, ...]
    """(dim,), (tokens, dim) or (views, dim)."""
    row_bytes: int
    """Bytes of a row in memory."""
    n_train: int
    n_dev: int

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all rows."""
        return self.row_bytes * (self.n_train + self.n_dev)

    @property
    def n_vectors(self) -> int:
        """Return the number of vectors in a row: its tokens or views, or 1."""
        return int(np.prod(self.row_shape[:-1], dtype=np.int64))


def choose_resident(
    image_bytes: int,
    text_bytes: int,
    budget_bytes: int | None,
) -> tuple[bool, bool]:
    """Decide which arrays stay on the device: both, else the larger one that fits, else none.

    Args:
        image_bytes: Bytes of the image features.
        text_bytes: Bytes of the text features.
        budget_bytes: Memory of the device for both; None: the device is the host.
    """
    if budget_bytes is None or image_bytes + text_bytes <= budget_bytes:
        return True, True
    image_fits = image_bytes <= budget_bytes
    text_fits = text_bytes <= budget_bytes
    if image_fits and (image_bytes >= text_bytes or not text_fits):
        return True, False
    return False, text_fits


def feature_budget_bytes(device: torch.device, reserved_bytes: int) -> int | None:
    """Return the memory that a device has for features; None where the device is the host.

    Args:
        device: Device of the fit.
        reserved_bytes: What all else needs.
    """
    # What torch keeps for later counts as used, but is free.
    release_cached_memory(device)
    free_bytes = free_memory_bytes(device)
    return None if free_bytes is None else max(0, int(USED_SHARE * free_bytes) - reserved_bytes)


def fit_bytes(recipe: Recipe, image: SideRows, text: SideRows) -> int:
    """Estimate what a fit needs beside resident features, at its fullest moment.

    Weights and their states are there from the first step to the last. Statistics, steps and
    evaluations take turns, so that the largest of them counts.

    Raises:
        RecipeError: The heads do not suit these widths.
    """
    heads = build_meta_heads(recipe, image.row_shape[-1], text.row_shape[-1])
    sides = ((heads[0], recipe.image, image), (heads[1], recipe.text, text))
    n_weights = sum(parameter.numel() for head in heads for parameter in head.parameters())
    batch = min(recipe.schedule.batch_size, image.n_train)
    n_captions = recipe.loss.captions
    n_logits = min(batch * batch * n_captions, TILED_FROM)
    step_bytes = PASSES * FLOAT_BYTES * n_logits
    statistics_bytes = 0
    evaluation_bytes = 0
    for (head, spec, side), n_rows in zip(sides, (batch, batch * n_captions), strict=True):
        # A streamed side has one block of `BLOCK` batches in use while the next one is read.
        step_bytes += 2 * BLOCK * n_rows * side.row_bytes
        step_bytes += n_rows * _activation_bytes(head, spec, side, PASSES)
        n_numbers = side.n_vectors * side.row_shape[-1]
        n_statistics_rows = min(STATISTICS_ROWS * n_captions, side.n_train)
        statistics_bytes += PASSES * DOUBLE_BYTES * n_numbers * n_statistics_rows
        evaluated_rows = min(EVALUATED_ROWS, side.n_dev)
        evaluation_bytes += evaluated_rows * _activation_bytes(head, spec, side, 1)
    closed_form_bytes = _closed_form_bytes(recipe, image, text)
    phase_bytes = max(step_bytes, statistics_bytes, evaluation_bytes, closed_form_bytes)
    return VALUES_PER_WEIGHT * FLOAT_BYTES * n_weights + phase_bytes


def _activation_bytes(head: Head, spec: HeadSpec, side: SideRows, passes: int) -> int:
    """Estimate what one row takes on its way through a head, in bytes."""
    return passes * FLOAT_BYTES * activation_numbers(head, spec, side.row_shape)


def activation_numbers(head: Head, spec: HeadSpec, row_shape: tuple[int, ...]) -> int:
    """Estimate the numbers of one row in a head: features, inputs and outputs of all layers.

    Args:
        head: The head.
        spec: Its description.
        row_shape: (dim,), (tokens, dim) or (views, dim).
    """
    n_vectors = math.prod(row_shape[:-1])
    # The features as they were read, and standardized.
    width = 2 * row_shape[-1] + layer_widths(head)
    n_scores = spec.n_heads * n_vectors**2 if spec.cut == "tokens" else 0
    return n_vectors * width + n_scores


def layer_widths(head: nn.Module) -> int:
    """Add up the widths of the inputs and outputs of all layers."""
    # Anchors are a matrix too, without a layer around it.
    return sum(sum(matrix.shape) for matrix in head.parameters() if matrix.ndim == 2)


def _closed_form_bytes(recipe: Recipe, image: SideRows, text: SideRows) -> int:
    """Estimate what a closed form needs at once: moments of both sides, or a dictionary."""
    image_dim = image.row_shape[-1]
    text_dim = text.row_shape[-1]
    match recipe.init:
        case "random" | "pretrained":
            return 0
        case "asif":
            # Entries of both sides, their normalized features, and the captions of each image.
            n_numbers = image.n_train * (image_dim + text_dim) + text.n_train * text_dim
            return PASSES * FLOAT_BYTES * n_numbers
        case _:
            return MOMENT_COPIES * DOUBLE_BYTES * (image_dim + text_dim) ** 2


def load_rows(
    array: FeatureArray,
    rows_of_splits: Sequence[NDArray[np.int64]],
    device: torch.device,
) -> list[Features]:
    """Read the rows of each split, in the order given, into one tensor of each split.

    Args:
        array: Features of a store.
        rows_of_splits: int64 [n] for each split: rows of the array, each at most once in a split.
        device: Where the rows stay.

    Raises:
        IncompleteError, DamagedError: As `FeatureArray.load` does.
    """
    destinations = [
        torch.empty(len(rows), *array.row_shape, dtype=_memory_dtype(array), device=device)
        for rows in rows_of_splits
    ]
    positions_of_splits = [_positions(rows, array.rows) for rows in rows_of_splits]
    staging = _staging_buffer(array, device)
    for array_rows, shard in array.load_shards():
        shard_rows = torch.from_numpy(shard)
        for destination, positions_of_rows in zip(destinations, positions_of_splits, strict=True):
            positions = positions_of_rows[array_rows]
            source_rows = np.flatnonzero(positions >= 0)
            _put_rows(
                destination,
                positions=positions[source_rows],
                source=shard_rows,
                source_rows=source_rows,
                staging=staging,
            )
    lengths = load_lengths(array)
    loaded: list[Features] = []
    for destination, rows in zip(destinations, rows_of_splits, strict=True):
        split_lengths = None
        if lengths is not None:
            split_lengths = lengths[torch.from_numpy(rows)].to(device)
        loaded.append(Features(destination, split_lengths))
    return loaded


def _positions(rows: NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    """Return where each row of an array stands among `rows`; -1 where it does not."""
    positions = np.full(n_rows, -1, np.int64)
    positions[rows] = np.arange(len(rows))
    return positions


def side_rows(array: FeatureArray, n_train: int, n_dev: int) -> SideRows:
    """Count what a fit reads of an array."""
    n_numbers = int(np.prod(array.row_shape, dtype=np.int64))
    return SideRows(
        row_shape=array.row_shape,
        row_bytes=n_numbers * array.dtype.itemsize,
        n_train=n_train,
        n_dev=n_dev,
    )


def _memory_dtype(array: FeatureArray) -> torch.dtype:
    return torch.float16 if array.dtype == np.float16 else torch.float32


def _staging_buffer(array: FeatureArray, device: torch.device) -> Tensor | None:
    """Return a pinned buffer for some rows, [n, *row_shape]; None where the device is the host."""
    if not is_accelerator(device):
        return None
    row_bytes = side_rows(array, 0, 0).row_bytes
    n_rows = max(1, min(array.rows, STAGING_BYTES // row_bytes))
    return torch.empty(n_rows, *array.row_shape, dtype=_memory_dtype(array), pin_memory=True)


def _put_rows(
    destination: Tensor,
    positions: NDArray[np.int64],
    source: Tensor,
    source_rows: NDArray[np.int64],
    staging: Tensor | None,
) -> None:
    """Copy rows of a shard to their positions, by way of the staging buffer if there is one."""
    block_rows = len(source) if staging is None else len(staging)
    for begin in range(0, len(positions), max(1, block_rows)):
        block = torch.from_numpy(positions[begin : begin + block_rows])
        selected = torch.from_numpy(source_rows[begin : begin + block_rows])
        # Rows of a shard mostly stand one after another: those need no index on the device.
        first = int(block[0])
        is_range = bool((block == torch.arange(first, first + len(block))).all())
        if staging is None:
            rows = source.index_select(0, selected)
        else:
            rows = torch.index_select(source, 0, selected, out=staging[: len(block)])
        # Copies are synchronous, because the staging buffer is filled again at once.
        if is_range:
            destination[first : first + len(block)].copy_(rows)
        else:
            destination.index_copy_(0, block.to(destination.device), rows.to(destination.device))
