"""Build optimizers and compute the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from apecache.recipes.schedule import OptimizerSpec, ScheduleSpec


def parameter_groups(
    rates: Iterable[tuple[nn.Parameter, float]],
    spec: OptimizerSpec,
    undecayed: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Group parameters by their factor of the learning rate and by weight decay.

    Biases and norms (one dimension) are not decayed, and neither is `undecayed`. The temperature
    (no dimension) is, if the recipe says so. Each group keeps its factor as `factor`.
    """
    spared_ids = {id(parameter) for parameter in undecayed}
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, factor in rates:
        is_decayed = parameter.ndim >= 2 or (parameter.ndim == 0 and spec.decay_scalars)
        is_decayed = is_decayed and id(parameter) not in spared_ids
        members.setdefault((factor, is_decayed), []).append(parameter)
    groups: list[dict[str, Any]] = []
    # A fixed order of groups: checkpoints number parameters by it.
    for factor, is_decayed in sorted(members, reverse=True):
        group = {
            "params": members[factor, is_decayed],
            "lr": spec.lr * factor,
            "weight_decay": spec.weight_decay if is_decayed else 0.0,
            "factor": factor,
        }
        groups.append(group)
    return groups


def build_optimizer(
    rates: Iterable[tuple[nn.Parameter, float]],
    spec: OptimizerSpec,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, fused where torch has a fused one.

    Args:
        rates: Parameters, each with its factor of the learning rate.
        spec: Optimizer section of the recipe.
        undecayed: Those of the parameters that are not decayed, whatever their dimensions.
    """
    groups = parameter_groups(rates, spec, undecayed)
    match spec.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        case "lion":
            # timm takes seconds to import, and only this optimizer needs it.
            from timm.optim.lion import Lion

            # One kernel for all tensors: heads have many small ones.
            return Lion(groups, lr=spec.lr, betas=spec.betas, foreach=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.betas[0], fused=True)


def is_direct(optimizer: torch.optim.Optimizer) -> bool:
    """Check whether `direct_update` calls a kernel of this optimizer."""
    return isinstance(optimizer, torch.optim.Adam) and all(
        group["fused"] for group in optimizer.param_groups
    )


def direct_update(
    optimizer: torch.optim.Optimizer,
    rates: torch.Tensor | None = None,
) -> Callable[[], object]:
    """Return a fast `optimizer.step` for a small head.

    A fused Adam or AdamW calls its kernel on tensors that are collected once. Collecting them in
    every step takes longer than the kernel of a small head. Parameters, gradients and states must
    exist and keep their memory. Rates and decay of the groups may change.

    Args:
        optimizer: Optimizer that has made at least one step.
        rates: float32 [groups], on the parameters' device: learning rates that replace those of
            the groups.

    Returns:
        The update; `optimizer.step` itself for other optimizers.
    """
    if not is_direct(optimizer):
        return optimizer.step
    groups = [(group, _tensors(optimizer, group["params"])) for group in optimizer.param_groups]

    @torch.no_grad()
    def update() -> None:
        for group_index, (group, tensors) in enumerate(groups):
            parameters, gradients, first, second, steps = tensors
            torch._foreach_add_(steps, 1)
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                parameters,
                gradients,
                first,
                second,
                [],  # largest second moments, which only AMSGrad has
                steps,
                lr=group["lr"] if rates is None else rates[group_index],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    return update


def _tensors(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> list[list[torch.Tensor]]:
    """Return values, gradients, both moments and step counts of parameters with gradients."""
    values: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    first_moments: list[torch.Tensor] = []
    second_moments: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        state = optimizer.state[parameter]
        values.append(parameter.data)
        gradients.append(parameter.grad)
        first_moments.append(state["exp_avg"])
        second_moments.append(state["exp_avg_sq"])
        steps.append(state["step"])
    return [values, gradients, first_moments, second_moments, steps]


def learning_rate_factor(
    step: int,
    n_steps: int,
    spec: ScheduleSpec,
    per_epoch: int | None = None,
) -> float:
    """Return the factor of the learning rate.

    A warm-up over w steps, then a cosine to `final`, or constant. The step alone decides: the
    schedulers of torch and timm are objects with a state, which every checkpoint and every member
    of a population would have to keep too.

    Args:
        step: Step, from 0.
        n_steps: Steps of the fit.
        spec: Schedule section of the recipe.
        per_epoch: Steps of an epoch, which `cosine-epochs` needs; None: all steps are one epoch.
    """
    warmup = _warmup_steps(n_steps, spec)
    if spec.decay == "cosine-epochs":
        epoch_steps = per_epoch or n_steps
        epoch = step // epoch_steps
        if step < warmup and not epoch:
            return _warming(step, warmup, spec)
        return _cosine(epoch / -(-n_steps // epoch_steps), spec)
    if step < warmup:
        return _warming(step, warmup, spec)
    if spec.decay == "constant":
        return 1.0
    return _cosine((step - warmup) / max(1, n_steps - warmup), spec)


def _warmup_steps(n_steps: int, spec: ScheduleSpec) -> int:
    if spec.warmup_steps or not spec.warmup:
        return spec.warmup_steps
    return max(1, round(spec.warmup * n_steps))


def _warming(step: int, warmup: int, spec: ScheduleSpec) -> float:
    """Return the factor within the warm-up."""
    if spec.warmup_stairs:
        risen = step * spec.warmup_stairs // warmup / spec.warmup_stairs
    else:
        risen = (step + 1) / warmup
    return spec.warmup_start + (1 - spec.warmup_start) * risen


def _cosine(progress: float, spec: ScheduleSpec) -> float:
    """Return the factor at a progress from 0 to 1."""
    cosine = 1 + math.cos(math.pi * progress)
    return spec.final + (1 - spec.final) * cosine / 2
