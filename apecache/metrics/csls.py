"""Cross-domain similarity local scaling: retrieval corrected for hubs, which are near to
everything.

CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), where r(x) is the mean cosine of an image to its k nearest
texts and r(y) that of a text to its k nearest images (Conneau et al. 2018, Word translation without
parallel data, section 2.3; k = 10 there). It looks at all queries at once, so its figures stand
beside the plain ones and never among them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apecache.heads.normalization import similarities
from apecache.metrics.protocols import Intervals, retrieval_intervals
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import KS, TILE, RetrievalReport, retrieval_report

NEIGHBOURS = 10


def csls_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """`retrieval_report` by CSLS in place of the cosine; arguments and errors are the same."""
    return retrieval_report(*csls_vectors(image, text), image_of_text, ks, relevance)


def csls_intervals(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> Intervals:
    """Compute `retrieval_intervals` by CSLS in place of the cosine; the neighbourhoods stay as they
    are."""
    return retrieval_intervals(*csls_vectors(image, text), image_of_text, ks, relevance)


def csls_vectors(image: Tensor, text: Tensor, k: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Vectors [n, dim + 2] and [m, dim + 2] whose inner products are the CSLS scores of
    L2-normalised ones."""
    near_image = mean_of_nearest(image, text, k)
    near_text = mean_of_nearest(text, image, k)
    ones = torch.ones_like
    return (
        torch.cat((2 * image, -near_image, ones(near_image)), dim=1),
        torch.cat((text, ones(near_text), -near_text), dim=1),
    )


def mean_of_nearest(vectors: Tensor, others: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """[n, 1]: mean inner product with the k nearest of the others (all of them, if there are
    fewer)."""
    parts = [
        similarities(tile, others).topk(min(k, len(others)), dim=1).values.mean(1, keepdim=True)
        for tile in vectors.tensor_split(-(-len(vectors) // TILE) or 1)
    ]
    return torch.cat(parts)
