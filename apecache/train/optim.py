"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from apecache.recipes.recipe import OptimiserSpec, ScheduleSpec


def build_adamw(parameters: Iterable[nn.Parameter], spec: OptimiserSpec) -> torch.optim.AdamW:
    """Fused AdamW; biases, norms and the temperature (fewer than two dimensions) are not decayed."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    return torch.optim.AdamW(kept, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def learning_rate_factor(step: int, n_steps: int, spec: ScheduleSpec) -> float:
    """Factor for the 0-based `step`: linear warm-up from 1/w to 1 over w steps, then cosine to `final`."""
    warmup = max(1, round(spec.warmup * n_steps)) if spec.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return spec.final + (1 - spec.final) * (1 + math.cos(math.pi * progress)) / 2
