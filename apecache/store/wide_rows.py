"""Read rows of few tokens into buffers of rows with more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def as_wide(target: NDArray[Any], row_shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """Give a buffer for rows of `row_shape`, which may have fewer tokens than the target.

    If they have, the rows are copied into the target's first tokens afterwards, and the others
    become 0.
    """
    if target.shape[1:] == row_shape:
        yield target
        return
    narrow = np.empty((len(target), *row_shape), target.dtype)
    yield narrow
    # Segments of a ragged array differ in their number of tokens; the others are padding.
    target[:] = 0
    target[:, : row_shape[0]] = narrow
