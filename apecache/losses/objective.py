"""What a recipe's `loss` section asks of embeddings: the same for heads on cached features and for
towers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apecache.losses.contrastive import (
    Groups,
    Temperature,
    grouped_info_nce,
    info_nce,
    sigmoid_loss,
)
from apecache.losses.geometry import structure_divergence
from apecache.losses.spec import LossSpec
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

TILED_FROM = 2**22
"""Logits of a batch above which the tiled losses are used: 2,048 images with one caption each."""


def contrast(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    groups: Groups | None,
    spec: LossSpec,
    widths: Sequence[int] = (),
) -> Tensor:
    """Loss (a scalar) of images [n, dim] and texts [m, dim], L2-normalised; `groups` None: row
    belongs to row.

    `widths`: of heads that stand side by side; each has a loss of its own, and this is the mean of
    theirs.
    """
    if not widths:
        return _contrast(image, text=text, temperature=temperature, groups=groups, spec=spec)
    pairs = zip(image.split(list(widths), dim=-1), text.split(list(widths), dim=-1), strict=True)
    length = len(widths) ** 0.5
    return torch.stack(
        [
            _contrast(
                i * length,
                text=t * length,
                temperature=temperature,
                groups=groups,
                spec=spec,
            )
            for i, t in pairs
        ]
    ).mean()


def _contrast(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    groups: Groups | None,
    spec: LossSpec,
) -> Tensor:
    scale = temperature.scale()
    tiled = len(image) * len(text) > TILED_FROM
    match spec.kind:
        case "infonce" if tiled:
            return tiled_info_nce(image, text=text, scale=scale, groups=groups)
        case "infonce":
            return (
                info_nce(image, text, scale)
                if groups is None
                else grouped_info_nce(image, text=text, scale=scale, groups=groups)
            )
        case "sigmoid":
            bias = temperature.bias if temperature.bias is not None else spec.bias
            return (tiled_sigmoid_loss if tiled else sigmoid_loss)(
                image,
                text=text,
                scale=scale,
                bias=bias,
                groups=groups,
            )


def structure_term(before: Tensor, after: Tensor, spec: LossSpec) -> Tensor:
    """Divergence of one side's neighbourhoods before (pooled features [n, dim]) and after its
    head."""
    return structure_divergence(
        before,
        after=after,
        temperature=spec.structure_temperature,
        kind=spec.structure_divergence,
    )


def structure_weight(step: int, spec: LossSpec) -> float:
    """At the 0-based `step`."""
    grown = min(1.0, (step + 1) / spec.structure_warmup) if spec.structure_warmup else 1.0
    return spec.structure * grown


def build_temperature(loss: LossSpec) -> Temperature:
    bias = loss.bias if loss.kind == "sigmoid" else None
    return Temperature(
        loss.temperature,
        low=loss.min_temperature,
        high=loss.max_temperature,
        learnable=loss.learnable,
        bias=bias,
    )
