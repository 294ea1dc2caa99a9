"""Heads of one structure trained side by side: their weights stacked [k, …], their products one batched product.

The members' own parameters and running statistics become views of the stacks, so whatever moves the one moves the
other; gradients of the stacks are handed to the members by `StackedHeads.share_gradients`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apecache.heads.head import Head, SeveralHeads
from apecache.heads.pooled import FuseMixBlock, GatedUnit, PooledHead, ResidualBlock

_LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU)
_SHELLS = (PooledHead, SeveralHeads, ResidualBlock, FuseMixBlock, GatedUnit, nn.Sequential, nn.ModuleList)
Joined = list[tuple[nn.Parameter, list[nn.Parameter]]]


class Streams:
    """Random states of torch's own generators, one for each member; `of` some of them are the same ones."""

    def __init__(self, states: list[list[Tensor]], device: torch.device) -> None:
        self.states, self.device = states, device

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

    def _present(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


def structure_of(head: Head) -> tuple[object, ...] | None:
    """Equal for heads that can be stacked with one another; None for a head that cannot be stacked at all."""
    if not all(isinstance(module, (*_LAYERS, *_SHELLS)) for module in head.modules()):
        return None
    modules = tuple((name, type(module).__name__) for name, module in head.named_modules())
    return modules, tuple((name, tuple(p.shape), p.requires_grad) for name, p in head.named_parameters())


class StackedHeads(nn.Module):
    """float [k, n, in_dim] -> float32 [k, n, out_dim], L2-normalised: member i sees features[i]."""

    def __init__(self, heads: Sequence[Head], streams: Streams) -> None:
        super().__init__()
        self.joined: Joined = []
        self.head = _stacked(heads, streams, self.joined)

    def forward(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.head(features)
        return embedded

    def share_gradients(self) -> None:
        """Give every member its part of the gradients, and forget them here."""
        for stack, members in self.joined:
            for member, gradient in zip(members, _rows(stack.grad, len(members)), strict=True):
                member.grad = gradient
            stack.grad = None

    def release(self) -> None:
        """Give every member weights of its own again; the stacks may go."""
        for _, members in self.joined:
            for member in members:
                member.data, member.grad = member.data.clone(), None


def _rows(gradient: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if gradient is None else gradient.unbind()


def _stacked(parts: Sequence[nn.Module], streams: Streams, joined: Joined) -> nn.Module:
    match parts[0]:
        case nn.Linear():
            return _Linear(parts, joined)
        case nn.LayerNorm():
            return _LayerNorm(parts, joined)
        case nn.BatchNorm1d():
            return _BatchNorm(parts, joined)
        case nn.Dropout():
            return _Dropout(parts, streams)
        case nn.Identity() | nn.ReLU() | nn.GELU():
            return parts[0]
    shell = copy.deepcopy(parts[0])
    for name, _ in parts[0].named_children():
        setattr(shell, name, _stacked([getattr(part, name) for part in parts], streams, joined))
    for name, _ in parts[0].named_buffers(recurse=False):
        setattr(shell, name, torch.stack([getattr(part, name) for part in parts]).unsqueeze(1))
    return shell


def _join(parts: Sequence[Any], name: str, joined: Joined) -> nn.Parameter | None:
    """The stack [k, …] of a parameter, of which the members' own become views."""
    members = [getattr(part, name) for part in parts]
    if members[0] is None:
        return None
    stack = nn.Parameter(torch.stack([member.detach() for member in members]), members[0].requires_grad)
    for member, row in zip(members, stack.detach().unbind(), strict=True):
        member.data, member.grad = row, None
    joined.append((stack, members))
    return stack


class _Product(torch.autograd.Function):
    """[k, n, in] x [k, out, in] + [k, out]. Written out, because the gradient of the weights then comes as they lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        before = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        return before, torch.bmm(gradient.mT, x), gradient.sum(1) if ctx.biased else None


class _Linear(nn.Module):
    def __init__(self, parts: Sequence[Any], joined: Joined) -> None:
        super().__init__()
        self.weight, self.bias = _join(parts, "weight", joined), _join(parts, "bias", joined)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.weight, self.bias)
        return product


class _LayerNorm(nn.Module):
    def __init__(self, parts: Sequence[Any], joined: Joined) -> None:
        super().__init__()
        self.weight, self.bias = _join(parts, "weight", joined), _join(parts, "bias", joined)
        self.shape, self.eps = parts[0].normalized_shape, parts[0].eps

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.bias is not None
        return F.layer_norm(x, self.shape, None, None, self.eps) * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)


class _BatchNorm(nn.Module):
    """Features of all members side by side; running statistics are those of the members, in training."""

    def __init__(self, parts: Sequence[Any], joined: Joined) -> None:
        super().__init__()
        self.weight, self.bias = _join(parts, "weight", joined), _join(parts, "bias", joined)
        self.parts = list(parts)
        self.eps, self.momentum = parts[0].eps, parts[0].momentum

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.bias is not None
        side_by_side = x.transpose(0, 1).flatten(1)
        mean, variance = (torch.cat([getattr(p, n) for p in self.parts]) for n in ("running_mean", "running_var"))
        weights = self.weight.flatten(), self.bias.flatten()
        y = F.batch_norm(side_by_side, mean, variance, *weights, True, self.momentum, self.eps)
        for part, own_mean, own_variance in zip(self.parts, *(s.chunk(len(x)) for s in (mean, variance)), strict=True):
            part.running_mean.copy_(own_mean)
            part.running_var.copy_(own_variance)
            part.num_batches_tracked.add_(1)
        stacked: Tensor = y.unflatten(1, (len(x), -1)).transpose(0, 1)
        return stacked


class _Dropout(nn.Module):
    """Each member's mask comes from its own numbers, drawn as `nn.Dropout` draws it."""

    def __init__(self, parts: Sequence[Any], streams: Streams) -> None:
        super().__init__()
        self.rates, self.streams = [part.p for part in parts], streams

    def forward(self, x: Tensor) -> Tensor:
        if not any(self.rates):
            return x
        ones = x.new_ones(x.shape[1:])
        return x * torch.stack([self._mask(i, ones) for i in range(len(self.rates))])

    def _mask(self, member: int, ones: Tensor) -> Tensor:
        if not self.rates[member]:
            return ones
        with self.streams.use(member):
            return F.dropout(ones, self.rates[member])
