"""Compute contrastive losses on batches of normalized embeddings, and the scale that they learn.

Images are [n, dim] and texts [m, dim], both L2-normalized. Without groups n = m, and row i of one
belongs to row i of the other. With groups (int64 [n] and [m]) an image and a text of one group are
a positive pair. Several captions of one image, and images with equal content, are then never each
other's negatives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.normalization import at_least_float32, similarities


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Say which images and texts of a batch belong together.

    Every group has a member on both sides.
    """

    image: Tensor
    """int64 [n], the group of each image."""
    text: Tensor
    """int64 [m], the group of each text."""
    n_pairs: int | None = None
    """Number of positive pairs; None: not known on the host, so that it is read from the device."""

    def positives(self) -> tuple[Tensor, Tensor]:
        """Return all positive pairs, ordered by image: image rows and text rows, int64 [p] each."""
        # Sorted texts make the texts of one group a range, so no [n, m] mask is needed.
        order = torch.argsort(self.text, stable=True)
        sorted_groups = self.text[order]
        first = torch.searchsorted(sorted_groups, self.image)
        count = torch.searchsorted(sorted_groups, self.image, right=True) - first
        device = count.device
        image = torch.repeat_interleave(
            torch.arange(len(count), device=device),
            count,
            output_size=self.n_pairs,
        )
        pairs_before = torch.repeat_interleave(
            count.cumsum(0) - count,
            count,
            output_size=self.n_pairs,
        )
        position_in_group = torch.arange(len(image), device=device) - pairs_before
        return image, order[first[image] + position_in_group]


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Compute symmetric InfoNCE (CLIP, Radford et al. 2021).

    This is the mean of the image-to-text and text-to-image cross-entropies.

    Args:
        image: [n, dim], L2-normalized.
        text: [n, dim], L2-normalized; row i belongs to image i.
        scale: factor of the cosines, 1 / temperature.

    Returns:
        A scalar, in nats.
    """
    logits = similarities(scale * at_least_float32(image), text)
    targets = torch.arange(len(logits), device=logits.device)
    to_text = F.cross_entropy(logits, targets)
    to_image = F.cross_entropy(logits.T, targets)
    return (to_text + to_image) / 2


def grouped_info_nce(image: Tensor, text: Tensor, scale: Tensor | float, groups: Groups) -> Tensor:
    """Compute InfoNCE with several positives.

    A positive pair costs -log(e^s / (e^s + sum of e^s over the *negatives*)). All queries have the
    same weight, and so have all positives of one query. With one positive for each query this is
    `info_nce`.

    Args:
        image: [n, dim], L2-normalized.
        text: [m, dim], L2-normalized.
        scale: factor of the cosines, 1 / temperature.
        groups: which of them belong together.

    Returns:
        A scalar, in nats.
    """
    logits = similarities(scale * at_least_float32(image), text)
    same = groups.image.unsqueeze(1) == groups.text.unsqueeze(0)
    negatives = logits.masked_fill(same, -torch.inf)
    rows, columns = groups.positives()
    to_text = one_way(logits, negatives, (rows, columns))
    to_image = one_way(logits.T, negatives.T, (columns, rows))
    return (to_text + to_image) / 2


def one_way(logits: Tensor, negatives: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the loss of rows as queries, whose positives have equal weights.

    Args:
        logits: [n, m].
        negatives: [n, m], the same with positives at -inf.
        pairs: rows and columns of the positives, int64 [p] each; every row has one.
    """
    rows, columns = pairs
    # A row without negatives sums to -inf; the floor keeps its loss and gradient finite.
    floor = torch.finfo(logits.dtype).min
    log_negatives = negatives.logsumexp(1).clamp_min(floor)[rows]
    weights = share_of(rows, len(logits), logits.dtype)
    losses = softplus(log_negatives - logits[rows, columns])
    return (weights * losses).sum()


def share_of(rows: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """Return [p]: 1 / (rows x positives of that row); the weights of a row sum to 1 / rows."""
    # Not by bincount, which waits for a device to learn the largest row.
    n_positives = rows.new_zeros(n_rows).index_add_(0, rows, torch.ones_like(rows))
    return 1 / (n_rows * n_positives[rows].to(dtype))


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x), exact in double precision too.

    PyTorch's default threshold of 20 is exact in single precision only.
    """
    return F.softplus(x, threshold=40)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    groups: Groups | None = None,
) -> Tensor:
    """Compute the loss of every pair by itself (SigLIP, Zhai et al. 2023, algorithm 1).

    This is the sum over i, j of -log sigmoid(z (scale x cosine + bias)) / m, where z is 1 for a
    positive pair and -1 for all others.

    Args:
        image: [n, dim], L2-normalized.
        text: [m, dim], L2-normalized.
        scale: factor of the cosines, 1 / temperature.
        bias: added to the logits.
        groups: which of them belong together. None: row i belongs to row i.

    Returns:
        A scalar, in nats.
    """
    logits = similarities(scale * at_least_float32(image), text) + bias
    if groups is None:
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
    else:
        same = groups.image.unsqueeze(1) == groups.text.unsqueeze(0)
    return softplus(torch.where(same, -logits, logits)).sum() / len(text)


TemperatureParameter = Literal["log_scale", "temperature"]
"""What an optimizer changes: log(1 / T), or T itself."""


class Temperature(nn.Module):
    """Hold the temperature T that divides the logits, learnable or fixed, in [low, high].

    The parameter is `log_scale`, log(1 / T) (CLIP, SigLIP), or `temperature`, T itself (LilT,
    FuseMix). The choice matters to an optimizer whose steps have the size of its learning rate: at
    1e-4 a step changes log(1 / T) by 1e-4, and T = 0.07 by 1e-4 / 0.07 of itself.

    LilT: T = 0.07 in [0.001, 0.5]. CLIP: 1/T from 1/0.07 up to 100. SigLIP: 1/T = 10, and a learned
    `bias` of -10 that is added to the logits. Without a bias the module has no such parameter.
    """

    def __init__(
        self,
        initial: float = 0.07,
        low: float = 0.01,
        high: float = 0.5,
        learnable: bool = True,
        bias: float | None = None,
        parameter: TemperatureParameter = "log_scale",
    ) -> None:
        super().__init__()
        self.parameter_name: TemperatureParameter = parameter
        is_log = parameter == "log_scale"
        value = -math.log(initial) if is_log else initial
        self.register_parameter(
            parameter,
            nn.Parameter(torch.tensor(value), requires_grad=learnable),
        )
        self.bias = (
            None if bias is None else nn.Parameter(torch.tensor(bias), requires_grad=learnable)
        )
        # The highest temperature is the lowest scale.
        self.bounds = (-math.log(high), -math.log(low)) if is_log else (low, high)

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter that holds the temperature, see `TemperatureParameter`."""
        return self.get_parameter(self.parameter_name)

    def scale(self) -> Tensor:
        """Return the factor of the cosines, 1 / T."""
        return self.parameter.exp() if self.parameter_name == "log_scale" else 1 / self.parameter

    def scale_slope(self) -> Tensor:
        """Return the derivative of `scale` by the parameter."""
        scale = self.scale()
        return scale if self.parameter_name == "log_scale" else -scale.square()

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set 1 / T, clamped to the bounds."""
        self.parameter.fill_(math.log(scale) if self.parameter_name == "log_scale" else 1 / scale)
        self.clamp()

    def bias_value(self) -> float | None:
        """Return what is added to the logits; None without a bias."""
        return None if self.bias is None else float(self.bias.detach())

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the temperature to its bounds; call this after every optimizer step."""
        low, high = self.bounds
        self.parameter.clamp_(low, high)


def temperature_in(tensors: Mapping[str, Tensor]) -> float:
    """Return the temperature that the state of a model holds, in either form."""
    if LOG_SCALE in tensors:
        return 1 / float(tensors[LOG_SCALE].detach().exp())
    return float(tensors[TEMPERATURE].detach())


LOG_SCALE = "temperature.log_scale"
"""Name of the temperature in the state of a model, if the parameter is log(1 / T)."""
TEMPERATURE = "temperature.temperature"
"""The same if the parameter is T itself."""
