"""Select the images and texts of a split that make pairs, and join their features."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.store.equal import is_shared
from apecache.train.batches import FeaturePairs


class Features(NamedTuple):
    """Hold the features of one side."""

    values: Tensor
    """[n, dim], [n, tokens, dim] or [n, views, dim]."""
    lengths: Tensor | None = None
    """int64 [n], number of valid tokens; None: all tokens are valid, or there are none."""

    def select(self, rows: NDArray[np.int64]) -> "Features":
        """Return the features of these rows."""
        index = torch.from_numpy(rows).to(self.values.device)
        lengths = None if self.lengths is None else self.lengths.index_select(0, index)
        return Features(self.values.index_select(0, index), lengths)


@dataclass(frozen=True, kw_only=True)
class SelectedRows:
    """Hold the rows of the images and texts that make pairs."""

    images: NDArray[np.int64]
    """[n], ascending."""
    texts: NDArray[np.int64]
    """[m]: the texts of one image stand one after another, in the order of `images`."""
    first_text: NDArray[np.int64]
    """[n + 1], as in `FeaturePairs`."""


def select_rows(
    image_rows: NDArray[np.int64],
    keep_images: NDArray[np.bool_],
    ok_texts: NDArray[np.bool_],
) -> SelectedRows:
    """Select the kept images that have a usable caption, and those captions, in table order.

    Args:
        image_rows: int64 [m], row of each caption's image.
        keep_images: bool [n], images to keep.
        ok_texts: bool [m], usable captions.
    """
    texts = np.flatnonzero(ok_texts & keep_images[image_rows])
    images, owner = np.unique(image_rows[texts], return_inverse=True)
    n_texts = np.bincount(owner, minlength=len(images))
    first_text = np.concatenate([[0], np.cumsum(n_texts)]).astype(np.int64)
    # A stable sort groups captions by image and keeps the table's order within each image.
    texts = texts[np.argsort(owner, kind="stable")]
    return SelectedRows(images=images, texts=texts, first_text=first_text)


def pairs_of(
    rows: SelectedRows,
    image: Features,
    text: Features,
    image_rows: NDArray[np.int64],
    content: NDArray[np.int64] | None = None,
    caption_ids: NDArray[np.int64] | None = None,
) -> FeaturePairs:
    """Join the features of selected rows to pairs.

    Args:
        rows: The selected rows.
        image: Features of `rows.images`.
        text: Features of `rows.texts`.
        image_rows: int64, row of each caption's image, for all captions.
        content: int64, as in `FeaturePairs`, for all images.
        caption_ids: int64, as in `FeaturePairs`, for all captions.
    """
    selected_ids = None if caption_ids is None else caption_ids[rows.texts]
    # Ids that no two images share make no positives: without them batches need no groups.
    shared = selected_ids is not None and is_shared(selected_ids, image_rows[rows.texts])
    return FeaturePairs(
        image=image.values,
        text=text.values,
        first_text=torch.from_numpy(rows.first_text),
        image_lengths=image.lengths,
        text_lengths=text.lengths,
        content=None if content is None else torch.from_numpy(content[rows.images]),
        caption_ids=torch.from_numpy(selected_ids) if shared else None,
    )


def select_pairs(
    image: Features,
    text: Features,
    image_rows: NDArray[np.int64],
    keep_images: NDArray[np.bool_],
    ok_texts: NDArray[np.bool_],
    content: NDArray[np.int64] | None = None,
    caption_ids: NDArray[np.int64] | None = None,
) -> FeaturePairs:
    """Select the kept images that have a usable caption, and those captions, in table order.

    Args:
        image: Features of all n images.
        text: Features of all m captions.
        image_rows: int64 [m], row of each caption's image.
        keep_images: bool [n], images to keep.
        ok_texts: bool [m], usable captions.
        content: int64 [n], as in `FeaturePairs`.
        caption_ids: int64 [m], as in `FeaturePairs`.
    """
    rows = select_rows(image_rows, keep_images, ok_texts)
    return pairs_of(
        rows,
        image=image.select(rows.images),
        text=text.select(rows.texts),
        image_rows=image_rows,
        content=content,
        caption_ids=caption_ids,
    )
