"""Fold a head's standardization into its linear layers, so that raw features embed the same."""

import copy

import torch
from torch import Tensor, nn

from apecache.heads.head import EnsembleHead, Head
from apecache.heads.pooled import Canonical, PooledHead


@torch.no_grad()
def folded(head: Head) -> Head:
    """Return a copy that does not standardize and embeds the same, up to rounding.

    In training, input dropout on the copy sets a feature to zero. On the original it sets the
    feature to its mean.

    Raises:
        ValueError: the head standardizes, and its first layer is not linear.
    """
    copied = copy.deepcopy(head)
    part_specs = [spec.model_copy(update={"standardize": False}) for spec in head.spec.parts]
    copied.spec = head.spec.model_copy(update={"standardize": False, "parts": tuple(part_specs)})
    if isinstance(copied, EnsembleHead):
        part_heads = [module for module in copied.parts if isinstance(module, Head)]
        copied.parts = nn.ModuleList([folded(part_head) for part_head in part_heads])
    elif standardizes(head):
        _fold(copied)
    copied.mean.zero_()
    copied.deviation.fill_(1.0)
    return copied


def standardizes(head: Head) -> bool:
    """Return whether the mean or deviation of a head changes its input."""
    return bool(head.mean.any() or (head.deviation != 1).any())


def fold_linear(layer: nn.Linear, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the layer that maps x to what `layer` maps (x - mean) / deviation to.

    Returns:
        Weight and bias, float64.
    """
    # In float64: a small deviation makes large weights, and their rounding would show.
    weight = layer.weight.double() / deviation.double()
    offset = weight @ mean.double()
    bias = -offset if layer.bias is None else layer.bias.double() - offset
    return weight, bias


def _fold(head: Head) -> None:
    """Fold the standardization of a linear or MLP head, in place."""
    if not isinstance(head, PooledHead) or head.spec.kind not in ("linear", "mlp", "canonical"):
        raise ValueError(f"a head of kind {head.spec.kind} cannot take up its standardization")
    if head.join is not None:
        raise ValueError(f"a head with join {head.spec.join} cannot take up its standardization")
    layers = _ends(head.body)
    weight, bias = fold_linear(layers[0], head.mean, head.deviation)
    _set(layers[0], weight, bias)
    if head.direct is not None:
        weight, offset = fold_linear(head.direct, head.mean, head.deviation)
        head.direct.weight.copy_(weight)
        # The direct map has no bias, so its constant goes to the bias of the last layer.
        layers[-1].bias.add_(offset)


def _ends(body: nn.Module) -> list[nn.Linear]:
    """Return the first and the last linear layer of a body; one that is both once."""
    if isinstance(body, nn.Linear):
        return [body]
    if isinstance(body, Canonical):
        return [body.linear]
    return [body[0], body[-1]]  # type: ignore[index]


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
