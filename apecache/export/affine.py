"""Write heads as affine maps, for formats whose projections are plain linear layers."""

import torch
from torch import Tensor, nn

from apecache.errors import RunError
from apecache.heads.fold import fold_linear
from apecache.heads.head import Head
from apecache.heads.pooled import PooledHead

AFFINE_KINDS = ("linear", "identity")
RESIDUAL_TOLERANCE = 1e-6
"""Largest part of a bias, relative to its norm, that a shift of the input may leave out."""


def is_affine(head: Head | None) -> bool:
    """Tell whether a head is one linear layer before the normalization."""
    return isinstance(head, PooledHead) and head.spec.kind in AFFINE_KINDS


@torch.no_grad()
def affine_of(head: Head) -> tuple[Tensor, Tensor]:
    """Return weight [out_dim, in_dim] and bias [out_dim] of a linear or identity head, float64.

    The standardization is folded in.
    """
    assert isinstance(head, PooledHead)
    if isinstance(head.body, nn.Linear):
        return fold_linear(head.body, head.mean, head.deviation)
    identity = nn.Linear(head.in_dim, head.in_dim, bias=False)
    identity.weight.copy_(torch.eye(head.in_dim))
    return fold_linear(identity, head.mean, head.deviation)


def input_shift(weight: Tensor, bias: Tensor, projection: str) -> Tensor:
    """Return the shortest shift c of the input with weight @ c = bias, float64 [in_dim].

    A layer without bias then computes weight @ (x + c), if the last layer before it adds c.

    Args:
        weight: float64 [out_dim, in_dim].
        bias: float64 [out_dim].
        projection: its name, for the message.

    Raises:
        RunError: no shift gives this bias.
    """
    shift: Tensor = torch.linalg.pinv(weight, rtol=1e-10) @ bias
    residual = (weight @ shift - bias).norm()
    if residual > RESIDUAL_TOLERANCE * max(1.0, float(bias.norm())):
        out_dim, in_dim = weight.shape
        raise RunError(
            f"{projection} has no bias in this format, and no shift of its {in_dim} inputs gives "
            f"the {out_dim} biases of the head (they miss by {float(residual):.2g}); export with "
            "--to sentence-transformers or --to onnx"
        )
    return shift
