"""Load the pairs of a split together with their rows in the store's table."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.joined import widths_of
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.paired_rows import SelectedRows, pairs_of, select_rows
from apecache.train.resident import load_rows


@dataclass(frozen=True, kw_only=True)
class SplitPairs:
    """Hold pairs and where they stand in the store's table."""

    pairs: FeaturePairs
    rows: SelectedRows


def load_pairs(
    store: FeatureStore,
    image: FeatureArray,
    text: FeatureArray,
    images: NDArray[np.bool_],
    device: torch.device,
) -> SplitPairs:
    """Load the usable pairs of some images.

    Args:
        store: Store of the features.
        image: Image features.
        text: Text features.
        images: bool [n_images], the images to load.
        device: Where the features stay.

    Raises:
        IncompleteError, DamagedError: The store is incomplete or damaged.
    """
    table = store.pairs
    # Only pairs of which both sides could be encoded.
    rows = select_rows(table.image_rows, images & image.load_ok(), text.load_ok())
    joined = pairs_of(
        rows,
        image=load_rows(image, [rows.images], device)[0],
        text=load_rows(text, [rows.texts], device)[0],
        image_rows=table.image_rows,
        content=equal_images(image),
        caption_ids=table.caption_ids,
    )
    pairs = replace(
        joined,
        image_views=image.views is not None,
        text_views=text.views is not None,
        image_widths=widths_of(image),
        text_widths=widths_of(text),
        device=device,
    )
    return SplitPairs(pairs=pairs, rows=rows)
