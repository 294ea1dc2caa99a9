"""Compute the loss that keeps a head from changing the geometry of its input features.

Source: STRUCTURE, Groeger et al. 2025.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.heads.normalization import normalize, similarities

Divergence = Literal["jensen-shannon", "as-coded"]
"""The formula of the paper, or that of its published code."""


def structure_divergence(
    before: Tensor,
    after: Tensor,
    temperature: float = 0.05,
    kind: Divergence = "jensen-shannon",
) -> Tensor:
    """Compute the divergence between the similarities within a batch before and after the head.

    The similarities of a row are softmax(x x^T / temperature) of features that are L2-normalized
    and then centered. This is the first level of the paper's hierarchy. With A and O the rows
    before and after, and M their mean: `jensen-shannon` is half of KL(A, M) + KL(O, M), as the
    paper defines it. `as-coded` is half of KL(M, A) + KL(M, O), as its published code computes.

    Args:
        before: float [n, in_dim]; gets no gradient.
        after: float [n, out_dim].
        temperature: divides the similarities.
        kind: which formula.

    Returns:
        The mean over the rows, in nats.
    """
    a = _log_similarities(before.detach(), temperature)
    o = _log_similarities(after, temperature)
    # The mean of the probabilities, from their logarithms: small ones would round to 0.
    m = torch.logaddexp(a, o) - math.log(2.0)
    match kind:
        case "jensen-shannon":
            return (_kl(a, m) + _kl(o, m)) / 2
        case "as-coded":
            return (_kl(m, a) + _kl(m, o)) / 2


def _log_similarities(features: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities [n, n] of the similarities of features [n, dim]."""
    unit = normalize(features)
    centered = unit - unit.mean(0)
    logits = similarities(centered, centered) / temperature
    return F.log_softmax(logits, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(p, q) of rows of log-probabilities, averaged over the rows."""
    terms = p.exp() * (p - q)
    return terms.sum(-1).mean()
