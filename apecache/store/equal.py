"""Find captions that are equal word for word, and images of equal content.

Captions are compared after Unicode normalization (NFC), case folding and whitespace folding. Images
are compared by the hash of their files.
"""

import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.store.array import FeatureArray


def fold_caption(caption: str) -> str:
    """Remove differences that do not count: composition of characters, case, and whitespace."""
    if caption.isascii():
        return " ".join(caption.lower().split())
    composed = unicodedata.normalize("NFC", caption)
    # Case folding can decompose characters, so the result is composed again.
    folded = unicodedata.normalize("NFC", composed.casefold())
    return " ".join(folded.split())


def equal_captions(captions: NDArray[Any]) -> NDArray[np.int64]:
    """Number the captions so that equal ones have equal numbers.

    Hashes of 8 bytes are compared first. Only captions whose hashes are equal are held in memory in
    their folded form.

    Returns:
        int64 [n_texts]: the row of the first caption that equals each one.
    """
    caption_hashes = (hash(fold_caption(str(caption))) for caption in captions)
    hashes = np.fromiter(caption_hashes, np.int64, len(captions))
    _, first, inverse, n_equal = np.unique(
        hashes,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    numbers = first[inverse].astype(np.int64)
    first_rows: dict[str, int] = {}
    for row in np.flatnonzero(n_equal[inverse] > 1).tolist():
        numbers[row] = first_rows.setdefault(fold_caption(str(captions[row])), row)
    return numbers


def equal_images(array: FeatureArray) -> NDArray[np.int64] | None:
    """Number the images so that those of equal content have equal numbers.

    Returns:
        int64 [rows]: the row of the first image with the same content; None where all differ.
    """
    hashes = array.content()
    first_rows: dict[str, int] = {}
    numbers = []
    for row, digest in enumerate(hashes):
        # An image that could not be read has no hash, and equals no other.
        numbers.append(first_rows.setdefault(digest, row) if digest else row)
    n_readable = sum(map(bool, hashes))
    return None if len(first_rows) == n_readable else np.array(numbers, np.int64)


def is_shared(caption_ids: NDArray[np.int64], image_rows: NDArray[np.int64]) -> bool:
    """Return whether captions of two different images are equal.

    Args:
        caption_ids: int64 [n_texts], equal for equal captions.
        image_rows: int64 [n_texts], the row of each caption's image.
    """
    # Sorted by caption, then by image: equal captions are neighbors.
    order = np.lexsort((image_rows, caption_ids))
    same_caption = np.diff(caption_ids[order]) == 0
    other_image = np.diff(image_rows[order]) != 0
    return bool((same_caption & other_image).any())
