"""Measure how alike two sets of features of the same pairs are, before any head is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.closed_form import PairMoments, ridge_map
from apecache.heads.normalization import normalize
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import retrieval_report

KNN_NEIGHBORS = 10
"""Neighbors of each pair that `mutual_knn` compares."""
RIDGE = 1.0
"""Penalty of the regression, in units of the mean eigenvalue of the texts' covariance. It is large
because samples are small."""


@dataclass(frozen=True, kw_only=True)
class FeatureSimilarity:
    """Say how alike the features of two encoders are."""

    cka: float
    """Linear centered kernel alignment, 0 to 1."""
    mutual_knn: float
    """Share of nearest neighbors that both sides agree on, 0 to 1."""
    image_to_text: float
    """R@1 in per cent of a ridge regression, on pairs that it was not fitted on."""
    text_to_image: float
    """The same in the other direction."""

    @property
    def recall_at_1(self) -> float:
        """Return the mean R@1 of both directions, in per cent."""
        return (self.image_to_text + self.text_to_image) / 2


def likeness(
    image: Tensor,
    text: Tensor,
    fit: Tensor,
    relevance: Relevance | None = None,
) -> FeatureSimilarity:
    """Measure the likeness of the features of n pairs.

    Args:
        image: [n, dx].
        text: [n, dy].
        fit: bool [n], pairs that the regression is fitted on.
        relevance: right answers among the other pairs, where captions are equal.
    """
    image_to_text, text_to_image = ridge_recalls(image, text, fit, relevance=relevance)
    return FeatureSimilarity(
        cka=linear_cka(image, text),
        mutual_knn=mutual_knn(image, text),
        image_to_text=image_to_text,
        text_to_image=text_to_image,
    )


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute linear centered kernel alignment, 0 to 1; 0 where one side is constant.

    This is ||Y'X||^2 / (||X'X|| ||Y'Y||) in Frobenius norms of centered features (Kornblith et al.
    2019, Similarity of neural network representations revisited, section 3).

    Args:
        x: [n, dx].
        y: [n, dy].
    """
    # In float64: centering features with a large mean cancels digits.
    x = x.double() - x.double().mean(0)
    y = y.double() - y.double().mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    if not scale > 0:
        return 0.0
    return float((y.T @ x).norm() ** 2 / scale)


def mutual_knn(x: Tensor, y: Tensor, k: int = KNN_NEIGHBORS) -> float:
    """Compute the mean share of a pair's k nearest pairs that both sides agree on, 0 to 1.

    Pairs are compared by cosine. By chance the share is k / (n - 1). Source: Huh et al. 2024, The
    Platonic representation hypothesis, appendix A.

    Args:
        x: [n, dx].
        y: [n, dy].
        k: neighbors of each pair, at most n - 1.
    """
    k = min(k, len(x) - 1)
    is_neighbor = torch.zeros(2, len(x), len(x), dtype=torch.bool, device=x.device)
    for mask, side in zip(is_neighbor, (x, y), strict=True):
        directions = normalize(side, dim=1)
        # A pair is not its own neighbor.
        cosines = (directions @ directions.T).fill_diagonal_(-torch.inf)
        mask.scatter_(1, cosines.topk(k, dim=1).indices, True)
    n_shared = (is_neighbor[0] & is_neighbor[1]).sum()
    return float(n_shared / (k * len(x)))


def ridge_recalls(
    image: Tensor,
    text: Tensor,
    fit: Tensor,
    ridge: float = RIDGE,
    relevance: Relevance | None = None,
) -> tuple[float, float]:
    """Compute R@1 of texts that are mapped to images by ridge regression.

    Both sides are centered by the mean of the fitted pairs. Recall is measured on the other pairs.

    Args:
        image: [n, dx].
        text: [n, dy].
        fit: bool [n], pairs that the regression is fitted on.
        ridge: penalty, see `RIDGE`.
        relevance: right answers among the other pairs, where captions are equal.

    Returns:
        Image to text and text to image, in per cent.
    """
    moments = PairMoments()
    owner = torch.arange(int(fit.sum()))
    moments.add(image[fit], text[fit], owner)
    covariances = moments.covariances()
    mapping = ridge_map(covariances, ridge)
    mapped = text[~fit].double() @ mapping.weight.T + mapping.bias
    centered_image = image[~fit].double() - covariances.image_mean
    centered_text = mapped - covariances.image_mean
    image_directions = normalize(centered_image, dim=1).float()
    text_directions = normalize(centered_text, dim=1).float()
    report = retrieval_report(
        image_directions,
        text=text_directions,
        image_of_text=torch.arange(len(image_directions)),
        ks=(1,),
        relevance=relevance,
    )
    return report.image_to_text[1], report.text_to_image[1]
