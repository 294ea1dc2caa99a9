"""Find images whose features are nearly equal."""

import numpy as np
from numpy.typing import NDArray

from apecache.errors import DataError, OptionError
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore

BLOCK_ROWS = 1024
"""Images that are compared with all others at a time."""


def near_images(
    store: FeatureStore,
    threshold: float,
    features: str | None = None,
) -> list[tuple[int, int]]:
    """Return pairs of images whose cosine is at least a threshold.

    All images are compared with one another, so the time grows with the square of their number.

    Args:
        store: A store with complete features of its images.
        threshold: Least cosine of the features after their mean is taken away, as in
            `apecache curate`.
        features: Name of the image features; None: the first pooled ones.

    Returns:
        (row, row) pairs of the table, the lower row first. Images without features are in none.

    Raises:
        OptionError: The threshold is not above 0 and at most 1.
        DataError: There are no pooled features of images.
        IncompleteError, DamagedError: As `FeatureArray.load` does.
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"near-duplicates {threshold:g}: expected a cosine above 0, at most 1")
    array = _pooled_array(store, features)
    rows = np.flatnonzero(array.load_ok())
    vectors = centered(array.load()[rows].astype(np.float32))
    pairs: list[tuple[int, int]] = []
    for begin in range(0, len(rows), BLOCK_ROWS):
        block = vectors[begin : begin + BLOCK_ROWS]
        # Each pair once: a block with the images from its own first on.
        cosines = block @ vectors[begin:].T
        firsts, seconds = np.nonzero(cosines >= threshold)
        is_pair = firsts < seconds
        first_rows = rows[begin + firsts[is_pair]].tolist()
        second_rows = rows[begin + seconds[is_pair]].tolist()
        pairs += zip(first_rows, second_rows, strict=True)
    return pairs


def _pooled_array(store: FeatureStore, name: str | None) -> FeatureArray:
    arrays = store.arrays("image") if name is None else [store.array("image", name)]
    for array in arrays:
        if array.tokens is None and array.views is None:
            return array
    found = ", ".join(array.name for array in arrays) or "none"
    raise DataError(
        f"{store.path}: near duplicates need pooled features of images; found: {found}; make them "
        "with: apecache extract --add"
    )


def centered(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors [n, dim] less their mean, of length 1; a vector at the mean becomes 0."""
    if not len(vectors):
        return vectors
    shifted = vectors - vectors.mean(0)
    lengths = np.linalg.norm(shifted, axis=1, keepdims=True)
    unit: NDArray[np.float32] = shifted / np.maximum(lengths, 1e-12)
    return unit
