"""Write a head as a chain of sentence-transformers' own modules."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apecache.errors import RunError
from apecache.export.affine import affine_of, is_affine
from apecache.heads.fold import fold_linear
from apecache.heads.head import Head
from apecache.heads.pooled import ACTIVATIONS, PooledHead

CHAINED_HEADS = "linear, identity, and mlp with residual = false and skip = false"
"""Heads without a second path from input to output: a module of the library has one input."""


def head_modules(head: Head | None, side: str) -> list[nn.Module]:
    """Return Dense and LayerNorm modules that compute the head before its normalization.

    Raises:
        RunError: the head has more than one path from input to output, or takes tokens.
    """
    if head is not None and is_affine(head):
        weight, bias = affine_of(head)
        return [_dense(weight, bias)]
    if _is_chain(head):
        return list(_mlp_modules(head))  # type: ignore[arg-type]
    name = "trained with its encoder" if head is None else f"of kind {head.spec.kind}"
    raise RunError(
        f"the {side} head is {name}; a sentence-transformers folder can hold {CHAINED_HEADS}; "
        "export others with --to onnx, or use apecache.open_clip_triple"
    )


def _is_chain(head: Head | None) -> bool:
    is_mlp = isinstance(head, PooledHead) and head.spec.kind == "mlp"
    return is_mlp and not head.spec.residual and head.direct is None  # type: ignore[union-attr]


@torch.no_grad()
def _mlp_modules(head: PooledHead) -> Iterator[nn.Module]:
    """Yield the layers of an MLP. A batch norm is folded into the layer before it."""
    assert isinstance(head.body, nn.Sequential)
    layers = list(head.body)
    *hidden, last = layers
    activation = ACTIVATIONS[head.spec.activation]
    # Each layer is four modules: linear, norm, activation, dropout, which does nothing here.
    for number in range(0, len(hidden), 4):
        linear, norm = hidden[number], hidden[number + 1]
        assert isinstance(linear, nn.Linear)
        # Only the first layer sees features, so it alone takes up the standardization.
        if number == 0:
            weight, bias = fold_linear(linear, head.mean, head.deviation)
        else:
            weight, bias = linear.weight.double(), linear.bias.double()
        match norm:
            case nn.LayerNorm():
                yield _dense(weight, bias)
                yield _layer_norm(norm)
                # The library's norm has no activation: a Dense of the identity brings it.
                identity = torch.eye(len(bias), dtype=torch.float64)
                yield _dense(identity, torch.zeros_like(bias), activation())
            case nn.BatchNorm1d():
                weight, bias = _fold_batch_norm(weight, bias, norm)
                yield _dense(weight, bias, activation())
            case _:
                yield _dense(weight, bias, activation())
    assert isinstance(last, nn.Linear)
    yield _dense(last.weight.double(), last.bias.double())


def _fold_batch_norm(weight: Tensor, bias: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return the linear layer followed by its batch norm in evaluation mode as one layer."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    folded_bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    return weight * scale.unsqueeze(1), folded_bias


@torch.no_grad()
def _dense(weight: Tensor, bias: Tensor, activation: nn.Module | None = None) -> nn.Module:
    """Return act(weight @ x + bias) as a module of the library."""
    from sentence_transformers.sentence_transformer.modules import Dense

    out_dim, in_dim = weight.shape
    dense: Any = Dense(in_dim, out_dim, activation_function=activation or nn.Identity())
    dense.linear.weight.copy_(weight)
    dense.linear.bias.copy_(bias)
    return dense  # type: ignore[no-any-return]


@torch.no_grad()
def _layer_norm(norm: nn.LayerNorm) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    module: Any = LayerNorm(norm.normalized_shape[0])
    module.norm.load_state_dict(norm.state_dict())
    return module  # type: ignore[no-any-return]
