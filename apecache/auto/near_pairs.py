"""Find what a split should not have: near copies of items of another split, and gaps."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from apecache.store.near_duplicates import centered

BLOCK = 1024
"""Items that are compared with all others at a time."""
MAX_CLUSTERS = 50


@dataclass(frozen=True, kw_only=True)
class NearPair:
    """Name two items of different splits that are nearly equal, by their positions."""

    first: int
    second: int
    similarity: float
    """Cosine of the centered features."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Describe a cluster of similar images."""

    n_train: int
    n_other: int
    """Images of other splits."""
    found: float
    """Per cent of the training captions that find their own image first, out of fold; NaN without
    captions."""
    examples: tuple[int, ...]
    """Positions of the images that are closest to its center."""


def near_pairs_across_splits(
    features: NDArray[np.float32],
    splits: NDArray[np.object_],
    threshold: float,
    limit: int,
) -> list[NearPair]:
    """Return items of different splits that are closer than a threshold, the closest first.

    Args:
        features: [n, dim], finite.
        splits: [n], name of the split of each item.
        threshold: Least cosine of the centered features.
        limit: Largest number of pairs.
    """
    names, numbers = np.unique(splits, return_inverse=True)
    vectors = centered(features)
    pairs: list[NearPair] = []
    for split in range(1, len(names)):
        # Each pair of splits once: a split with all splits before it.
        rows = np.flatnonzero(numbers == split)
        earlier = np.flatnonzero(numbers < split)
        for begin in range(0, len(rows), BLOCK):
            block = rows[begin : begin + BLOCK]
            cosines = vectors[block] @ vectors[earlier].T
            for i, j in zip(*np.nonzero(cosines >= threshold), strict=True):
                pair = NearPair(
                    first=int(earlier[j]),
                    second=int(block[i]),
                    similarity=float(cosines[i, j]),
                )
                pairs.append(pair)
    pairs.sort(key=lambda pair: (-pair.similarity, pair.first, pair.second))
    return pairs[:limit]


def cluster_images(
    features: NDArray[np.float32],
    is_train: NDArray[np.bool_],
    found: NDArray[np.float64],
    seed: int,
) -> list[Cluster]:
    """Cluster the images of all splits by k-means.

    Args:
        features: [n, dim], finite.
        is_train: bool [n].
        found: [n], share of an image's captions that find it first; NaN where that is not known.
        seed: Seed of the centers.

    Returns:
        Clusters, those in which fewest captions find their image first.
    """
    vectors = centered(features)
    n_clusters = int(np.clip((len(vectors) / 2) ** 0.5, 2, MAX_CLUSTERS))
    n_clusters = min(n_clusters, len(vectors))
    kmeans = MiniBatchKMeans(n_clusters, random_state=seed, n_init=3).fit(vectors)
    clusters: list[Cluster] = []
    for number in range(n_clusters):
        members = np.flatnonzero(kmeans.labels_ == number)
        if not len(members):
            continue
        distances = np.linalg.norm(vectors[members] - kmeans.cluster_centers_[number], axis=1)
        measured_shares = found[members][~np.isnan(found[members])]
        cluster = Cluster(
            n_train=int(is_train[members].sum()),
            n_other=int((~is_train[members]).sum()),
            found=100 * float(measured_shares.mean()) if len(measured_shares) else float("nan"),
            examples=tuple(int(row) for row in members[np.argsort(distances)[:4]]),
        )
        clusters.append(cluster)
    clusters.sort(key=lambda cluster: cluster.found if cluster.found == cluster.found else 101.0)
    return clusters
