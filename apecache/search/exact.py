"""Search vectors exactly by inner product, and measure what an approximate search has found."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.device import float32_products

TILE = 16384
"""Vectors that are compared with all queries at a time."""
Floats = NDArray[np.float32]


def shortened(vectors: Floats, dim: int) -> Floats:
    """Return the first `dim` values of each vector, L2-normalized again."""
    cut = vectors[:, :dim]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.ascontiguousarray(cut / np.maximum(norms, 1e-12), dtype=np.float32)


def exact_search(
    vectors: Floats | Tensor,
    queries: Floats,
    k: int,
) -> tuple[Floats, NDArray[np.int64]]:
    """Find the k nearest vectors of each query by inner product, exactly.

    This is Torch's matrix product by tiles of vectors. Memory is that of a tile.

    Args:
        vectors: [n, dim], as a tensor on the device that computes.
        queries: [n_queries, dim].
        k: results of each query; at most n.

    Returns:
        Scores and rows, [n_queries, k] each, best first.
    """
    all_vectors = vectors if isinstance(vectors, Tensor) else torch.from_numpy(vectors)
    device = all_vectors.device
    query_vectors = torch.from_numpy(np.ascontiguousarray(queries)).to(device)
    n_queries = len(query_vectors)
    best = torch.empty(n_queries, 0, device=device)
    rows = torch.empty(n_queries, 0, dtype=torch.long, device=device)
    # One buffer for the scores of all tiles: a new one for each would cost page faults.
    buffer = torch.empty(n_queries * min(TILE, len(all_vectors)), device=device)
    for begin in range(0, len(all_vectors), TILE):
        tile = all_vectors[begin : begin + TILE]
        scores = buffer[: n_queries * len(tile)].view(n_queries, len(tile))
        # Not in TF32: near neighbors differ by less than its rounding.
        with float32_products(device, tf32=False):
            torch.mm(query_vectors, tile.T, out=scores)
        tile_best = scores.topk(min(k, scores.shape[1]), dim=1)
        candidates = torch.cat((best, tile_best.values), 1)
        candidate_rows = torch.cat((rows, tile_best.indices + begin), 1)
        best, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        rows = candidate_rows.gather(1, order)
    return best.cpu().numpy(), rows.cpu().numpy()


def recall(queries: Floats, vectors: Floats, found: NDArray[np.int64], best: Floats) -> float:
    """Compute the share of found rows that score as high as the k-th best.

    Args:
        queries: [n, dim].
        vectors: [m, dim].
        found: [n, k], rows of `vectors`; -1 for none.
        best: [n, k], the exact best scores, best first.
    """
    scores = np.einsum("qd,qkd->qk", queries, vectors[found])
    # A tolerance, because `best` was summed in another order.
    is_best = scores >= best[:, -1:] - 1e-6
    return float(((found >= 0) & is_best).mean())
