"""Choose the loss by the `kind` of a recipe's `loss` section, for heads and for towers alike.

A new loss has its formula in `contrastive`, its name in `spec`, and its case in `loss_of_kind`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.normalization import normalize
from apecache.losses.contrastive import (
    Groups,
    Temperature,
    grouped_info_nce,
    info_nce,
    sigmoid_loss,
)
from apecache.losses.geometry import structure_divergence
from apecache.losses.registered import LOSSES
from apecache.losses.spec import LossSpec
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

TILED_FROM = 2**22
"""Logits of a batch above which the tiled losses are used: 2,048 images with one caption each."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Hold the loss of a batch and, where it has several terms, its contrastive one."""

    total: Tensor
    """Loss that gradients are taken of, a scalar."""
    contrastive: Tensor | None = None
    """The contrastive term alone, detached; None where it is the total."""


def contrast(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    groups: Groups | None,
    spec: LossSpec,
    widths: Sequence[int] = (),
) -> Tensor:
    """Compute the contrastive loss of a batch, a scalar.

    Args:
        image: [n, dim], L2-normalized.
        text: [m, dim], L2-normalized.
        temperature: scale and bias of the logits.
        groups: which rows belong together. None: row i belongs to row i.
        spec: the `loss` section.
        widths: of heads that stand side by side. Each has a loss of its own, and the result is
            their mean.
    """
    if spec.matryoshka:
        return _nested(image, text=text, temperature=temperature, groups=groups, spec=spec)
    if not widths:
        return loss_of_kind(image, text=text, temperature=temperature, groups=groups, spec=spec)
    image_blocks = image.split(list(widths), dim=-1)
    text_blocks = text.split(list(widths), dim=-1)
    # `EnsembleHead` divides by this, so the product is L2-normalized again.
    length = len(widths) ** 0.5
    losses = []
    for image_block, text_block in zip(image_blocks, text_blocks, strict=True):
        loss = loss_of_kind(
            image_block * length,
            text=text_block * length,
            temperature=temperature,
            groups=groups,
            spec=spec,
        )
        losses.append(loss)
    return torch.stack(losses).mean()


def _nested(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    groups: Groups | None,
    spec: LossSpec,
) -> Tensor:
    """Average the loss over the whole embeddings and their first `spec.matryoshka` values."""
    losses = []
    for width in (*spec.matryoshka, image.shape[1]):
        loss = loss_of_kind(
            normalize(image[:, :width], dim=-1),
            text=normalize(text[:, :width], dim=-1),
            temperature=temperature,
            groups=groups,
            spec=spec,
        )
        losses.append(loss)
    return torch.stack(losses).mean()


def loss_of_kind(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    groups: Groups | None,
    spec: LossSpec,
) -> Tensor:
    """Compute the loss that `spec.kind` names. See `contrast`."""
    scale = temperature.scale()
    tiled = len(image) * len(text) > TILED_FROM
    match spec.kind:
        case "infonce" if tiled:
            return tiled_info_nce(image, text=text, scale=scale, groups=groups)
        case "infonce" if groups is None:
            return info_nce(image, text, scale)
        case "infonce":
            assert groups is not None
            return grouped_info_nce(image, text=text, scale=scale, groups=groups)
        case "sigmoid":
            bias = temperature.bias if temperature.bias is not None else spec.bias
            compute = tiled_sigmoid_loss if tiled else sigmoid_loss
            return compute(image, text=text, scale=scale, bias=bias, groups=groups)
        case "custom":
            return LOSSES.find(spec.custom)(image, text, scale, groups)


def structure_term(before: Tensor, after: Tensor, spec: LossSpec) -> Tensor:
    """Compute the divergence of one side's neighborhoods before and after its head.

    Args:
        before: [n, in_dim], pooled features.
        after: [n, out_dim], embeddings of the same rows.
        spec: the `loss` section.
    """
    return structure_divergence(
        before,
        after=after,
        temperature=spec.structure_temperature,
        kind=spec.structure_divergence,
    )


def structure_weight(step: int, spec: LossSpec) -> float:
    """Return the weight of `structure_term` at the 0-based `step`."""
    warmup = spec.structure_warmup
    share = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return spec.structure * share


def build_temperature(loss: LossSpec) -> Temperature:
    """Build the temperature of a `loss` section."""
    # InfoNCE is a softmax, which a constant added to all logits does not change.
    bias = loss.bias if loss.kind == "sigmoid" else None
    return Temperature(
        loss.temperature,
        low=loss.min_temperature,
        high=loss.max_temperature,
        learnable=loss.learnable,
        bias=bias,
        parameter=loss.temperature_parameter,
    )
