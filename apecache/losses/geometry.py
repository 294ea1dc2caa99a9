"""What keeps a head from bending the geometry of the features it was given (STRUCTURE, Groeger et
al. 2025)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.heads.normalization import normalize, similarities

Divergence = Literal["jensen-shannon", "as-coded"]


def structure_divergence(
    before: Tensor,
    after: Tensor,
    temperature: float = 0.05,
    kind: Divergence = "jensen-shannon",
) -> Tensor:
    """Divergence between who resembles whom within a batch before and after the head, mean over the
    rows, in nats.

    The similarities of a row are softmax(x x^T / temperature) of features that are L2-normalised
    and then centred; of the paper's hierarchy this is the first level. With A and O the rows before
    and after and M their mean: `jensen-shannon` is half of KL(A, M) + KL(O, M), as the paper says;
    `as-coded` is half of KL(M, A) + KL(M, O), as its published code computes.

    Args:
        before: float [n, in_dim]; gets no gradient. after: [n, out_dim].
    """
    a = _log_similarities(before.detach(), temperature)
    o = _log_similarities(after, temperature)
    m = torch.logaddexp(a, o) - torch.log(a.new_tensor(2.0))
    match kind:
        case "jensen-shannon":
            return (_kl(a, m) + _kl(o, m)) / 2
        case "as-coded":
            return (_kl(m, a) + _kl(m, o)) / 2


def _log_similarities(features: Tensor, temperature: float) -> Tensor:
    unit = normalize(features)
    centred = unit - unit.mean(0)
    return F.log_softmax(similarities(centred, centred) / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of rows of log-probabilities, mean over the rows."""
    return (p.exp() * (p - q)).sum(-1).mean()
