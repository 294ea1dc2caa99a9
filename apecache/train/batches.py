"""Cached features on the device, and batches of them by index."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import RecipeError, nearest
from apecache.store.reader import FeatureArray
from apecache.store.table import PairTable


@dataclass(frozen=True)
class FeaturePairs:
    """Images [n, image_dim] and texts [m, text_dim] in the stored dtype, on one device.

    `first_text` int64 [n + 1]: texts first_text[i] up to first_text[i + 1] belong to image i. Every image has one.
    """

    image: Tensor
    text: Tensor
    first_text: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @property
    def image_of_text(self) -> Tensor:
        """int64 [m]: the row of each text's image."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.image.device), self.first_text.diff())


def load_on(array: FeatureArray, device: torch.device) -> Tensor:
    """A whole array on `device`: read straight into one (pinned, for CUDA) buffer. Raises as FeatureArray.load does."""
    dtype = torch.float16 if array.dtype == np.float16 else torch.float32
    buffer = torch.empty(array.rows, array.dim, dtype=dtype, pin_memory=device.type == "cuda")
    array.load(buffer.numpy())
    return buffer.to(device, non_blocking=True)


def select_pairs(
    image: Tensor,
    text: Tensor,
    image_rows: NDArray[np.int64],
    keep_images: NDArray[np.bool_],
    ok_texts: NDArray[np.bool_],
) -> FeaturePairs:
    """The kept images that have a usable caption, and those captions; order is that of the table."""
    texts = np.flatnonzero(ok_texts & keep_images[image_rows])
    images, owner = np.unique(image_rows[texts], return_inverse=True)
    first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(images)))]).astype(np.int64)
    texts = texts[np.argsort(owner, kind="stable")]
    device = image.device
    return FeaturePairs(
        image.index_select(0, torch.from_numpy(images).to(device)),
        text.index_select(0, torch.from_numpy(texts).to(device)),
        torch.from_numpy(first).to(device),
    )


def batches(pairs: FeaturePairs, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image at most once, with one of its captions drawn at random; the short rest is left out.

    Indices are drawn on the CPU, so that a seed gives the same batches on every device. No two captions of one image
    stand in one batch, hence none is ever the other's negative.
    """
    order = torch.randperm(len(pairs), generator=generator)
    first, last = pairs.first_text[:-1].cpu()[order], pairs.first_text[1:].cpu()[order]
    chosen = first + (torch.rand(len(order), generator=generator) * (last - first)).long()
    order, chosen = order.to(pairs.image.device), chosen.to(pairs.image.device)
    size = min(batch_size, len(pairs))
    for begin in range(0, len(pairs) - size + 1, size):
        rows = slice(begin, begin + size)
        yield pairs.image.index_select(0, order[rows]), pairs.text.index_select(0, chosen[rows])


@dataclass(frozen=True)
class SplitSpec:
    """Which images train and which choose. `dev` None: `dev_images` (at most a tenth) of train's images, by seed."""

    train: str | None = None
    dev: str | None = None
    dev_images: int = 500
    seed: int = 0


def choose_splits(pairs: PairTable, spec: SplitSpec) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks [n_images] of training and dev images; they never overlap.

    Raises:
        RecipeError: no such split, the same one twice, or too few images for a dev split.
    """
    train = pairs.splits == _resolve_split(pairs, spec.train, "train")
    if spec.dev is not None:
        dev = pairs.splits == _resolve_split(pairs, spec.dev, "dev")
        if (train & dev).any():
            raise RecipeError(f"--dev-split {spec.dev} is the training split: what is chosen on must not be trained on")
        return train, dev
    rows = np.flatnonzero(train)
    count = min(spec.dev_images, len(rows) // 10)
    if count < 1:
        raise RecipeError(f"no dev split possible: {len(rows)} training images; give --dev-split or at least 10 images")
    dev = np.zeros_like(train)
    dev[np.random.default_rng(spec.seed).choice(rows, count, replace=False)] = True
    return train & ~dev, dev


def _resolve_split(pairs: PairTable, name: str | None, usual: str) -> str:
    """The name if it is there; without one the usual name, or the only split that there is."""
    counts = pairs.split_counts()
    if name is None and len(counts) == 1:
        return next(iter(counts))
    wanted = usual if name is None else name
    if wanted not in counts:
        found = ", ".join(f"{split or '(none)'} ({count} images)" for split, count in counts.items())
        raise RecipeError(f"no split {wanted!r} in the store; found: {found}{nearest(wanted, counts)}")
    return wanted
