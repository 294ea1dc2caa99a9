"""Compute heads without training: linear maps that one pass over the features determines.

Every map follows from the means and covariances of a set of pairs. They are summed in double
precision, block by block, so the features never have to be in memory at once. An image weighs 1,
and each of its n captions weighs 1 / n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.normalization import normalize

EIGEN_FLOOR = 1e-10
"""Smallest eigenvalue, as a share of the largest: values below are rounding and are raised."""


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """Hold the means and covariances of n pairs, float64, divided by n."""

    n: float
    """Number of images."""
    image_mean: Tensor
    """[dx]."""
    text_mean: Tensor
    """[dy]."""
    image: Tensor
    """[dx, dx]: covariance of the images."""
    text: Tensor
    """[dy, dy]: covariance of the texts."""
    cross: Tensor
    """[dx, dy]: covariance of images and texts."""


class PairMoments:
    """Sum first and second moments over pairs, float64, on the device of the first block."""

    def __init__(self) -> None:
        self.n = 0.0
        self.sums: list[Tensor] = []

    def add(self, image: Tensor, text: Tensor, owner: Tensor) -> None:
        """Add a block of images and all their captions.

        Args:
            image: [b, dx], features of the images.
            text: [t, dy], features of the captions.
            owner: int64 [t], the row in `image` of each caption's image.
        """
        x = image.double()
        y = text.double()
        n_captions = torch.bincount(owner, minlength=len(x)).double()
        caption_weight = (1 / n_captions)[owner].unsqueeze(1)
        weighted_text = caption_weight * y
        # The weights of one image's captions sum to 1, so these sums are means over captions.
        mean_text = torch.zeros(len(x), y.shape[1], dtype=y.dtype, device=y.device)
        mean_text.index_add_(0, owner, weighted_text)
        block_sums = [
            x.sum(0),
            mean_text.sum(0),
            x.T @ x,
            weighted_text.T @ y,
            x.T @ mean_text,
        ]
        if self.sums:
            pairs = zip(self.sums, block_sums, strict=True)
            self.sums = [total + block_sum for total, block_sum in pairs]
        else:
            self.sums = block_sums
        self.n += len(x)

    def covariances(self) -> Covariances:
        """Return the means and covariances of all pairs that were added."""
        image_mean, text_mean, image, text, cross = (total / self.n for total in self.sums)
        return Covariances(
            n=self.n,
            image_mean=image_mean,
            text_mean=text_mean,
            image=image - torch.outer(image_mean, image_mean),
            text=text - torch.outer(text_mean, text_mean),
            cross=cross - torch.outer(image_mean, text_mean),
        )


@dataclass(frozen=True, kw_only=True)
class AffineMap:
    """Map x to weight x + bias, in float64."""

    weight: Tensor
    """[out_dim, in_dim]."""
    bias: Tensor
    """[out_dim]."""


def ridge_map(c: Covariances, ridge: float) -> AffineMap:
    """Map texts to images by ridge regression.

    Args:
        c: the moments of the pairs.
        ridge: penalty, in units of the mean eigenvalue of the texts' covariance, so that one value
            suits features of any scale.
    """
    identity = torch.eye(len(c.text)).to(c.text)
    penalized = c.text + ridge * _mean_eigenvalue(c.text) * identity
    weight = torch.linalg.solve(penalized, c.cross.T).T
    return AffineMap(weight=weight, bias=c.image_mean - weight @ c.text_mean)


def procrustes_map(c: Covariances) -> AffineMap:
    """Map texts to images by the (semi-)orthogonal matrix that fits best (Schoenemann 1966)."""
    u, _, vh = torch.linalg.svd(c.cross, full_matrices=False)
    weight = u @ vh
    return AffineMap(weight=weight, bias=c.image_mean - weight @ c.text_mean)


@dataclass(frozen=True, kw_only=True)
class CanonicalMaps:
    """Hold the canonical directions of both sides and their correlations."""

    image: AffineMap
    """Weight [k, dx]."""
    text: AffineMap
    """Weight [k, dy]."""
    correlations: Tensor
    """[k], in falling order."""

    def weighted(self, rank: int, power: float) -> tuple[AffineMap, AffineMap]:
        """Return the first `rank` directions of images and texts, weighted.

        Args:
            rank: directions to keep.
            power: the inner product of two embeddings weights each direction by its correlation to
                this power (CSA, Li et al. 2024: power 1).
        """
        # Both sides are multiplied, so each takes the square root of the weight.
        weights = self.correlations[:rank].clamp_min(0) ** (power / 2)
        image_map = _weighted_rows(self.image, weights)
        text_map = _weighted_rows(self.text, weights)
        return image_map, text_map


def _weighted_rows(mapping: AffineMap, weights: Tensor) -> AffineMap:
    """Keep the first len(weights) rows of a map, each times its weight."""
    rank = len(weights)
    return AffineMap(
        weight=weights.unsqueeze(1) * mapping.weight[:rank],
        bias=weights * mapping.bias[:rank],
    )


def canonical_maps(c: Covariances, ridge: float) -> CanonicalMaps:
    """Compute canonical correlation analysis (Hotelling 1936).

    Args:
        c: the moments of the pairs.
        ridge: penalty, in units of the mean eigenvalue of each covariance.
    """
    image_root = _inverse_root(c.image, ridge)
    text_root = _inverse_root(c.text, ridge)
    whitened_cross = image_root @ c.cross @ text_root
    u, correlations, vh = torch.linalg.svd(whitened_cross, full_matrices=False)
    image = u.T @ image_root
    text = vh @ text_root
    return CanonicalMaps(
        image=AffineMap(weight=image, bias=-image @ c.image_mean),
        text=AffineMap(weight=text, bias=-text @ c.text_mean),
        # Rounding can lift a correlation slightly above 1.
        correlations=correlations.clamp_max(1),
    )


def dictionary_entries(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Make one dictionary entry per image, L2-normalized.

    ASIF has one caption per image. Averaging several captions is a choice of this project.

    Args:
        image: [n, dx], features of the images.
        text: [t, dy], features of the captions.
        owner: int64 [t], the row in `image` of each caption's image.

    Returns:
        The image itself [n, dx], and the mean of its captions' directions [n, dy].
    """
    directions = normalize(text)
    direction_sums = torch.zeros(len(image), text.shape[1], device=text.device)
    direction_sums.index_add_(0, owner, directions)
    return normalize(image), normalize(direction_sums)


def _mean_eigenvalue(covariance: Tensor) -> Tensor:
    # The trace is the sum of the eigenvalues: no decomposition is needed.
    return covariance.trace() / len(covariance)


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """Compute (covariance + ridge)^(-1/2), which is symmetric."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values + ridge * _mean_eigenvalue(covariance)
    floored = values.clamp_min(EIGEN_FLOOR * values.max())
    root: Tensor = (vectors * floored.rsqrt()) @ vectors.T
    return root
