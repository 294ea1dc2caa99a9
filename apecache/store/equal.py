"""Which captions are equal word for word, and which images have equal content.

Captions are compared after Unicode normalization (NFC), case folding and whitespace folding. Images
are compared by the hash of their files.
"""

import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.store.array import FeatureArray


def fold_caption(caption: str) -> str:
    """Fold away what does not count as a difference: composition of characters, case, and amounts
    of whitespace."""
    if caption.isascii():
        return " ".join(caption.lower().split())
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", caption).casefold())
    return " ".join(folded.split())


def equal_captions(captions: NDArray[Any]) -> NDArray[np.int64]:
    """Number the captions so that equal ones have equal numbers.

    Hashes of 8 bytes are compared first. Only captions whose hashes are equal are held in memory in
    their folded form.

    Returns:
        int64 [n_texts]: the row of the first caption that equals each one.
    """
    hashes = np.fromiter(
        (hash(fold_caption(str(caption))) for caption in captions),
        np.int64,
        len(captions),
    )
    _, first, inverse, counts = np.unique(
        hashes,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    numbers = first[inverse].astype(np.int64)
    known: dict[str, int] = {}
    for row in np.flatnonzero(counts[inverse] > 1).tolist():
        numbers[row] = known.setdefault(fold_caption(str(captions[row])), row)
    return numbers


def equal_images(array: FeatureArray) -> NDArray[np.int64] | None:
    """int64 [rows]: equal numbers for images of equal content; None where all differ."""
    hashes = array.content()
    known: dict[str, int] = {}
    numbers = [
        row if not digest else known.setdefault(digest, row) for row, digest in enumerate(hashes)
    ]
    return None if len(known) == sum(map(bool, hashes)) else np.array(numbers, np.int64)


def is_shared(caption_ids: NDArray[np.int64], image_rows: NDArray[np.int64]) -> bool:
    """Whether captions of two different images are equal; both int64 [n_texts]."""
    order = np.lexsort((image_rows, caption_ids))
    same_caption = np.diff(caption_ids[order]) == 0
    other_image = np.diff(image_rows[order]) != 0
    return bool((same_caption & other_image).any())
