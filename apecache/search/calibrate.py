"""Find the score below which the best result of a query is more likely chance than an answer."""

import numpy as np
from numpy.typing import NDArray

from apecache.search.exact import Floats, exact_search
from apecache.search.faiss_index import QUERIES, SEED

QUANTILE = 0.95
"""Share of queries without an answer whose best result scores below the threshold."""
MIN_QUERIES = 20
"""Fewer queries give no threshold."""


def nothing_found_score(
    vectors: Floats,
    queries: Floats,
    owner_of_query: NDArray[np.int64],
    owner_of_vector: NDArray[np.int64],
) -> float | None:
    """Return the score that the best wrong result of 95 % of the queries stays below.

    The right results of each query are taken out, so what is left stands for an index that does not
    have the answer.

    Args:
        vectors: [n, dim], what is searched.
        queries: [m, dim]; up to 1,000 of them are drawn, with a fixed seed.
        owner_of_query: [m], the image that each query belongs to.
        owner_of_vector: [n], the image that each vector belongs to.

    Returns:
        A cosine; None with too few queries, or where nothing is left.
    """
    if len(queries) < MIN_QUERIES or not len(vectors):
        return None
    sample = np.sort(np.random.default_rng(SEED).permutation(len(queries))[:QUERIES])
    # So many right results can stand above the best wrong one.
    n_own = int(np.bincount(owner_of_vector).max())
    k = min(n_own + 1, len(vectors))
    scores, rows = exact_search(vectors, queries[sample], k)
    is_wrong = owner_of_vector[rows] != owner_of_query[sample][:, None]
    best = np.where(is_wrong, scores, -np.inf).max(axis=1)
    best = best[np.isfinite(best)]
    return float(np.quantile(best, QUANTILE)) if len(best) >= MIN_QUERIES else None
