"""Hold cached features, on the device where they fit, and draw batches of them by index."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.device import is_accelerator, send
from apecache.errors import RecipeError, counted, nearest
from apecache.heads.head import mask_of
from apecache.losses.contrastive import Groups
from apecache.metrics.relevance import Relevance
from apecache.recipes.schedule import Epoch
from apecache.store.table import PairTable

BLOCK = 8
"""Number of batches that are gathered on the host and sent at once when features are streamed."""


@dataclass(frozen=True, kw_only=True)
class FeaturePairs:
    """Hold n images and their m texts."""

    image: Tensor
    """[n, dim], [n, tokens, dim] or [n, views, dim] in the stored dtype.

    For towers: int64 [n], rows of the store's table.
    """
    text: Tensor
    """As `image`, for m texts."""
    first_text: Tensor
    """int64 [n + 1], on the CPU: texts first_text[i] up to first_text[i + 1] belong to image i.

    Every image has at least one text.
    """
    image_lengths: Tensor | None = None
    """int64 [n], number of valid tokens; None: all tokens are valid, or there are none."""
    text_lengths: Tensor | None = None
    """int64 [m], as `image_lengths`."""
    content: Tensor | None = None
    """int64 [n], on the CPU: equal numbers for images of equal content; None: all differ."""
    image_views: bool = False
    """Whether the second axis of `image` holds views, of which a batch takes a random one."""
    text_views: bool = False
    """As `image_views`, for `text`."""
    device: torch.device | None = None
    """Device of the batches; None: that of `image`. Features elsewhere are streamed to it."""
    caption_ids: Tensor | None = None
    """int64 [m], on the CPU: equal numbers for captions that are equal word for word.

    None: captions of different images differ.
    """
    image_widths: tuple[int, ...] = ()
    """Widths of the encoders whose features stand side by side in `image`; empty: not known."""
    text_widths: tuple[int, ...] = ()
    """As `image_widths`, for `text`."""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def place(self) -> torch.device:
        """Device of the batches."""
        return self.device or self.image.device

    @property
    def image_of_text(self) -> Tensor:
        """Row of each text's image, int64 [m], on the CPU."""
        return torch.repeat_interleave(torch.arange(len(self)), self.first_text.diff())

    @cached_property
    def relevance(self) -> Relevance | None:
        """Right answers where captions or images are equal, on the device of the batches."""
        owners = self.image_of_text.to(self.place)
        return Relevance.of(owners, self.caption_ids, self.content)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Hold n images and k captions of each."""

    image: Tensor
    """[n, ...], as in `FeaturePairs`, without the axis of views."""
    text: Tensor
    """[n * k, ...]: the captions of one image stand one after another."""
    image_mask: Tensor | None = None
    """bool [n, tokens]: valid tokens; None without tokens or lengths."""
    text_mask: Tensor | None = None
    """bool [n * k, tokens], as `image_mask`."""
    groups: Groups | None = None
    """Which images belong with which texts; None: row with row."""


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """Hold the rows that an epoch reads, on the CPU, in the order of its batches."""

    order: Tensor
    """int64 [n], images of all batches."""
    captions: Tensor
    """int64 [n, k], their captions."""
    images: Tensor
    """int64 [n], rows of the image features; with views, of the features with both first axes
    flattened."""
    texts: Tensor
    """int64 [n, k], as `images`."""


def require_images(train: FeaturePairs, dev: FeaturePairs) -> None:
    """Check that there are wrong answers to learn from.

    Raises:
        RecipeError: A split has fewer than two images, or all training images or captions are
            equal.
    """
    for name, pairs in (("training", train), ("dev", dev)):
        if len(pairs) < 2:
            raise RecipeError(
                f"only {counted(len(pairs), f'{name} image')} with a caption; a contrastive "
                "loss needs at least 2"
            )
    for name, ids in (("captions", train.caption_ids), ("images", train.content)):
        if ids is not None and bool((ids == ids[0]).all()):
            raise RecipeError(
                f"all {len(ids)} training {name} are equal; a contrastive loss needs different ones"
            )


def n_items(pairs: FeaturePairs, epoch: Epoch) -> int:
    """Count the images, or the pairs of an image and a caption, that an epoch goes through."""
    return len(pairs.text) if epoch == "pairs" else len(pairs)


def n_batches(pairs: FeaturePairs, batch_size: int, epoch: Epoch = "images") -> int:
    """Count the whole batches of an epoch. A batch of more items than there are holds them all."""
    count = n_items(pairs, epoch)
    return max(1, count // min(batch_size, count))


def batches(
    pairs: FeaturePairs,
    batch_size: int,
    generator: torch.Generator,
    captions: int = 1,
    skip: int = 0,
    epoch: Epoch = "images",
) -> Iterator[Batch]:
    """Draw the batches of one epoch: every image, or every pair, at most once, in random order.

    Args:
        pairs: Images and texts.
        batch_size: Images (or pairs) in a batch. An incomplete batch at the end is left out.
        generator: CPU generator of the random numbers.
        captions: Captions of each image in a batch, different ones drawn at random. An image with
            fewer captions repeats them. An epoch of pairs has one.
        skip: Batches at the beginning that are left out, for an epoch that is resumed.
        epoch: What the epoch goes through.

    Yields:
        Batches on the device of the pairs. `groups` is None if all positives are row with row.
    """
    size = min(batch_size, n_items(pairs, epoch))
    rows = draw_rows(
        pairs,
        batch_size=batch_size,
        generator=generator,
        captions=captions,
        skip=skip,
        epoch=epoch,
    )
    image_batches = gather(
        pairs.image,
        rows=rows.images,
        size=size,
        device=pairs.place,
        views=pairs.image_views,
    )
    text_batches = gather(
        pairs.text,
        rows=rows.texts.flatten(),
        size=size * captions,
        device=pairs.place,
        views=pairs.text_views,
    )
    image_lengths = gather_lengths(pairs.image_lengths, rows.order, size, pairs.place)
    text_lengths = gather_lengths(
        pairs.text_lengths,
        rows=rows.captions.flatten(),
        size=size * captions,
        device=pairs.place,
    )
    groups_of_batches = groups_of(pairs, rows.order, rows.captions, size)
    for image, text, image_length, text_length, groups in zip(
        image_batches,
        text_batches,
        image_lengths,
        text_lengths,
        groups_of_batches,
        strict=True,
    ):
        yield Batch(
            image=image,
            text=text,
            image_mask=None if image_length is None else mask_of(image_length, image),
            text_mask=None if text_length is None else mask_of(text_length, text),
            groups=groups,
        )


def draw_rows(
    pairs: FeaturePairs,
    batch_size: int,
    generator: torch.Generator,
    captions: int,
    skip: int = 0,
    epoch: Epoch = "images",
) -> EpochRows:
    """Draw the rows of an epoch. See `batches`."""
    count = n_items(pairs, epoch)
    size = min(batch_size, count)
    # All is drawn on the CPU before the first batch: a seed gives the same batches on every device,
    # and with every `skip`.
    order = torch.randperm(count, generator=generator)
    if epoch == "pairs":
        caption_rows = order.unsqueeze(1)
        order = pairs.image_of_text[order]
    else:
        caption_rows = _draw_captions(pairs, order=order, captions=captions, generator=generator)
    images = _draw_views(order, features=pairs.image, views=pairs.image_views, generator=generator)
    texts = _draw_views(
        caption_rows,
        features=pairs.text,
        views=pairs.text_views,
        generator=generator,
    )
    batch_span = slice(skip * size, count - count % size)
    return EpochRows(
        order=order[batch_span],
        captions=caption_rows[batch_span],
        images=images[batch_span],
        texts=texts[batch_span],
    )


def _draw_captions(
    pairs: FeaturePairs,
    order: Tensor,
    captions: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw text rows, int64 [n, captions], for the images in `order`."""
    first = pairs.first_text[:-1][order]
    count = pairs.first_text.diff()[order]
    if captions == 1:
        offset = (torch.rand(len(order), generator=generator) * count).long()
        return (first + offset).unsqueeze(1)
    # Sorting random keys shuffles the captions of each image. Keys of captions that an image does
    # not have are above all others, so they come last.
    keys = torch.rand(len(order), int(count.max()), generator=generator)
    is_missing = torch.arange(keys.shape[1]) >= count.unsqueeze(1)
    keys.masked_fill_(is_missing, 2.0)
    caption_ranks = torch.arange(captions) % count.unsqueeze(1)
    offsets = keys.argsort(1).gather(1, caption_ranks)
    return first.unsqueeze(1) + offsets


def _draw_views(rows: Tensor, features: Tensor, views: bool, generator: torch.Generator) -> Tensor:
    """Draw a view of each row, as rows of the features with the first two axes flattened."""
    if not views:
        return rows
    n_views = features.shape[1]
    drawn_views = torch.randint(n_views, rows.shape, generator=generator)
    return rows * n_views + drawn_views


def gather(
    features: Tensor,
    rows: Tensor,
    size: int,
    device: torch.device,
    views: bool,
) -> Iterator[Tensor]:
    """Yield features[rows] in batches of `size` on `device`."""
    source = features.flatten(0, 1) if views else features
    if _same_place(source, device):
        for batch_rows in send(rows, device).split(size):
            yield source.index_select(0, batch_rows)
        return
    # One copy for several batches: small copies to a GPU are slow. torch keeps pinned memory and
    # gives it out again once its copy is over, so that blocks share two or three buffers.
    for block in rows.split(size * BLOCK):
        staged = torch.empty(
            (len(block), *source.shape[1:]),
            dtype=source.dtype,
            pin_memory=is_accelerator(device),
        )
        torch.index_select(source, 0, block, out=staged)
        yield from staged.to(device, non_blocking=True).split(size)


def _same_place(features: Tensor, device: torch.device) -> bool:
    return features.device == device


def gather_lengths(
    lengths: Tensor | None,
    rows: Tensor,
    size: int,
    device: torch.device,
) -> Iterator[Tensor | None]:
    """Yield the numbers of valid tokens, int64 [size], of each batch; None without lengths."""
    if lengths is None:
        return repeat(None, -(-len(rows) // size))
    return gather(lengths, rows=rows, size=size, device=device, views=False)


def groups_of(
    pairs: FeaturePairs,
    order: Tensor,
    caption_rows: Tensor,
    size: int,
) -> Iterator[Groups | None]:
    """Yield the groups of each batch, on the device of the batches.

    Args:
        pairs: Images and texts.
        order: int64 [n], images of all batches.
        caption_rows: int64 [n, k], their captions.
        size: Images in a batch.
    """
    n_captions = caption_rows.shape[1]
    all_differ = pairs.content is None and pairs.caption_ids is None
    # Counted once an epoch: in one of pairs an image can stand in a batch several times.
    repeats = bool((torch.bincount(order) > 1).any())
    if n_captions == 1 and all_differ and not repeats:
        yield from repeat(None, -(-len(order) // size))
        return
    # One copy for several batches, and from pinned memory: a device is never waited for.
    blocks = zip(order.split(size * BLOCK), caption_rows.split(size * BLOCK), strict=True)
    for block_order, block_captions in blocks:
        batch_rows = zip(block_order.split(size), block_captions.split(size), strict=True)
        numbers = [_group_numbers(pairs, rows, captions) for rows, captions in batch_rows]
        grouped = [batch_numbers for batch_numbers in numbers if batch_numbers is not None]
        on_device: Iterator[tuple[Tensor, Tensor]] = iter(())
        if grouped:
            images = send(torch.stack(grouped), pairs.place)
            texts = images.unsqueeze(2).expand(-1, -1, n_captions).flatten(1)
            on_device = zip(images.unbind(), texts.unbind(), strict=True)
        for batch_numbers in numbers:
            if batch_numbers is None:
                yield None
                continue
            image, text = next(on_device)
            group_sizes = np.bincount(batch_numbers.numpy())
            # Each image of a group with all captions of the group.
            n_pairs = n_captions * int(np.square(group_sizes).sum())
            yield Groups(image=image, text=text, n_pairs=n_pairs)


def _group_numbers(pairs: FeaturePairs, rows: Tensor, caption_rows: Tensor) -> Tensor | None:
    """Group the images of a batch with their captions.

    Images of equal content are in one group, and images with equal captions. So are all images
    that are connected in this way: groups cannot express that one caption belongs to both of two
    images and another caption to the first alone.

    Args:
        pairs: Images and texts.
        rows: int64 [n], images of the batch.
        caption_rows: int64 [n, k], their captions.

    Returns:
        int64 [n], on the CPU: the group of each image; None if row belongs to row and to no other.
    """
    n_captions = caption_rows.shape[1]
    image_groups: Tensor = rows.unique(return_inverse=True)[1]
    if pairs.content is not None:
        image_groups = pairs.content[rows].unique(return_inverse=True)[1]
    if pairs.caption_ids is not None:
        image_groups = join_groups(image_groups, pairs.caption_ids[caption_rows])
    # As many groups as images: no two images of this batch are equal.
    if n_captions == 1 and int(image_groups.max()) + 1 == len(rows):
        return None
    return image_groups


def join_groups(groups: Tensor, ids: Tensor) -> Tensor:
    """Join groups that share an id, until none do.

    Args:
        groups: int64 [n], numbers from 0 without gaps.
        ids: int64 [n, k], any numbers.

    Returns:
        int64 [n], numbers from 0 without gaps, one for each set of connected groups.
    """
    n_groups = int(groups.max()) + 1
    shared = ids.unique(return_inverse=True)[1]
    n_ids = int(shared.max()) + 1
    joined = torch.arange(n_groups)
    while True:
        labels = joined[groups].unsqueeze(1).expand_as(shared)
        # The smallest label of each id, then the smallest of each group over its ids.
        id_labels = torch.full((n_ids,), n_groups).scatter_reduce_(
            0,
            shared.flatten(),
            labels.flatten(),
            "amin",
        )
        smaller = joined.scatter_reduce(0, groups, id_labels[shared].amin(1), "amin")
        # A label is itself a group with a label: following it halves the length of chains.
        smaller = smaller[smaller]
        if torch.equal(smaller, joined):
            compact: Tensor = torch.unique(joined[groups], return_inverse=True)[1]
            return compact
        joined = smaller


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Name the split that trains, and the dev split that epochs and settings are chosen on."""

    train: str | None = None
    """Training split; None: `train`, or the only split of the store."""
    dev: str | None = None
    """Dev split; None: images that are drawn from the training split."""
    dev_images: int = 500
    """Number of drawn dev images, at most a tenth of the training split."""
    seed: int = 0
    """Seed of the drawn dev images."""


def choose_splits(
    pairs: PairTable,
    spec: SplitSpec,
    content: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the masks, bool [n_images], of training and dev images. They never overlap.

    Args:
        pairs: The table of the store.
        spec: The names of the splits, or how many images to draw for dev.
        content: int64 [n_images], equal numbers for images of equal content (None: all differ). A
            drawn dev split takes all copies of an image or none.

    Raises:
        RecipeError: A split does not exist, both are the same, or there are too few images for a
            dev split.
    """
    train = pairs.splits == _resolve_split(pairs, spec.train, "train")
    if spec.dev is not None:
        dev = pairs.splits == _resolve_split(pairs, spec.dev, "dev")
        if (train & dev).any():
            raise RecipeError(
                f"--dev-split {spec.dev} is the training split; choose the epoch on another split"
            )
        return train, dev
    rows = np.flatnonzero(train)
    count = min(spec.dev_images, len(rows) // 10)
    if count < 1:
        raise RecipeError(
            f"no dev split possible: {counted(len(rows), 'training image')}; give --dev-split "
            "or at "
            "least 10 images"
        )
    # One row stands for all copies of an image; where no two are equal, every row for itself.
    numbers = np.arange(len(train)) if content is None else content
    _, first, n_copies = np.unique(numbers[rows], return_index=True, return_counts=True)
    order = np.argsort(first)
    generator = np.random.default_rng(spec.seed)
    drawn_positions = generator.choice(len(first), min(count, len(first)), replace=False)
    # Copies come with their image: stop before there are more dev images than asked for.
    n_taken = max(1, int((n_copies[order][drawn_positions].cumsum() <= count).sum()))
    dev_rows = rows[first[order][drawn_positions[:n_taken]]]
    dev = train & np.isin(numbers, numbers[dev_rows])
    return train & ~dev, dev


def _resolve_split(pairs: PairTable, name: str | None, usual: str) -> str:
    """Return the name of a split of the store: `name`, else the only split, else `usual`."""
    images_per_split = pairs.split_counts()
    if name is None and len(images_per_split) == 1:
        return next(iter(images_per_split))
    split_name = usual if name is None else name
    if split_name not in images_per_split:
        available = ", ".join(
            f"{split or '(none)'} ({counted(count, 'image')})"
            for split, count in images_per_split.items()
        )
        hint = nearest(split_name, images_per_split)
        remedy = "; make splits with: apecache split STORE --fraction train=.9,val=.1"
        if any(images_per_split):
            remedy = hint
        raise RecipeError(f"no split {split_name!r} in the store; found: {available}{remedy}")
    return split_name
