"""A head's standardisation worked into its linear layers: the same embeddings of features as they
come."""

import copy

import torch
from torch import Tensor, nn

from apecache.heads.head import Head, SeveralHeads
from apecache.heads.pooled import PooledHead


@torch.no_grad()
def folded(head: Head) -> Head:
    """A copy that does not standardise and embeds the same, up to rounding. (In training input
    dropout then zeroes features, where it gave them their mean.)

    Raises:
        ValueError: the head standardises, and what comes first in it is not linear.
    """
    made = copy.deepcopy(head)
    parts = [(spec.model_copy(update={"standardise": False})) for spec in head.spec.parts]
    made.spec = head.spec.model_copy(update={"standardise": False, "parts": tuple(parts)})
    if isinstance(made, SeveralHeads):
        made.parts = nn.ModuleList(folded(part) for part in made.parts if isinstance(part, Head))
    elif standardises(head):
        _fold(made)
    made.mean.zero_()
    made.deviation.fill_(1.0)
    return made


def standardises(head: Head) -> bool:
    return bool(head.mean.any() or (head.deviation != 1).any())


def fold_linear(layer: nn.Linear, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias), float64, that give of x what `layer` gives of (x - mean) / deviation."""
    weight = layer.weight.double() / deviation.double()
    offset = weight @ mean.double()
    return weight, -offset if layer.bias is None else layer.bias.double() - offset


def _fold(head: Head) -> None:
    """A direct way has no bias, so its constant goes to the last layer's."""
    if not isinstance(head, PooledHead) or head.spec.kind not in ("linear", "mlp"):
        raise ValueError(f"a head of kind {head.spec.kind} cannot take up its standardisation")
    layers = [head.body] if isinstance(head.body, nn.Linear) else [head.body[0], head.body[-1]]  # type: ignore[index]
    _set(layers[0], *fold_linear(layers[0], head.mean, head.deviation))
    if head.direct is not None:
        weight, offset = fold_linear(head.direct, head.mean, head.deviation)
        head.direct.weight.copy_(weight)
        layers[-1].bias += offset


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
