"""Heads of one structure trained side by side: their weights stacked [k, …], their products one
batched product.

The members' own parameters and running statistics become views of the stacks, and so do their
gradients: whatever moves the one moves the other. Forward and backward passes are written out, for
a small head spends as long in autograd and in fresh memory as in its products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apecache.heads.head import Head, SeveralHeads
from apecache.heads.pooled import FuseMixBlock, GatedUnit, PooledHead, ResidualBlock

_LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU)
_SHELLS = (
    PooledHead,
    SeveralHeads,
    ResidualBlock,
    FuseMixBlock,
    GatedUnit,
    nn.Sequential,
    nn.ModuleList,
)
_ATEN = torch.ops.aten


class Streams:
    """Random states of torch's own generators, one for each member; `of` some of them are the same
    ones."""

    def __init__(self, states: list[list[Tensor]], device: torch.device) -> None:
        self.states = states
        self.device = device

    @staticmethod
    def seeded(seeds: Sequence[int], device: torch.device) -> "Streams":
        streams = Streams([], device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for seed in seeds:
                torch.manual_seed(seed)
                streams.states.append(streams._present())
        return streams

    def of(self, members: Sequence[int]) -> "Streams":
        return Streams([self.states[i] for i in members], self.device)

    @contextmanager
    def use(self, member: int) -> Iterator[None]:
        """Within, torch draws this member's numbers. What drew before is not kept."""
        state = self.states[member]
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)
        yield
        state[:] = self._present()

    @contextmanager
    def alone(self, member: int) -> Iterator[None]:
        """As `use`, and what drew before is kept."""
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            self.use(member),
        ):
            yield

    def _present(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


def structure_of(head: Head) -> tuple[object, ...] | None:
    """Equal for heads that can be stacked with one another; None for a head that cannot be stacked
    at all."""
    if not all(isinstance(module, (*_LAYERS, *_SHELLS)) for module in head.modules()):
        return None
    modules = tuple((name, type(module).__name__) for name, module in head.named_modules())
    return modules, tuple(
        (name, tuple(p.shape), p.requires_grad) for name, p in head.named_parameters()
    )


class Stack:
    """A parameter of all members [k, …] and its gradient, of which the members' own are views. The
    first gradient after `forget` replaces what was there, later ones are added."""

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = members
        self.value = torch.stack([member.detach() for member in members])
        self.trained = members[0].requires_grad
        self.fresh = True
        self.gradient = torch.zeros_like(self.value) if self.trained else None
        for place, member in enumerate(members):
            member.data = self.value[place]
            member.grad = None if self.gradient is None else self.gradient[place]

    def add(self, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient.copy_(gradient) if self.fresh else self.gradient.add_(gradient)
            self.fresh = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        if self.gradient is not None:
            torch.baddbmm(
                self.gradient,
                left,
                right,
                beta=0 if self.fresh else 1,
                out=self.gradient,
            )
            self.fresh = False

    def release(self) -> None:
        for member in self.members:
            member.data = member.data.clone()
            member.grad = None


class _Layer(Protocol):
    """[k, n, …] -> [k, n, …]; `backward` is called once after a `forward`, with the gradient of its
    output, and gives that of its input unless it is not `wanted`."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor: ...


class StackedHeads:
    """float [k, n, in_dim] -> float32 [k, n, out_dim], L2-normalised: member i sees features[i]."""

    def __init__(self, heads: Sequence[Head], streams: Streams) -> None:
        self.joined: list[Stack] = []
        self._head = _head(heads, streams, self.joined)

    def forward(self, features: Tensor, standardised: bool = False) -> Tensor:
        """`standardised`: the features are so already."""
        return self._head.forward(features, standardised)

    def backward(self, gradient: Tensor) -> None:
        """Gradient [k, n, out_dim] of the last output -> gradients of the members' parameters."""
        self._head.backward(gradient)

    def forget(self) -> None:
        """A new step begins: its first gradients replace the old ones."""
        for stack in self.joined:
            stack.fresh = True

    def release(self) -> None:
        """Give every member weights of its own again; the stacks may go."""
        for stack in self.joined:
            stack.release()


def _head(heads: Sequence[Any], streams: Streams, joined: list[Stack]) -> "_Pooled | _Several":
    if isinstance(heads[0], SeveralHeads):
        return _Several(
            [
                _head(parts, streams, joined)
                for parts in zip(*(h.parts for h in heads), strict=True)
            ],
            heads,
        )
    return _Pooled(heads, streams, joined)


class _Pooled:
    def __init__(self, heads: Sequence[Any], streams: Streams, joined: list[Stack]) -> None:
        self.mean, self.deviation = (
            torch.stack([getattr(h, n) for h in heads]).unsqueeze(1) for n in ("mean", "deviation")
        )

        def stacked(get: Callable[[Any], nn.Module]) -> _Layer:
            return _layer([get(head) for head in heads], streams, joined)

        self.dropout = stacked(lambda h: h.input_dropout)
        self.body = stacked(lambda h: h.body)
        self.direct = None if heads[0].direct is None else stacked(lambda h: h.direct)

    def forward(self, features: Tensor, standardised: bool) -> Tensor:
        known = features if standardised else features.float().sub(self.mean).div_(self.deviation)
        x = self.dropout.forward(known)
        y = self.body.forward(x)
        if self.direct is not None:
            y = y + self.direct.forward(x)
        self.length = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(1e-12)
        embedded: Tensor = y / self.length
        self.embedded = embedded
        return embedded

    def backward(self, gradient: Tensor) -> None:
        along = (gradient * self.embedded).sum(-1, keepdim=True)
        before = torch.addcmul(gradient, self.embedded, along, value=-1).div_(self.length)
        self.body.backward(before, False)
        if self.direct is not None:
            self.direct.backward(before, False)
        del self.embedded


class _Several:
    def __init__(self, parts: list["_Pooled | _Several"], heads: Sequence[SeveralHeads]) -> None:
        self.parts = parts
        self.widths = heads[0].widths

    def forward(self, features: Tensor, standardised: bool) -> Tensor:
        embedded = torch.cat([part.forward(features, standardised) for part in self.parts], -1)
        return embedded.div_(len(self.parts) ** 0.5)

    def backward(self, gradient: Tensor) -> None:
        for part, own in zip(
            self.parts,
            (gradient / len(self.parts) ** 0.5).split(self.widths, -1),
            strict=True,
        ):
            part.backward(own)


def _layer(parts: Sequence[Any], streams: Streams, joined: list[Stack]) -> _Layer:
    def inner(get: Callable[[Any], nn.Module]) -> _Layer:
        return _layer([get(part) for part in parts], streams, joined)

    match parts[0]:
        case nn.Linear():
            return _Linear(parts, joined)
        case nn.LayerNorm():
            return _LayerNorm(parts, joined)
        case nn.BatchNorm1d():
            return _BatchNorm(parts, joined)
        case nn.Dropout():
            return _Dropout(parts, streams)
        case nn.ReLU():
            return _Relu()
        case nn.GELU():
            return _Gelu()
        case nn.Sequential():
            return _Chain([_layer(same, streams, joined) for same in zip(*parts, strict=True)])
        case ResidualBlock() | FuseMixBlock():
            return _Residual(inner(lambda block: block.branch))
        case GatedUnit():
            names = ("norm", "gate", "value", "dropout", "last")
            return _Gated(*(inner(lambda unit, name=name: getattr(unit, name)) for name in names))  # type: ignore[misc]
    return _Chain([])


def _join(parts: Sequence[Any], name: str, joined: list[Stack]) -> Stack:
    stack = Stack([getattr(part, name) for part in parts])
    joined.append(stack)
    return stack


class _Chain:
    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        for place in reversed(range(len(self.layers))):
            gradient = self.layers[place].backward(gradient, wanted or place > 0)
        return gradient


class _Residual:
    def __init__(self, branch: _Layer) -> None:
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch.forward(x)

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        before = self.branch.backward(gradient, wanted)
        return before.add_(gradient) if wanted else gradient


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
        self.opened, self.valued = self.gate.forward(x), self.value.forward(x)
        return self.rest.forward(self.opened.clamp(0, 6) * self.valued)

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        gradient = self.rest.backward(gradient, True)
        opened = (gradient * self.valued).mul_((self.opened > 0) & (self.opened < 6))
        before = self.gate.backward(opened, True)
        before = before + self.value.backward(gradient * self.opened.clamp_(0, 6), True)
        return self.norm.backward(before, wanted)


class _Linear:
    def __init__(self, parts: Sequence[Any], joined: list[Stack]) -> None:
        self.weight = _join(parts, "weight", joined)
        self.bias = None if parts[0].bias is None else _join(parts, "bias", joined)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        weight = self.weight.value.mT
        return (
            torch.bmm(x, weight)
            if self.bias is None
            else torch.baddbmm(self.bias.value.unsqueeze(1), x, weight)
        )

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        self.weight.add_product(gradient.mT, self.x)
        if self.bias is not None:
            self.bias.add(gradient.sum(1))
        return torch.bmm(gradient, self.weight.value) if wanted else gradient


class _LayerNorm:
    def __init__(self, parts: Sequence[Any], joined: list[Stack]) -> None:
        self.weight = _join(parts, "weight", joined)
        self.bias = _join(parts, "bias", joined)
        self.shape = parts[0].normalized_shape
        self.eps = parts[0].eps

    def forward(self, x: Tensor) -> Tensor:
        normed, *statistics = torch.native_layer_norm(x, self.shape, None, None, self.eps)
        self.x = x
        self.normed = normed
        self.statistics = statistics
        return torch.addcmul(self.bias.value.unsqueeze(1), normed, self.weight.value.unsqueeze(1))

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        self.weight.add((gradient * self.normed).sum(1))
        self.bias.add(gradient.sum(1))
        if not wanted:
            return gradient
        scaled = gradient * self.weight.value.unsqueeze(1)
        mask = [True, False, False]
        before: Tensor = _ATEN.native_layer_norm_backward(
            scaled,
            self.x,
            self.shape,
            *self.statistics,
            None,
            None,
            mask,
        )[0]
        return before


class _BatchNorm:
    """Features of all members side by side; running statistics are those of the members, in
    training."""

    def __init__(self, parts: Sequence[Any], joined: list[Stack]) -> None:
        self.weight = _join(parts, "weight", joined)
        self.bias = _join(parts, "bias", joined)
        self.parts = list(parts)
        self.eps = parts[0].eps
        self.momentum = parts[0].momentum

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.transpose(0, 1).flatten(1)
        running = [
            torch.cat([getattr(p, n) for p in self.parts]) for n in ("running_mean", "running_var")
        ]
        weight = self.weight.value.flatten()
        bias = self.bias.value.flatten()
        y, *self.batch = torch.native_batch_norm(
            self.x,
            weight,
            bias,
            running[0],
            running[1],
            True,
            self.momentum,
            self.eps,
        )
        for part, own_mean, own_variance in zip(
            self.parts,
            *(s.chunk(len(x)) for s in running),
            strict=True,
        ):
            part.running_mean.copy_(own_mean)
            part.running_var.copy_(own_variance)
            part.num_batches_tracked.add_(1)
        stacked: Tensor = y.unflatten(1, (len(x), -1)).transpose(0, 1)
        return stacked

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        k = len(self.parts)
        mask = [wanted, True, True]
        beside = gradient.transpose(0, 1).flatten(1)
        known = beside, self.x, self.weight.value.flatten(), None, None, *self.batch
        before, weight, bias = _ATEN.native_batch_norm_backward(*known, True, self.eps, mask)
        self.weight.add(weight.unflatten(0, (k, -1)))
        self.bias.add(bias.unflatten(0, (k, -1)))
        return before.unflatten(1, (k, -1)).transpose(0, 1) if wanted else gradient


class _Relu:
    def forward(self, x: Tensor) -> Tensor:
        self.y = x.relu()
        return self.y

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        before: Tensor = _ATEN.threshold_backward(gradient, self.y, 0)
        return before


class _Gelu:
    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return torch.nn.functional.gelu(x)

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        before: Tensor = _ATEN.gelu_backward(gradient, self.x)
        return before


class _Dropout:
    """Each member's mask comes from its own numbers, drawn as `nn.Dropout` draws it."""

    def __init__(self, parts: Sequence[Any], streams: Streams) -> None:
        self.rates = [part.p for part in parts]
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        if not any(self.rates):
            return x
        ones = x.new_ones(x.shape[1:])
        self.masks = torch.stack([self._mask(i, ones) for i in range(len(self.rates))])
        return x * self.masks

    def backward(self, gradient: Tensor, wanted: bool) -> Tensor:
        return gradient * self.masks if wanted and any(self.rates) else gradient

    def _mask(self, member: int, ones: Tensor) -> Tensor:
        if not self.rates[member]:
            return ones
        with self.streams.use(member):
            return torch.nn.functional.dropout(ones, self.rates[member])
