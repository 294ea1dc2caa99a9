"""Cached features, on the device where they fit, and batches of them by index."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import RecipeError, nearest
from apecache.evaluate.embeddings import load_lengths
from apecache.heads.head import mask_of
from apecache.losses.contrastive import Groups
from apecache.metrics.relevance import Relevance
from apecache.store.array import FeatureArray
from apecache.store.equal import is_shared
from apecache.store.table import PairTable

RESIDENT_SHARE = 0.6
"""Features that need more than this share of a device's free memory stay on the host and are
streamed."""
BLOCK = 8
"""Batches that are gathered on the host and sent at once when features are streamed."""


class Features(NamedTuple):
    """`values`: [n, dim], [n, tokens, dim] or [n, views, dim]; `lengths`: int64 [n], tokens that
    are there (None: all of them, or no tokens)."""

    values: Tensor
    lengths: Tensor | None = None

    def select(self, rows: NDArray[np.int64]) -> "Features":
        index = torch.from_numpy(rows).to(self.values.device)
        lengths = None if self.lengths is None else self.lengths.index_select(0, index)
        return Features(self.values.index_select(0, index), lengths)


@dataclass(frozen=True, kw_only=True)
class FeaturePairs:
    """Images and texts in the stored dtype: [n, dim], or [n, tokens, dim] with lengths, or [n,
    views, dim]; or for towers, int64 [n], rows of the store's table.

    `first_text` int64 [n + 1]: texts first_text[i] up to first_text[i + 1] belong to image i. Every
    image has one. `content` int64 [n]: equal numbers are images of equal content (None: all
    differ). `image_views`, `text_views`: the second axis holds views, of which a batch takes a
    random one. `device`: where batches go (None: where the images are); features on another device
    are streamed to it. `caption_ids` int64 [m]: equal numbers are captions that are equal word for
    word (None: captions of different images differ). Both kinds of numbers are on the CPU, where
    batches are drawn.
    """

    image: Tensor
    text: Tensor
    first_text: Tensor
    image_lengths: Tensor | None = None
    text_lengths: Tensor | None = None
    content: Tensor | None = None
    image_views: bool = False
    text_views: bool = False
    device: torch.device | None = None
    caption_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def place(self) -> torch.device:
        return self.device or self.image.device

    @property
    def image_of_text(self) -> Tensor:
        """int64 [m]: the row of each text's image."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.first_text.device),
            self.first_text.diff(),
        )

    @cached_property
    def relevance(self) -> Relevance | None:
        """The right answers where captions or images are equal, on the device of the batches."""
        return Relevance.of(self.image_of_text.to(self.place), self.caption_ids, self.content)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n images and k captions of each, those of one image one after another; masks of tokens, where
    there are tokens; `groups`: which image belongs with which text (None: row with row)."""

    image: Tensor
    text: Tensor
    image_mask: Tensor | None = None
    text_mask: Tensor | None = None
    groups: Groups | None = None


def load_on(array: FeatureArray, device: torch.device) -> Features:
    """A whole array, read straight into one (pinned, for CUDA) buffer; on `device` if it fits
    there, else on the host.

    Raises as FeatureArray.load does.
    """
    dtype = torch.float16 if array.dtype == np.float16 else torch.float32
    buffer = torch.empty(
        array.rows,
        *array.row_shape,
        dtype=dtype,
        pin_memory=device.type == "cuda",
    )
    array.load(buffer.numpy())
    values = buffer.to(device, non_blocking=True) if _fits(buffer, device) else buffer
    lengths = load_lengths(array)
    return Features(values, None if lengths is None else lengths.to(values.device))


def _fits(buffer: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return buffer.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def select_pairs(
    image: Features,
    text: Features,
    image_rows: NDArray[np.int64],
    keep_images: NDArray[np.bool_],
    ok_texts: NDArray[np.bool_],
    content: NDArray[np.int64] | None = None,
    caption_ids: NDArray[np.int64] | None = None,
) -> FeaturePairs:
    """The kept images that have a usable caption, and those captions; order is that of the table.
    `content`, `caption_ids`: of all images and captions, as in `FeaturePairs`."""
    texts = np.flatnonzero(ok_texts & keep_images[image_rows])
    images, owner = np.unique(image_rows[texts], return_inverse=True)
    first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(images)))]).astype(
        np.int64
    )
    texts = texts[np.argsort(owner, kind="stable")]
    chosen = image.select(images)
    captions = text.select(texts)
    chosen_ids = None if caption_ids is None else caption_ids[texts]
    shared = chosen_ids is not None and is_shared(chosen_ids, image_rows[texts])
    return FeaturePairs(
        image=chosen.values,
        text=captions.values,
        first_text=torch.from_numpy(first).to(chosen.values.device),
        image_lengths=chosen.lengths,
        text_lengths=captions.lengths,
        content=None if content is None else torch.from_numpy(content[images]),
        caption_ids=torch.from_numpy(chosen_ids) if shared else None,
    )


def require_images(train: FeaturePairs, dev: FeaturePairs) -> None:
    """Raises RecipeError for a split that is too small for a contrastive loss."""
    for what, chosen in (("training", train), ("dev", dev)):
        if len(chosen) < 2:
            raise RecipeError(
                f"only {len(chosen)} {what} images with a caption; a contrastive loss needs "
                "at least 2"
            )


def n_batches(pairs: FeaturePairs, batch_size: int) -> int:
    """Whole batches in an epoch; at least one, of all images."""
    return max(1, len(pairs) // min(batch_size, len(pairs)))


def batches(
    pairs: FeaturePairs,
    batch_size: int,
    generator: torch.Generator,
    captions: int = 1,
    skip: int = 0,
) -> Iterator[Batch]:
    """One epoch: every image at most once, with `captions` different ones of its captions (one that
    has fewer gives them again) drawn at random; the short rest is left out, and so are the first
    `skip` batches.

    Indices are drawn on the CPU, so that a seed gives the same batches on every device. With one
    caption per image and no equal images or captions, nothing in a batch is wrongly another's
    negative, and there are no groups.
    """
    size = min(batch_size, len(pairs))
    order = torch.randperm(len(pairs), generator=generator)
    chosen = _draw_captions(pairs, order=order, captions=captions, generator=generator)
    images = _draw_views(order, features=pairs.image, views=pairs.image_views, generator=generator)
    texts = _draw_views(chosen, features=pairs.text, views=pairs.text_views, generator=generator)
    whole = slice(skip * size, len(pairs) - len(pairs) % size)
    image_parts = _gather(
        pairs.image,
        rows=images[whole],
        size=size,
        device=pairs.place,
        views=pairs.image_views,
    )
    text_parts = _gather(
        pairs.text,
        rows=texts[whole].flatten(),
        size=size * captions,
        device=pairs.place,
        views=pairs.text_views,
    )
    for begin, image, text in zip(
        range(whole.start, whole.stop, size),
        image_parts,
        text_parts,
        strict=True,
    ):
        rows = order[begin : begin + size]
        image_mask = _mask(pairs.image_lengths, rows, image)
        drawn = chosen[begin : begin + size]
        text_mask = _mask(pairs.text_lengths, drawn.flatten(), text)
        yield Batch(
            image=image,
            text=text,
            image_mask=image_mask,
            text_mask=text_mask,
            groups=_groups(pairs, rows, drawn),
        )


def _draw_captions(
    pairs: FeaturePairs,
    order: Tensor,
    captions: int,
    generator: torch.Generator,
) -> Tensor:
    """int64 [n, captions]: rows of texts."""
    first = pairs.first_text[:-1].cpu()[order]
    count = pairs.first_text.diff().cpu()[order]
    if captions == 1:
        return (first + (torch.rand(len(order), generator=generator) * count).long()).unsqueeze(1)
    keys = torch.rand(len(order), int(count.max()), generator=generator)
    keys.masked_fill_(torch.arange(keys.shape[1]) >= count.unsqueeze(1), 2.0)
    places = torch.arange(captions) % count.unsqueeze(1)
    return first.unsqueeze(1) + keys.argsort(1).gather(1, places)


def _draw_views(rows: Tensor, features: Tensor, views: bool, generator: torch.Generator) -> Tensor:
    """Rows in the features with the first two axes made one."""
    if not views:
        return rows
    return rows * features.shape[1] + torch.randint(
        features.shape[1],
        rows.shape,
        generator=generator,
    )


def _gather(
    features: Tensor,
    rows: Tensor,
    size: int,
    device: torch.device,
    views: bool,
) -> Iterator[Tensor]:
    """features[rows] in batches of `size` on `device`. From another device they come in blocks of
    several batches."""
    source = features.flatten(0, 1) if views else features
    if _same_place(source, device):
        for part in rows.to(device).split(size):
            yield source.index_select(0, part)
        return
    for block in rows.split(size * BLOCK):
        staged = torch.empty(
            (len(block), *source.shape[1:]),
            dtype=source.dtype,
            pin_memory=device.type == "cuda",
        )
        torch.index_select(source, 0, block, out=staged)
        yield from staged.to(device, non_blocking=True).split(size)


def _same_place(features: Tensor, device: torch.device) -> bool:
    return features.device == device


def _mask(lengths: Tensor | None, rows: Tensor, features: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    return mask_of(lengths[rows.to(lengths.device)].to(features.device), features)


def _groups(pairs: FeaturePairs, rows: Tensor, drawn: Tensor) -> Groups | None:
    """Groups of images `rows` [n] and their `drawn` captions [n, k], on the device of the batches;
    None where row belongs to row and no other.

    Images of equal content are of one group, and images with equal drawn captions. So are all that
    are connected in this way: groups cannot say that one caption belongs to both of two images and
    another one to the first alone.
    """
    n_captions = drawn.shape[1]
    plain = pairs.content is None and pairs.caption_ids is None
    if plain and n_captions == 1:
        return None
    own = torch.arange(len(rows))
    if pairs.content is not None:
        own = pairs.content[rows].unique(return_inverse=True)[1]
    if pairs.caption_ids is not None:
        own = join_groups(own, pairs.caption_ids[drawn])
    if n_captions == 1 and int(own.max()) + 1 == len(rows):
        return None
    own = own.to(pairs.place)
    return Groups(image=own, text=own.repeat_interleave(n_captions))


def join_groups(groups: Tensor, ids: Tensor) -> Tensor:
    """Join groups that share an id, until none do.

    Args:
        groups: int64 [n], numbers from 0 without gaps. ids: int64 [n, k], any numbers.

    Returns:
        int64 [n], numbers from 0 without gaps, one for each set of connected groups.
    """
    n_groups = int(groups.max()) + 1
    shared = ids.unique(return_inverse=True)[1]
    n_ids = int(shared.max()) + 1
    joined = torch.arange(n_groups)
    while True:
        labels = joined[groups].unsqueeze(1).expand_as(shared)
        of_id = torch.full((n_ids,), n_groups).scatter_reduce_(
            0,
            shared.flatten(),
            labels.flatten(),
            "amin",
        )
        smaller = joined.scatter_reduce(0, groups, of_id[shared].amin(1), "amin")
        smaller = smaller[
            smaller
        ]  # a label is a group too: its own label is smaller yet, so that chains are halved
        if torch.equal(smaller, joined):
            compact: Tensor = torch.unique(joined[groups], return_inverse=True)[1]
            return compact
        joined = smaller


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Which images train and which choose. `dev` None: `dev_images` (at most a tenth) of train's
    images, by seed."""

    train: str | None = None
    dev: str | None = None
    dev_images: int = 500
    seed: int = 0


def choose_splits(
    pairs: PairTable,
    spec: SplitSpec,
    content: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks [n_images] of training and dev images, which never overlap.

    Args:
        pairs: the table of the store.
        spec: the names of the splits, or how many images to draw for dev.
        content: int64 [n_images], equal numbers for images of equal content (None: all differ). A
            drawn dev split takes all copies of an image or none.

    Raises:
        RecipeError: no such split, the same one twice, or too few images for a dev split.
    """
    train = pairs.splits == _resolve_split(pairs, spec.train, "train")
    if spec.dev is not None:
        dev = pairs.splits == _resolve_split(pairs, spec.dev, "dev")
        if (train & dev).any():
            raise RecipeError(
                f"--dev-split {spec.dev} is the training split: what is chosen on must not be "
                "trained on"
            )
        return train, dev
    rows = np.flatnonzero(train)
    count = min(spec.dev_images, len(rows) // 10)
    if count < 1:
        raise RecipeError(
            f"no dev split possible: {len(rows)} training images; give --dev-split or at "
            "least 10 images"
        )
    # One row stands for all copies of an image; where no two are equal, every row for itself.
    numbers = np.arange(len(train)) if content is None else content
    _, first = np.unique(numbers[rows], return_index=True)
    drawn = np.random.default_rng(spec.seed).choice(
        rows[np.sort(first)], min(count, len(first)), replace=False
    )
    dev = train & np.isin(numbers, numbers[drawn])
    return train & ~dev, dev


def _resolve_split(pairs: PairTable, name: str | None, usual: str) -> str:
    """The name if it is there; without one the usual name, or the only split that there is."""
    counts = pairs.split_counts()
    if name is None and len(counts) == 1:
        return next(iter(counts))
    wanted = usual if name is None else name
    if wanted not in counts:
        found = ", ".join(
            f"{split or '(none)'} ({count} images)" for split, count in counts.items()
        )
        raise RecipeError(
            f"no split {wanted!r} in the store; found: {found}{nearest(wanted, counts)}"
        )
    return wanted
