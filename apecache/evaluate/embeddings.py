"""Embeddings of a store's images and captions under a trained pair of heads."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import DataError, nearest
from apecache.fingerprint import Modality
from apecache.heads.checkpoint import TrainedHeads, TrainedSide
from apecache.store.reader import FeatureArray, FeatureStore


@dataclass(frozen=True)
class Embeddings:
    """`image` [n, dim] and `text` [m, dim], float32, L2-normalised, in the order of the table.

    `image_rows`, `text_rows`: rows of the store; `image_of_text` int64 [m]: the row in `image` of each caption's image.
    """

    image: Tensor
    text: Tensor
    image_rows: NDArray[np.int64]
    text_rows: NDArray[np.int64]
    image_of_text: Tensor


def embed_store(heads: TrainedHeads, store: FeatureStore, split: str | None = None) -> Embeddings:
    """Every image that has features and a usable caption, with those captions; of one split, or of all.

    Raises:
        MismatchError: the store has no features of the heads' encoders. DataError: no such split, or nothing in it.
        IncompleteError, DamagedError: the store.
    """
    pairs = store.pairs
    arrays = find_features(heads.image, store, "image"), find_features(heads.text, store, "text")
    keep = arrays[0].load_ok() & _split_mask(store, split)
    texts = np.flatnonzero(arrays[1].load_ok() & keep[pairs.image_rows])
    images = np.unique(pairs.image_rows[texts])
    if not len(images):
        raise DataError(f"{store.path}: split {split!r} has no image with a caption")
    owners = torch.from_numpy(np.searchsorted(images, pairs.image_rows[texts]))
    image, text = (
        side.embed(torch.from_numpy(array.load()[rows]), _select(load_lengths(array), rows))
        for side, array, rows in ((heads.image, arrays[0], images), (heads.text, arrays[1], texts))
    )
    return Embeddings(image, text, images, texts, owners.to(image.device))


def load_lengths(array: FeatureArray) -> Tensor | None:
    """int64 [rows]: tokens of each row that are there; None for pooled features, and where all rows have all tokens."""
    ragged = array.load_lengths()
    return None if ragged is None else torch.from_numpy(ragged.astype(np.int64))


def _select(lengths: Tensor | None, rows: NDArray[np.int64]) -> Tensor | None:
    return None if lengths is None else lengths[torch.from_numpy(rows)]


def find_features(side: TrainedSide, store: FeatureStore, modality: Modality) -> FeatureArray:
    """The store's features of the encoder that the head was trained on, whatever they are called: of the images as they
    are, which is what a head serves that was trained on augmented views of them.

    Raises:
        MismatchError: there are only others. DataError: there are none, or augmented views only.
    """
    arrays = store.arrays(modality)
    own = [array for array in arrays if array.record.encoder.digest == side.fingerprint.digest]
    for array in own:
        if array.views is None:
            return array
    if own:
        raise DataError(
            f"{store.path} has augmented views of the {modality}s only ({own[0].name}); measured are {modality}s as "
            "they are: add them with the same apecache extract --add, without --views"
        )
    if not arrays:
        raise DataError(f"{store.path} has no {modality} features; make them with: apecache extract")
    side.require_encoder(arrays[0].record.encoder, f"{store.path}: {modality} features {arrays[0].name}")
    raise AssertionError("unreachable: the digests differ")


def _split_mask(store: FeatureStore, split: str | None) -> NDArray[np.bool_]:
    splits = store.pairs.splits
    if split is None:
        return np.ones(len(splits), dtype=bool)
    counts = store.pairs.split_counts()
    if split not in counts:
        found = ", ".join(f"{name or '(none)'} ({count} images)" for name, count in counts.items())
        raise DataError(f"{store.path} has no split {split!r}; found: {found}{nearest(split, counts)}")
    mask: NDArray[np.bool_] = splits == split
    return mask
