"""Contrastive losses on batches of normalised embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE: mean of the image-to-text and text-to-image cross-entropies (CLIP, Radford et al. 2021).

    Args:
        image, text: [n, dim], L2-normalised; row i of one belongs to row i of the other.
        scale: what cosines are multiplied with, 1 / temperature.
    """
    logits = scale * image @ text.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Temperature(nn.Module):
    """Learnable (or fixed) temperature T that divides the logits, clamped to [low, high]; kept as log(1 / T).

    LilT: T = 0.07 in [0.001, 0.5]; CLIP: 1/T from 1/0.07 up to 100.
    """

    def __init__(self, initial: float = 0.07, low: float = 0.01, high: float = 0.5, learnable: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial)), requires_grad=learnable)
        self.bounds = (-math.log(high), -math.log(low))

    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the temperature back into its bounds; to be called after every optimiser step."""
        self.log_scale.clamp_(*self.bounds)
