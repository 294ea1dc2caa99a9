"""Heads without training: linear maps that one pass over the features determines.

Everything follows from the means and covariances of a set of pairs, added up in double precision
block by block, so the features never have to be in memory at once. An image weighs 1, and each of
its n captions 1 / n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.normalization import normalize

EIGEN_FLOOR = 1e-10
"""Eigenvalues below this share of the largest one are rounding and count as this."""


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """Means [dx], [dy] and covariances [dx, dx], [dy, dy], [dx, dy] of n pairs, float64, divided by
    n."""

    n: float
    image_mean: Tensor
    text_mean: Tensor
    image: Tensor
    text: Tensor
    cross: Tensor


class PairMoments:
    """Sums over pairs, float64, on the device of the first block."""

    def __init__(self) -> None:
        self.n = 0.0
        self.sums: list[Tensor] = []

    def add(self, image: Tensor, text: Tensor, owner: Tensor) -> None:
        """Images [b, dx] and all their captions [t, dy]; `owner` int64 [t]: the row in `image` of
        each caption's."""
        x = image.double()
        y = text.double()
        weight = (1 / torch.bincount(owner, minlength=len(x)).double())[owner].unsqueeze(1)
        heavy = weight * y
        mean = torch.zeros(len(x), y.shape[1], dtype=y.dtype, device=y.device).index_add_(
            0,
            owner,
            heavy,
        )
        parts = [x.sum(0), mean.sum(0), x.T @ x, heavy.T @ y, x.T @ mean]
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts
        self.n += len(x)

    def covariances(self) -> Covariances:
        image_mean, text_mean, image, text, cross = (part / self.n for part in self.sums)
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
    """x -> weight x + bias; float64 [out_dim, in_dim] and [out_dim]."""

    weight: Tensor
    bias: Tensor


def ridge_map(c: Covariances, ridge: float) -> AffineMap:
    """Text to image by least squares. `ridge` is in units of the mean eigenvalue of the texts'
    covariance."""
    penalised = c.text + ridge * _mean_eigenvalue(c.text) * torch.eye(len(c.text)).to(c.text)
    weight = torch.linalg.solve(penalised, c.cross.T).T
    return AffineMap(weight=weight, bias=c.image_mean - weight @ c.text_mean)


def procrustes_map(c: Covariances) -> AffineMap:
    """Text to image by the (semi-)orthogonal matrix that fits best (Schoenemann 1966)."""
    u, _, vh = torch.linalg.svd(c.cross, full_matrices=False)
    weight = u @ vh
    return AffineMap(weight=weight, bias=c.image_mean - weight @ c.text_mean)


@dataclass(frozen=True, kw_only=True)
class CanonicalMaps:
    """Canonical directions of both sides, [k, dx] and [k, dy], and their correlations [k],
    falling."""

    image: AffineMap
    text: AffineMap
    correlations: Tensor

    def weighted(self, rank: int, power: float) -> tuple[AffineMap, AffineMap]:
        """The first `rank` directions; a product of two embeddings is weighted by the correlations
        to `power` (CSA, Li et al. 2024: power 1)."""
        weights = self.correlations[:rank].clamp_min(0) ** (power / 2)
        image, text = (
            AffineMap(
                weight=weights.unsqueeze(1) * side.weight[:rank],
                bias=weights * side.bias[:rank],
            )
            for side in (self.image, self.text)
        )
        return image, text


def canonical_maps(c: Covariances, ridge: float) -> CanonicalMaps:
    """Canonical correlation analysis (Hotelling 1936). `ridge` in units of each covariance's mean
    eigenvalue."""
    image_root = _inverse_root(c.image, ridge)
    text_root = _inverse_root(c.text, ridge)
    u, correlations, vh = torch.linalg.svd(image_root @ c.cross @ text_root, full_matrices=False)
    image = u.T @ image_root
    text = vh @ text_root
    return CanonicalMaps(
        image=AffineMap(weight=image, bias=-image @ c.image_mean),
        text=AffineMap(weight=text, bias=-text @ c.text_mean),
        correlations=correlations.clamp_max(1),
    )


def dictionary_entries(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """One entry per image: itself [n, dx] and the mean of its captions' directions [n, dy],
    L2-normalised (ASIF has one caption per image; to average several is our choice)."""
    directions = normalize(text)
    sums = torch.zeros(len(image), text.shape[1], device=text.device).index_add_(
        0,
        owner,
        directions,
    )
    return normalize(image), normalize(sums)


def _mean_eigenvalue(covariance: Tensor) -> Tensor:
    return covariance.trace() / len(covariance)


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """(covariance + ridge)^(-1/2), symmetric."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values + ridge * _mean_eigenvalue(covariance)
    root: Tensor = (vectors * values.clamp_min(EIGEN_FLOOR * values.max()).rsqrt()) @ vectors.T
    return root
