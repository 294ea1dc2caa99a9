"""Give the features of a store as a torch Dataset of pairs, for training code of one's own."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from apecache.arguments import require_type
from apecache.errors import DataError
from apecache.evaluate.embeddings import split_mask
from apecache.store.reader import FeatureStore
from apecache.train.paired_rows import select_rows


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """Hold the features of a split's captions, each with those of its image.

    Item i is `(image[image_of_text[i]], text[i])`: an image with five captions is in five items.
    Images and captions without features are left out. Features are not normalized.

    Args:
        store: A complete store.
        split: Only this one; None: all.
        image_features: Name of the image features, if the store has several.
        text_features: Name of the text features, if the store has several.
        dtype: Type of the features.

    Attributes:
        image: [n_images, …], features of the images that have a caption, in table order. Before
            the dimension there may be tokens (0 where an image has fewer) or views.
        text: [n_texts, …], features of the captions, image by image.
        image_of_text: int64 [n_texts], position of each caption's image in `image`.
        keys: Keys of the images, [n_images].
        captions: Captions, [n_texts].

    Raises:
        StoreError: There are no such features, or several to choose from.
        DataError: No such split, or nothing in it.
        IncompleteError, DamagedError: The store is incomplete or damaged.
    """

    def __init__(
        self,
        store: FeatureStore,
        split: str | None = None,
        *,
        image_features: str | None = None,
        text_features: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require_type(store, FeatureStore, "store")
        image = store.array("image", image_features)
        text = store.array("text", text_features)
        pairs = store.pairs
        rows = select_rows(
            pairs.image_rows,
            keep_images=split_mask(store, split) & image.load_ok(),
            ok_texts=text.load_ok(),
        )
        if not len(rows.texts):
            raise DataError(f"{store.path}: split {split!r} has no image with a caption")
        self.image = image.tensor(dtype)[torch.from_numpy(rows.images)]
        self.text = text.tensor(dtype)[torch.from_numpy(rows.texts)]
        n_captions = np.diff(rows.first_text)
        positions = np.repeat(np.arange(len(rows.images)), n_captions)
        self.image_of_text = torch.from_numpy(positions)
        self.keys: list[str] = pairs.keys[rows.images].tolist()
        self.captions: list[str] = pairs.captions[rows.texts].tolist()

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.text)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features of a caption's image, and of the caption."""
        return self.image[self.image_of_text[index]], self.text[index]
