"""Indexes of the same vectors that were embedded in other batches."""

from pathlib import Path

import numpy as np

from apecache.search.faiss_index import open_vectors
from apecache.search.index_files import read_description


def assert_close_vectors(index: Path, other: Path, name: str) -> None:
    """The same vectors in the same order, up to the rounding of another batch."""
    dim = read_description(index)["dim"]
    opened = [open_vectors(folder / f"{name}.faiss", "Flat") for folder in (index, other)]
    assert opened[0].shape == opened[1].shape == (opened[0].shape[0], dim)
    vectors = [one.vectors(np.arange(one.shape[0])) for one in opened]
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=1e-5)
