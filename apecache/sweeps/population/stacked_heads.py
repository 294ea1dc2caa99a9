"""Heads of one structure trained side by side: weights stacked [k, …], products batched.

The parameters of the members become views of the stacks, and so do their gradients: an update of
one is an update of the other. Forward and backward passes are written out, because a small head
spends as long in autograd and in fresh memory as in its products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apecache.device import (
    generator_states,
    kept_generators,
    seeded_generators,
    set_generator_states,
)
from apecache.heads.head import EnsembleHead, Head
from apecache.heads.pooled import FuseMixBlock, GatedUnit, PooledHead, ResidualBlock

_LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU)
_SHELLS = (
    PooledHead,
    EnsembleHead,
    ResidualBlock,
    FuseMixBlock,
    GatedUnit,
    nn.Sequential,
    nn.ModuleList,
)
_ATEN = torch.ops.aten


class MemberGenerators:
    """Hold random states of torch's own generators, one for each member.

    Args:
        states: For each member what `generator_states` returned.
        device: The device that members train on.
    """

    def __init__(self, states: list[list[Tensor]], device: torch.device) -> None:
        self.states = states
        self.device = device

    @staticmethod
    def seeded(seeds: Sequence[int], device: torch.device) -> "MemberGenerators":
        """Make a state from each seed; the generators of the caller stay unchanged."""
        streams = MemberGenerators([], device)
        for seed in seeds:
            with seeded_generators(seed, device):
                streams.states.append(generator_states(device))
        return streams

    def of(self, members: Sequence[int]) -> "MemberGenerators":
        """Return the states of some members. They are shared with these streams, not copied."""
        states = [self.states[i] for i in members]
        return MemberGenerators(states, self.device)

    @contextmanager
    def use(self, member: int) -> Iterator[None]:
        """Let torch draw this member's numbers; the state that torch had before is lost."""
        state = self.states[member]
        set_generator_states(state, self.device)
        yield
        # In place: streams made by `of` share this list.
        state[:] = generator_states(self.device)

    @contextmanager
    def alone(self, member: int) -> Iterator[None]:
        """Do what `use` does, and restore the state that torch had before."""
        with kept_generators(self.device), self.use(member):
            yield


def structure_of(head: Head) -> tuple[object, ...] | None:
    """Return a value that is equal for heads that stack with one another; None for any other."""
    modules = []
    for name, module in head.named_modules():
        if not isinstance(module, (*_LAYERS, *_SHELLS)):
            return None
        # The modules of a registered head do not say how it calls them.
        if isinstance(module, Head) and module.spec.kind == "custom":
            return None
        modules.append((name, type(module).__name__))
    parameters = []
    for name, parameter in head.named_parameters():
        parameters.append((name, tuple(parameter.shape), parameter.requires_grad))
    return tuple(modules), tuple(parameters)


class StackedParameter:
    """Hold a parameter of all members [k, …] and its gradient; the members have views of both.

    The first gradient after `StackedHeads.forget` replaces the old one; later ones are added.
    """

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = members
        self.value = torch.stack([member.detach() for member in members])
        self.trained = members[0].requires_grad
        self.fresh = True
        self.gradient = torch.zeros_like(self.value) if self.trained else None
        for i, member in enumerate(members):
            member.data = self.value[i]
            member.grad = None if self.gradient is None else self.gradient[i]

    def add(self, gradient: Tensor) -> None:
        """Add a gradient [k, …]."""
        if self.gradient is None:
            return
        if self.fresh:
            self.gradient.copy_(gradient)
        else:
            self.gradient.add_(gradient)
        self.fresh = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the gradient `left @ right`, member by member, without a tensor for the product."""
        if self.gradient is None:
            return
        # With beta 0 the old gradient is not read, so that nothing has to be set to zero.
        beta = 0 if self.fresh else 1
        torch.baddbmm(self.gradient, left, right, beta=beta, out=self.gradient)
        self.fresh = False

    def move(self, value: Tensor, gradient: Tensor) -> None:
        """Move a trained parameter and its gradient to other memory of the same shape."""
        value.copy_(self.value)
        self.value = value
        self.gradient = gradient
        for i, member in enumerate(self.members):
            member.data = value[i]
            member.grad = gradient[i]

    def release(self) -> None:
        """Give members memory of their own."""
        for member in self.members:
            member.data = member.data.clone()
            member.grad = None


class _Layer(Protocol):
    """Map [k, n, …] to [k, n, …], with the gradients written out."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        """Add the gradients of the parameters, and return the gradient of the input.

        Called once after a `forward`. Without `by_input` the returned tensor has no meaning.
        """


class StackedHeads:
    """Embed features [k, n, in_dim] as float32 [k, n, out_dim], L2-normalized.

    Member i sees features[i].
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

    def forward(self, features: Tensor, standardized: bool = False) -> Tensor:
        """Embed features; `standardized` says that they are standardized already."""
        return self._head.forward(features, standardized)

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
) -> "_Pooled | _Ensemble":
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

        def stacked(get: Callable[[Any], nn.Module]) -> _Layer:
            modules = [get(head) for head in heads]
            return _layer(modules, streams, joined)

        self.dropout = stacked(lambda head: head.input_dropout)
        self.body = stacked(lambda head: head.body)
        self.direct = None if heads[0].direct is None else stacked(lambda head: head.direct)

    def forward(self, features: Tensor, standardized: bool) -> Tensor:
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
    def __init__(self, parts: list["_Pooled | _Ensemble"], heads: Sequence[EnsembleHead]) -> None:
        self.parts = parts
        self.widths = heads[0].widths

    def forward(self, features: Tensor, standardized: bool) -> Tensor:
        embeddings = [head.forward(features, standardized) for head in self.parts]
        # Each has length 1: together they have the square root of their number.
        return torch.cat(embeddings, -1).div_(len(self.parts) ** 0.5)

    def backward(self, gradient: Tensor) -> None:
        scaled = gradient / len(self.parts) ** 0.5
        gradients = scaled.split(self.widths, -1)
        for head, head_gradient in zip(self.parts, gradients, strict=True):
            head.backward(head_gradient)


def _layer(
    modules: Sequence[Any],
    streams: MemberGenerators | None,
    joined: list[StackedParameter],
) -> _Layer:
    """Stack the same module of every member; its parameters are added to `joined`."""

    def inner(get: Callable[[Any], nn.Module]) -> _Layer:
        inner_modules = [get(module) for module in modules]
        return _layer(inner_modules, streams, joined)

    match modules[0]:
        case nn.Linear():
            return _Linear(modules, joined)
        case nn.LayerNorm():
            return _LayerNorm(modules, joined)
        case nn.BatchNorm1d():
            return _BatchNorm(modules, joined)
        case nn.Dropout():
            return _Dropout(modules, streams)
        case nn.ReLU():
            return _Relu()
        case nn.GELU():
            return _Gelu()
        case nn.Sequential():
            layers = []
            for same_layer in zip(*modules, strict=True):
                layers.append(_layer(same_layer, streams, joined))
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
    def __init__(self, layers: Sequence[_Layer]) -> None:
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
    def __init__(self, branch: _Layer) -> None:
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch.forward(x)

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        before = self.branch.backward(gradient, by_input)
        return before.add_(gradient) if by_input else gradient


class _Gated:
    def __init__(
        self,
        norm: _Layer,
        gate: _Layer,
        value: _Layer,
        dropout: _Layer,
        last: _Layer,
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


class _Dropout:
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
            self.masks = torch.stack(masks)
        return x * self.masks

    def backward(self, gradient: Tensor, by_input: bool) -> Tensor:
        return gradient * self.masks if by_input and any(self.rates) else gradient

    def _mask(self, streams: MemberGenerators, member: int, ones: Tensor) -> Tensor:
        if not self.rates[member]:
            return ones
        with streams.use(member):
            return torch.nn.functional.dropout(ones, self.rates[member])
