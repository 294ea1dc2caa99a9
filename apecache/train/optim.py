"""Optimisers and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from apecache.recipes.recipe import OptimiserSpec, ScheduleSpec


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            for p in trained:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [p.grad for p in trained]
            momenta = [self.state[p]["momentum"] for p in trained]
            first, second = group["betas"]
            updates = torch._foreach_sign(torch._foreach_lerp(gradients, momenta, first))
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(trained, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - second)


def parameter_groups(
    rates: Iterable[tuple[nn.Parameter, float]],
    spec: OptimiserSpec,
) -> list[dict[str, Any]]:
    """By factor of the learning rate (kept as `factor`), and with or without weight decay: biases,
    norms and the temperature (fewer than two dimensions) are not decayed."""
    rates = list(rates)
    keys = sorted({(factor, parameter.ndim >= 2) for parameter, factor in rates}, reverse=True)
    return [
        {
            "params": [p for p, f in rates if (f, p.ndim >= 2) == (factor, decayed)],
            "lr": spec.lr * factor,
            "weight_decay": spec.weight_decay if decayed else 0.0,
            "factor": factor,
        }
        for factor, decayed in keys
    ]


def build_optimiser(
    rates: Iterable[tuple[nn.Parameter, float]],
    spec: OptimiserSpec,
) -> torch.optim.Optimizer:
    """Over parameters and their factors of the learning rate; fused where torch has it."""
    groups = parameter_groups(rates, spec)
    match spec.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        case "lion":
            return Lion(groups, spec.lr, spec.betas)
        case "sgd":
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.betas[0], fused=True)


def is_direct(optimiser: torch.optim.Optimizer) -> bool:
    """Whether `direct_update` calls a kernel of it."""
    return isinstance(optimiser, torch.optim.Adam) and all(
        group["fused"] for group in optimiser.param_groups
    )


def direct_update(
    optimiser: torch.optim.Optimizer,
    rates: torch.Tensor | None = None,
) -> Callable[[], object]:
    """`optimiser.step` for parameters, gradients and states that are there and stay where they are:
    a fused Adam or AdamW calls its kernel, without looking through all of them each time, which
    costs a small head more than the kernel does. Rates and decay may still change. `rates` float32
    [groups], on the parameters' device: the learning rates instead of those of the groups."""
    if not is_direct(optimiser):
        return optimiser.step
    groups = [(group, _tensors(optimiser, group["params"])) for group in optimiser.param_groups]

    @torch.no_grad()
    def update() -> None:
        for place, (group, (parameters, gradients, first, second, steps)) in enumerate(groups):
            torch._foreach_add_(steps, 1)
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                parameters,
                gradients,
                first,
                second,
                [],
                steps,
                lr=group["lr"] if rates is None else rates[place],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    return update


def _tensors(
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> list[list[torch.Tensor]]:
    """Values, gradients, both moments and step counts of the parameters that have gradients."""
    trained = [p for p in parameters if p.grad is not None]
    states = [
        [optimiser.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq", "step")
    ]
    return [[p.data for p in trained], [p.grad for p in trained if p.grad is not None], *states]


def learning_rate_factor(step: int, n_steps: int, spec: ScheduleSpec) -> float:
    """Factor for the 0-based `step`: linear warm-up from 1/w to 1 over w steps, then cosine to
    `final`, or constant."""
    warmup = spec.warmup_steps or (max(1, round(spec.warmup * n_steps)) if spec.warmup else 0)
    if step < warmup:
        return (step + 1) / warmup
    if spec.decay == "constant":
        return 1.0
    progress = (step - warmup) / max(1, n_steps - warmup)
    return spec.final + (1 - spec.final) * (1 + math.cos(math.pi * progress)) / 2
