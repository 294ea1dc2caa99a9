"""Rank by cross-domain similarity local scaling, which corrects for hubs: points near to all.

CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), where r(x) is the mean cosine of an image to its k nearest
texts and r(y) that of a text to its k nearest images (Conneau et al. 2018, Word translation without
parallel data, section 2.3; k = 10 there). It uses all queries at once, so its figures are reported
beside those of the cosine and do not replace them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apecache.heads.normalization import similarities
from apecache.metrics.protocols import RetrievalMeasurement, measure_retrieval
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import KS, TILE, RetrievalReport, retrieval_report

CSLS_NEIGHBORS = 10
"""Neighbors that a mean cosine of CSLS is taken over."""


def csls_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Compute `retrieval_report` by CSLS; arguments and errors are the same."""
    image_vectors, text_vectors = csls_vectors(image, text)
    return retrieval_report(
        image_vectors,
        text=text_vectors,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )


def measure_csls(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalMeasurement:
    """Compute `measure_retrieval` by CSLS; the neighborhoods stay fixed over the intervals."""
    image_vectors, text_vectors = csls_vectors(image, text)
    return measure_retrieval(
        image_vectors,
        text=text_vectors,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )


def csls_vectors(image: Tensor, text: Tensor, k: int = CSLS_NEIGHBORS) -> tuple[Tensor, Tensor]:
    """Extend vectors so that their inner products are the CSLS scores.

    Args:
        image: [n, dim], L2-normalized.
        text: [m, dim], L2-normalized.
        k: neighbors of each vector.

    Returns:
        [n, dim + 2] and [m, dim + 2].
    """
    near_image = mean_of_nearest(image, text, k)
    near_text = mean_of_nearest(text, image, k)
    image_ones = torch.ones_like(near_image)
    text_ones = torch.ones_like(near_text)
    # Two columns more: the product adds -r(x) x 1 and 1 x -r(y) to 2 cos(x, y).
    image_vectors = torch.cat((2 * image, -near_image, image_ones), dim=1)
    text_vectors = torch.cat((text, text_ones, -near_text), dim=1)
    return image_vectors, text_vectors


def mean_of_nearest(vectors: Tensor, others: Tensor, k: int = CSLS_NEIGHBORS) -> Tensor:
    """Return [n, 1]: the mean inner product with the k nearest rows of `others` (at most all)."""
    n_neighbors = min(k, len(others))
    n_tiles = -(-len(vectors) // TILE) or 1
    tile_means = []
    for tile in vectors.tensor_split(n_tiles):
        nearest = similarities(tile, others).topk(n_neighbors, dim=1).values
        tile_means.append(nearest.mean(1, keepdim=True))
    return torch.cat(tile_means)
