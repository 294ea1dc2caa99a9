"""How alike two sets of features of the same pairs are, before any head is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.closed_form import PairMoments, ridge_map
from apecache.heads.normalization import normalize
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import retrieval_report

NEIGHBOURS = 10
RIDGE = 1.0
"""Of the least squares, in units of the mean eigenvalue of the texts' covariance: samples are
small."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """`cka` and `mutual_knn` are 0 to 1; R@1 in per cent of a ridge regression, on pairs that it
    was not fitted on."""

    cka: float
    mutual_knn: float
    image_to_text: float
    text_to_image: float

    @property
    def recall_at_1(self) -> float:
        return (self.image_to_text + self.text_to_image) / 2


def likeness(
    image: Tensor,
    text: Tensor,
    fit: Tensor,
    relevance: Relevance | None = None,
) -> Likeness:
    """Of features [n, dx] and [n, dy] of n pairs; `fit` bool [n]: pairs that the regression is
    fitted on. `relevance`: of the other pairs, where captions are equal."""
    forth, back = ridge_recalls(image, text, fit, relevance=relevance)
    return Likeness(
        cka=linear_cka(image, text),
        mutual_knn=mutual_knn(image, text),
        image_to_text=forth,
        text_to_image=back,
    )


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of [n, dx] and [n, dy], 0 to 1: ||Y'X||^2 / (||X'X|| ||Y'Y||)
    in Frobenius norms of centred features (Kornblith et al. 2019, Similarity of neural network
    representations revisited, section 3). 0 where one side is constant."""
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).norm() ** 2 / scale) if scale > 0 else 0.0


def mutual_knn(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Mean share of a pair's k nearest others by cosine that both sides agree on, 0 to 1 (Huh et
    al. 2024, The Platonic representation hypothesis, appendix A). By chance k / (n - 1)."""
    k = min(k, len(x) - 1)
    near = torch.zeros(2, len(x), len(x), dtype=torch.bool, device=x.device)
    for mask, side in zip(near, (x, y), strict=True):
        directions = normalize(side, dim=1)
        cosines = (directions @ directions.T).fill_diagonal_(-torch.inf)
        mask.scatter_(1, cosines.topk(k, dim=1).indices, True)
    return float((near[0] & near[1]).sum() / (k * len(x)))


def ridge_recalls(
    image: Tensor,
    text: Tensor,
    fit: Tensor,
    ridge: float = RIDGE,
    relevance: Relevance | None = None,
) -> tuple[float, float]:
    """R@1 in per cent, image to text and back, of texts mapped to images by least squares. Both
    sides are centred by the pairs of the fit; measured on the others, where `relevance` says which
    equal captions are right too."""
    moments = PairMoments()
    owner = torch.arange(int(fit.sum()))
    moments.add(image[fit], text[fit], owner)
    covariances = moments.covariances()
    mapping = ridge_map(covariances, ridge)
    mapped = text[~fit].double() @ mapping.weight.T + mapping.bias
    pictures = normalize(image[~fit].double() - covariances.image_mean, dim=1).float()
    words = normalize(mapped - covariances.image_mean, dim=1).float()
    report = retrieval_report(
        pictures,
        text=words,
        image_of_text=torch.arange(len(pictures)),
        ks=(1,),
        relevance=relevance,
    )
    return report.image_to_text[1], report.text_to_image[1]
