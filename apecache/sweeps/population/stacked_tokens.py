"""Heads on tokens of several members, trained side by side.

The members' rows follow one another in one batch, [k * n, tokens, dim]. What has no parameters,
such as attention and pooling, treats each row alone, so that the heads' own code runs. Only layers
with parameters tell the members apart: their weights are [k, …] and their products are batched.
Autograd makes the gradients: the operations on tokens take longer than autograd itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from apecache.heads.normalization import normalize, without_autocast
from apecache.heads.tokens import (
    Anchors,
    AttentionPool,
    FreezeAlign,
    PatchProjector,
    Projector,
    SelfAttention,
    TokenHead,
    Transformer,
    TransformerBlock,
)
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.stacked_layers import StackedDropout
from apecache.sweeps.population.stacked_parameter import StackedParameter

TOKEN_SHELLS = (
    TokenHead,
    Transformer,
    TransformerBlock,
    SelfAttention,
    AttentionPool,
    Anchors,
    Projector,
    PatchProjector,
    FreezeAlign,
    nn.ModuleDict,
)
"""Modules of heads on tokens that stack, besides their layers."""


class StackedTokenHead:
    """Embed tokens [k, n, tokens, in_dim] as float32 [k, n, out_dim], L2-normalized.

    Args:
        heads: The heads of the members, of one structure.
        streams: The random states of the members, which draw their masks; None: one draw of
            torch's own generator is the masks of all members.
        joined: The stacked parameters are added to it.
    """

    def __init__(
        self,
        heads: Sequence[TokenHead],
        streams: MemberGenerators | None,
        joined: list[StackedParameter],
    ) -> None:
        first = heads[0]
        # Without memory: its parameters are those of the stacks.
        with torch.device("meta"):
            self.folded = _FoldedHead(first.spec, first.in_dim, first.out_dim)
        self.folded.means = torch.stack([head.mean for head in heads])[:, None, None]
        self.folded.deviations = torch.stack([head.deviation for head in heads])[:, None, None]
        _fold(self.folded, heads, streams)
        modules = [dict(head.named_parameters()) for head in heads]
        self.stacks: dict[str, StackedParameter] = {}
        for name in modules[0]:
            self.stacks[name] = StackedParameter([parameters[name] for parameters in modules])
        joined.extend(self.stacks.values())

    def forward(self, features: Tensor, mask: Tensor | None, standardized: bool) -> Tensor:
        n_members = len(features)
        self.leaves: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            self.leaves[name] = stack.value.detach().requires_grad_(stack.trained)
        self.folded.is_standardized = standardized
        rows = features.flatten(0, 1)
        row_mask = None if mask is None else mask.flatten(0, 1)
        with torch.enable_grad():
            embedded = functional_call(self.folded, self.leaves, (rows, row_mask))
            self.embedded: Tensor = embedded.unflatten(0, (n_members, -1))
        detached: Tensor = self.embedded.detach()
        return detached

    def backward(self, gradient: Tensor) -> None:
        trained = [name for name, stack in self.stacks.items() if stack.trained]
        leaves = [self.leaves[name] for name in trained]
        if leaves:
            gradients = torch.autograd.grad(self.embedded, leaves, gradient)
            for name, leaf_gradient in zip(trained, gradients, strict=True):
                self.stacks[name].add(leaf_gradient)
        # The graph holds the activations.
        del self.embedded
        del self.leaves


class _FoldedHead(TokenHead):
    """Standardize rows of several members, [k * n, tokens, dim]."""

    means: Tensor
    """[k, 1, 1, dim]."""
    deviations: Tensor
    """[k, 1, 1, dim]."""
    is_standardized = False

    def _build_body(self) -> nn.Module:
        match self.spec.kind:
            case "attention":
                return _FoldedAttentionPool(self.spec, self.in_dim, self.out_dim)
            case "anchors":
                return _FoldedAnchors(self.spec, self.in_dim, self.out_dim)
        return super()._build_body()

    def standardized(self, features: Tensor) -> Tensor:
        x = features.float()
        if not self.is_standardized:
            centered = x.unflatten(0, (len(self.means), -1)).sub(self.means)
            x = centered.div_(self.deviations).flatten(0, 1)
        dropped: Tensor = self.input_dropout(x)
        return dropped


class _FoldedLinear(nn.Linear):
    """Map [k * n, …, in] to [k * n, …, out] by weights [k, out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's types do not know that a layer may be without a bias.
        bias: Tensor | None = self.bias
        if len(self.weight) == 1:
            return F.linear(x, self.weight.squeeze(0), None if bias is None else bias.squeeze(0))
        rows = _by_member(x, self.weight)
        weight = self.weight.mT
        if bias is None:
            y = torch.bmm(rows, weight)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), rows, weight)
        return y.view(*x.shape[:-1], -1)


class _FoldedNorm(nn.LayerNorm):
    """Normalize [k * n, …, dim], then scale and shift by weights and biases [k, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:
            # One pass over the tokens instead of three.
            return F.layer_norm(
                x,
                self.normalized_shape,
                weight=self.weight.squeeze(0),
                bias=self.bias.squeeze(0),
                eps=self.eps,
            )
        normed = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        rows = _by_member(normed, self.weight)
        y = torch.addcmul(self.bias.unsqueeze(1), rows, self.weight.unsqueeze(1))
        return y.view(x.shape)


class _FoldedDropout(nn.Module):
    """Draw each member's mask of [k * n, …, dim] as `StackedDropout` does."""

    def __init__(self, modules: Sequence[nn.Module], streams: MemberGenerators | None) -> None:
        super().__init__()
        self.dropout = StackedDropout(modules, streams)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.dropout.rates), -1, x.shape[-1])
        return self.dropout.forward(rows).view(x.shape)


class _FoldedAttentionPool(AttentionPool):
    """Attend with the query [k, dim] of each row's member."""

    def _queries(self, n: int) -> Tensor:
        n_members = len(self.query)
        return self.query.unsqueeze(1).expand(-1, n // n_members, -1).reshape(n, 1, -1)


class _FoldedAnchors(Anchors):
    """Compare tokens with the anchors [k, out, dim] of their row's member."""

    def _scores(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            rows = _by_member(normalize(x), self.anchors)
            scores = torch.bmm(rows, normalize(self.anchors).mT)
        return scores.view(*x.shape[:-1], -1)

    def _scales(self, n: int) -> Tensor:
        n_members = len(self.log_scale)
        scales = self.log_scale.exp().unsqueeze(1).expand(-1, n // n_members)
        return scales.reshape(n, 1, 1)


def _by_member(x: Tensor, weights: Tensor) -> Tensor:
    """Reshape [k * n, …, dim] -> [k, rows, dim] for weights [k, …]."""
    return x.reshape(len(weights), -1, x.shape[-1])


def _fold(
    module: nn.Module,
    same_modules: Sequence[nn.Module],
    streams: MemberGenerators | None,
) -> None:
    """Replace the layers within a module of no memory by those that tell members apart.

    Args:
        module: Changed in place.
        same_modules: The same module of each member.
        streams: As of `StackedTokenHead`.
    """
    for name, child in list(module.named_children()):
        same_children = [same_module.get_submodule(name) for same_module in same_modules]
        folded = _folded(child, same_children, streams)
        if folded is None:
            folded = child
            _fold(child, same_children, streams)
        setattr(module, name, folded)


def _folded(
    module: nn.Module,
    same_modules: Sequence[Any],
    streams: MemberGenerators | None,
) -> nn.Module | None:
    """Return the layer that tells members apart; None for a module that is no layer."""
    match module:
        case nn.Linear():
            return _FoldedLinear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                device="meta",
            )
        case nn.LayerNorm():
            return _FoldedNorm(module.normalized_shape, eps=module.eps, device="meta")
        case nn.Dropout():
            return _FoldedDropout(same_modules, streams)
    return None
