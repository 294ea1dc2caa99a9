"""Contrastive losses on batches of normalised embeddings, and the scale that they learn.

Images [n, dim] and texts [m, dim], both L2-normalised. Without groups n = m and row i of one
belongs to row i of the other. With groups (int64 [n] and [m]) an image and a text of one group are
a positive pair: several captions of one image, and images with equal content, are never each
other's negatives.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.normalization import at_least_float32, similarities


@dataclass(frozen=True, kw_only=True)
class Groups:
    """int64 [n] of the images and int64 [m] of the texts; every group has a member on both
    sides."""

    image: Tensor
    text: Tensor

    def positives(self) -> tuple[Tensor, Tensor]:
        """(image rows, text rows), int64 [p] each: all positive pairs, by image."""
        order = torch.argsort(self.text, stable=True)
        ordered = self.text[order]
        first = torch.searchsorted(ordered, self.image)
        count = torch.searchsorted(ordered, self.image, right=True) - first
        image = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        within = torch.arange(len(image), device=count.device) - torch.repeat_interleave(
            count.cumsum(0) - count,
            count,
        )
        return image, order[first[image] + within]


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE: mean of the image-to-text and text-to-image cross-entropies (CLIP, Radford
    et al. 2021).

    `scale`: what cosines are multiplied with, 1 / temperature.
    """
    logits = similarities(scale * at_least_float32(image), text)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def grouped_info_nce(image: Tensor, text: Tensor, scale: Tensor | float, groups: Groups) -> Tensor:
    """InfoNCE with several positives: of each positive pair -log(e^s / (e^s + sum of e^s over the
    *negatives*)).

    Every query counts the same, and so does every positive of one query. With one positive each it
    is `info_nce`.
    """
    logits = similarities(scale * at_least_float32(image), text)
    same = groups.image.unsqueeze(1) == groups.text.unsqueeze(0)
    negatives = logits.masked_fill(same, -torch.inf)
    pairs = groups.positives()
    return (_one_way(logits, negatives, pairs) + _one_way(logits.T, negatives.T, pairs[::-1])) / 2


def _one_way(logits: Tensor, negatives: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
    rows, columns = pairs
    floor = torch.finfo(logits.dtype).min
    others = negatives.logsumexp(1).clamp_min(floor)[rows]
    return (
        share_of(rows, len(logits), logits.dtype) * softplus(others - logits[rows, columns])
    ).sum()


def share_of(rows: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """[p]: 1 / (rows x positives of that row), so that the weights of each row sum to 1 / rows."""
    return 1 / (n_rows * torch.bincount(rows, minlength=n_rows)[rows].to(dtype))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in double precision too (the default threshold of 20 is not)."""
    return F.softplus(x, threshold=40)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    groups: Groups | None = None,
) -> Tensor:
    """Every pair by itself: sum over i, j of -log sigmoid(z (scale x cosine + bias)) / m, where z
    is 1 for a positive pair and -1 for others (SigLIP, Zhai et al. 2023, algorithm 1)."""
    logits = similarities(scale * at_least_float32(image), text) + bias
    if groups is None:
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
    else:
        same = groups.image.unsqueeze(1) == groups.text.unsqueeze(0)
    return softplus(torch.where(same, -logits, logits)).sum() / len(text)


class Temperature(nn.Module):
    """Learnable (or fixed) temperature T that divides the logits, clamped to [low, high]; kept as
    log(1 / T).

    LilT: T = 0.07 in [0.001, 0.5]; CLIP: 1/T from 1/0.07 up to 100; SigLIP: 1/T = 10, and a `bias`
    of -10 that is added to the logits and learned along. Without a bias the module has no such
    parameter.
    """

    def __init__(
        self,
        initial: float = 0.07,
        low: float = 0.01,
        high: float = 0.5,
        learnable: bool = True,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial)), requires_grad=learnable)
        self.bias = (
            None if bias is None else nn.Parameter(torch.tensor(bias), requires_grad=learnable)
        )
        self.bounds = (-math.log(high), -math.log(low))

    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the temperature back into its bounds; to be called after every optimiser step."""
        self.log_scale.clamp_(*self.bounds)
