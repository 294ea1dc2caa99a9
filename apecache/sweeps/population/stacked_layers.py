"""Layers of members side by side, with written-out forward and backward passes.

A small head spends as long in autograd and in fresh memory as in its products.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apecache.heads.pooled import FuseMixBlock, GatedUnit, ResidualBlock
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.stacked_parameter import StackedParameter

_ATEN = torch.ops.aten


class StackedLayer(Protocol):
    """Map [k, n, …] to [k, n, …], with the gradients written out."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        """Add the gradients of the parameters, and return the gradient of the input.

        Called once after a `forward`. Without `by_input` the returned tensor has no meaning.
        """


def stack_layer(
    modules: Sequence[Any],
    streams: MemberGenerators | None,
    joined: list[StackedParameter],
) -> StackedLayer:
    """Stack the same module of every member; its parameters are added to `joined`."""

    def inner(get: Callable[[Any], nn.Module]) -> StackedLayer:
        inner_modules = [get(module) for module in modules]
        return stack_layer(inner_modules, streams, joined)

    match modules[0]:
        case nn.Linear():
            return _Linear(modules, joined)
        case nn.LayerNorm():
            return _LayerNorm(modules, joined)
        case nn.BatchNorm1d():
            return _BatchNorm(modules, joined)
        case nn.Dropout():
            return StackedDropout(modules, streams)
        case nn.ReLU():
            return _Relu()
        case nn.GELU():
            return _Gelu()
        case nn.Sequential():
            layers = []
            for same_layer in zip(*modules, strict=True):
                layers.append(stack_layer(same_layer, streams, joined))
            return _Chain(layers)
        case ResidualBlock() | FuseMixBlock():
            return _Residual(inner(lambda block: block.branch))
        case GatedUnit():
            return _Gated(
                norm=inner(lambda unit: unit.norm),
                gate=inner(lambda unit: unit.gate),
                value=inner(lambda unit: unit.value),
                dropout=inner(lambda unit: unit.dropout),
                last=inner(lambda unit: unit.last),
            )
    return _Chain([])


def _join(modules: Sequence[Any], name: str, joined: list[StackedParameter]) -> StackedParameter:
    stack = StackedParameter([getattr(module, name) for module in modules])
    joined.append(stack)
    return stack


class _Chain:
    def __init__(self, layers: Sequence[StackedLayer]) -> None:
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        for i in reversed(range(len(self.layers))):
            gradient = self.layers[i].backward(gradient, by_input or i > 0)
        return gradient


class _Residual:
    def __init__(self, branch: StackedLayer) -> None:
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch.forward(x)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        before = self.branch.backward(gradient, by_input)
        return before.add_(gradient) if by_input else gradient


class _Gated:
    def __init__(
        self,
        norm: StackedLayer,
        gate: StackedLayer,
        value: StackedLayer,
        dropout: StackedLayer,
        last: StackedLayer,
    ) -> None:
        self.norm = norm
        self.gate = gate
        self.value = value
        self.rest = _Chain([dropout, last])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm.forward(x)
        self.opened = self.gate.forward(x)
        self.valued = self.value.forward(x)
        gated = self.opened.clamp(0, 6) * self.valued
        return self.rest.forward(gated)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        gradient = self.rest.backward(gradient, True)
        by_gate = gradient * self.valued
        # The clamp of the forward pass lets no gradient through outside of 0 to 6.
        by_gate.mul_((self.opened > 0) & (self.opened < 6))
        before = self.gate.backward(by_gate, True)
        before = before + self.value.backward(gradient * self.opened.clamp_(0, 6), True)
        return self.norm.backward(before, by_input)


class _Linear:
    def __init__(self, modules: Sequence[Any], joined: list[StackedParameter]) -> None:
        self.weight = _join(modules, "weight", joined)
        self.bias = None if modules[0].bias is None else _join(modules, "bias", joined)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        weight = self.weight.value.mT
        if self.bias is None:
            return torch.bmm(x, weight)
        bias = self.bias.value.unsqueeze(1)
        return torch.baddbmm(bias, x, weight)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        self.weight.add_product(gradient.mT, self.x)
        if self.bias is not None:
            self.bias.add(gradient.sum(1))
        return torch.bmm(gradient, self.weight.value) if by_input else gradient


class _LayerNorm:
    def __init__(self, modules: Sequence[Any], joined: list[StackedParameter]) -> None:
        self.weight = _join(modules, "weight", joined)
        self.bias = _join(modules, "bias", joined)
        self.shape = modules[0].normalized_shape
        self.eps = modules[0].eps

    def forward(self, x: Tensor) -> Tensor:
        # Without weight and bias, which differ between members.
        normed, *statistics = torch.native_layer_norm(
            x,
            normalized_shape=self.shape,
            weight=None,
            bias=None,
            eps=self.eps,
        )
        self.x = x
        self.normed = normed
        self.statistics = statistics
        weight = self.weight.value.unsqueeze(1)
        bias = self.bias.value.unsqueeze(1)
        return torch.addcmul(bias, normed, weight)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        self.weight.add((gradient * self.normed).sum(1))
        self.bias.add(gradient.sum(1))
        if not by_input:
            return gradient
        scaled = gradient * self.weight.value.unsqueeze(1)
        before: Tensor = _ATEN.native_layer_norm_backward(
            scaled,
            self.x,
            self.shape,
            *self.statistics,
            None,
            None,
            [True, False, False],
        )[0]
        return before


class _BatchNorm:
    """Normalize the features of all members side by side, and keep their running statistics."""

    def __init__(self, modules: Sequence[Any], joined: list[StackedParameter]) -> None:
        self.weight = _join(modules, "weight", joined)
        self.bias = _join(modules, "bias", joined)
        self.parts = list(modules)
        self.eps = modules[0].eps
        self.momentum = modules[0].momentum

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.transpose(0, 1).flatten(1)
        running_mean = torch.cat([module.running_mean for module in self.parts])
        running_variance = torch.cat([module.running_var for module in self.parts])
        y, *self.batch = torch.native_batch_norm(
            self.x,
            weight=self.weight.value.flatten(),
            bias=self.bias.value.flatten(),
            running_mean=running_mean,
            running_var=running_variance,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        means = running_mean.chunk(len(x))
        variances = running_variance.chunk(len(x))
        # `cat` made copies, which native_batch_norm has updated.
        for module, mean, variance in zip(self.parts, means, variances, strict=True):
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            module.num_batches_tracked.add_(1)
        stacked: Tensor = y.unflatten(1, (len(x), -1)).transpose(0, 1)
        return stacked

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        k = len(self.parts)
        mask = [by_input, True, True]
        beside = gradient.transpose(0, 1).flatten(1)
        saved = (beside, self.x, self.weight.value.flatten(), None, None, *self.batch)
        before, weight, bias = _ATEN.native_batch_norm_backward(*saved, True, self.eps, mask)
        self.weight.add(weight.unflatten(0, (k, -1)))
        self.bias.add(bias.unflatten(0, (k, -1)))
        return before.unflatten(1, (k, -1)).transpose(0, 1) if by_input else gradient


class _Relu:
    def forward(self, x: Tensor) -> Tensor:
        self.y = x.relu()
        return self.y

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        before: Tensor = _ATEN.threshold_backward(gradient, self.y, 0)
        return before


class _Gelu:
    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return torch.nn.functional.gelu(x)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        before: Tensor = _ATEN.gelu_backward(gradient, self.x)
        return before


class StackedDropout:
    """Draw each member's mask from its own numbers, as `nn.Dropout` draws it.

    Without generators of the members one draw gives the masks of all.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        streams: MemberGenerators | None,
    ) -> None:
        self.rates = [module.p for module in modules]
        self.streams = streams
        self.kept_shares = torch.tensor([1 - rate for rate in self.rates]).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not any(self.rates):
            return x
        if self.streams is None:
            self.kept_shares = self.kept_shares.to(x.device)
            self.masks = torch.empty_like(x).bernoulli_(self.kept_shares).div_(self.kept_shares)
        else:
            ones = x.new_ones(x.shape[1:])
            masks = [self._mask(self.streams, i, ones) for i in range(len(self.rates))]
            # A group of one needs no copy.
            self.masks = torch.stack(masks) if len(masks) > 1 else masks[0].unsqueeze(0)
        return x * self.masks

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        return gradient * self.masks if by_input and any(self.rates) else gradient

    def _mask(self, streams: MemberGenerators, member: int, ones: Tensor) -> Tensor:
        if not self.rates[member]:
            return ones
        with streams.use(member):
            return torch.nn.functional.dropout(ones, self.rates[member])
