"""Heads of one structure trained side by side: weights stacked [k, …], products batched.

The parameters of the members become views of the stacks, and so do their gradients. Heads on pooled
features have written-out gradients (`stacked_layers`), heads on tokens those of autograd
(`stacked_tokens`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apecache.heads.head import EnsembleHead, Head
from apecache.heads.pooled import FuseMixBlock, GatedUnit, PooledHead, ResidualBlock
from apecache.heads.tokens import TokenHead
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.stacked_layers import StackedLayer, stack_layer
from apecache.sweeps.population.stacked_parameter import StackedParameter
from apecache.sweeps.population.stacked_tokens import TOKEN_SHELLS, StackedTokenHead

_LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU)
_SHELLS = (
    PooledHead,
    EnsembleHead,
    ResidualBlock,
    FuseMixBlock,
    GatedUnit,
    nn.Sequential,
    nn.ModuleList,
    *TOKEN_SHELLS,
)


def structure_of(head: Head) -> tuple[object, ...] | None:
    """Return a value that is equal for heads that stack with one another; None for any other."""
    modules: list[tuple[object, ...]] = []
    for name, module in head.named_modules():
        if not isinstance(module, (*_LAYERS, *_SHELLS)):
            return None
        # The modules of a registered head do not say how it calls them.
        if isinstance(module, Head) and module.spec.kind == "custom":
            return None
        modules.append((name, type(module).__name__))
        # Heads that attend or pool in another way may have the same parameters.
        if isinstance(module, TokenHead):
            modules.append((name, module.spec.pooling, module.spec.n_heads))
    parameters = []
    for name, parameter in head.named_parameters():
        parameters.append((name, tuple(parameter.shape), parameter.requires_grad))
    return tuple(modules), tuple(parameters)


class StackedHeads:
    """Embed features [k, n, in_dim] as float32 [k, n, out_dim], L2-normalized.

    Heads on tokens take features [k, n, tokens, in_dim]. Member i sees features[i].
    """

    def __init__(self, heads: Sequence[Head], streams: MemberGenerators | None) -> None:
        """Stack heads of one structure.

        Args:
            heads: The heads of the members.
            streams: The random states of the members, which draw their masks; None: one draw of
                torch's own generator is the masks of all members.
        """
        self.joined: list[StackedParameter] = []
        self._head = _head(heads, streams, self.joined)

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        standardized: bool = False,
    ) -> Tensor:
        """Embed features.

        Args:
            features: As described above.
            mask: bool [k, n, tokens], the valid tokens; None: all, or pooled features.
            standardized: Whether features are standardized already.
        """
        return self._head.forward(features, mask, standardized)

    def backward(self, gradient: Tensor) -> None:
        """Add to the gradients of the parameters, from that of the last output [k, n, out_dim]."""
        self._head.backward(gradient)

    def forget(self) -> None:
        """Begin a step: its first gradients replace the old ones."""
        for stack in self.joined:
            stack.fresh = True

    def release(self) -> None:
        """Give every member memory of its own. Call it last."""
        for stack in self.joined:
            stack.release()


def _head(
    heads: Sequence[Any],
    streams: MemberGenerators | None,
    joined: list[StackedParameter],
) -> "_Pooled | _Ensemble | StackedTokenHead":
    if isinstance(heads[0], TokenHead):
        return StackedTokenHead(heads, streams, joined)
    if not isinstance(heads[0], EnsembleHead):
        return _Pooled(heads, streams, joined)
    stacked_parts = []
    for same_part in zip(*(head.parts for head in heads), strict=True):
        stacked_parts.append(_head(same_part, streams, joined))
    return _Ensemble(stacked_parts, heads)


class _Pooled:
    def __init__(
        self,
        heads: Sequence[Any],
        streams: MemberGenerators | None,
        joined: list[StackedParameter],
    ) -> None:
        self.mean = torch.stack([head.mean for head in heads]).unsqueeze(1)
        self.deviation = torch.stack([head.deviation for head in heads]).unsqueeze(1)

        def stacked(get: Callable[[Any], nn.Module]) -> StackedLayer:
            modules = [get(head) for head in heads]
            return stack_layer(modules, streams, joined)

        self.dropout = stacked(lambda head: head.input_dropout)
        self.body = stacked(lambda head: head.body)
        self.direct = None if heads[0].direct is None else stacked(lambda head: head.direct)

    def forward(self, features: Tensor, mask: Tensor | None, standardized: bool) -> Tensor:
        if not standardized:
            features = features.float().sub(self.mean).div_(self.deviation)
        x = self.dropout.forward(features)
        y = self.body.forward(x)
        if self.direct is not None:
            y = y + self.direct.forward(x)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        # The bound of torch's `normalize`, for a vector of zeros.
        self.length = norm.clamp_min_(1e-12)
        embedded: Tensor = y / self.length
        self.embedded = embedded
        return embedded

    def backward(self, gradient: Tensor) -> None:
        # Of the gradient only what is perpendicular to the embedding changes a normalized vector.
        along = (gradient * self.embedded).sum(-1, keepdim=True)
        across = torch.addcmul(gradient, self.embedded, along, value=-1)
        before = across.div_(self.length)
        self.body.backward(before, False)
        if self.direct is not None:
            self.direct.backward(before, False)
        del self.embedded


class _Ensemble:
    def __init__(
        self,
        parts: list["_Pooled | _Ensemble | StackedTokenHead"],
        heads: Sequence[EnsembleHead],
    ) -> None:
        self.parts = parts
        self.widths = heads[0].widths

    def forward(self, features: Tensor, mask: Tensor | None, standardized: bool) -> Tensor:
        embeddings = [head.forward(features, mask, standardized) for head in self.parts]
        # Each has length 1: together they have the square root of their number.
        return torch.cat(embeddings, -1).div_(len(self.parts) ** 0.5)

    def backward(self, gradient: Tensor) -> None:
        scaled = gradient / len(self.parts) ** 0.5
        gradients = scaled.split(self.widths, -1)
        for head, head_gradient in zip(self.parts, gradients, strict=True):
            head.backward(head_gradient)
