"""Augmentation in feature space, for training batches only."""

from dataclasses import replace

import torch
from torch import Tensor

from apecache.heads.head import Head
from apecache.recipes.recipe import AugmentationSpec
from apecache.train.batches import Batch


def augment(batch: Batch, spec: AugmentationSpec, image: Head, text: Head) -> Batch:
    """A batch as the recipe wants it; draws from torch's own generators."""
    if spec.mixup:
        batch = mix(batch, spec.mixup)
    if spec.token_dropout:
        first = hide_tokens(batch.image_mask, batch.image, spec.token_dropout)
        batch = replace(
            batch,
            image_mask=first,
            text_mask=hide_tokens(batch.text_mask, batch.text, spec.token_dropout),
        )
    if spec.noise:
        sides = add_noise(batch.image, image, spec.noise), add_noise(batch.text, text, spec.noise)
        batch = replace(batch, image=sides[0], text=sides[1])
    return batch


def mix(batch: Batch, alpha: float) -> Batch:
    """One half of the images mixed with the other, and their captions likewise, with *one*
    coefficient from Beta(alpha, alpha) (FuseMix, section 5.1). An odd image is left out; a mixture
    belongs to its own captions, and to those of other mixtures of the same two groups."""
    coefficient = float(torch.distributions.Beta(alpha, alpha).sample())
    half = len(batch.image) // 2
    captions = len(batch.text) // len(batch.image)
    image, text = (
        _mix_halves(x, n, coefficient)
        for x, n in ((batch.image, half), (batch.text, half * captions))
    )
    groups = None
    if batch.groups is not None:
        own = mixed_groups(batch.groups.image)
        groups = replace(batch.groups, image=own, text=own.repeat_interleave(captions))
    return Batch(image=image, text=text, image_mask=None, text_mask=None, groups=groups)


def mixed_groups(groups: Tensor) -> Tensor:
    """int64 [n // 2]: equal numbers where both halves' `groups` (int64 [n], numbers from 0 below n)
    are equal."""
    half = len(groups) // 2
    return groups[:half] * len(groups) + groups[half : 2 * half]


def _mix_halves(x: Tensor, half: int, coefficient: float) -> Tensor:
    return coefficient * x[:half].float() + (1 - coefficient) * x[half : 2 * half].float()


def hide_tokens(mask: Tensor | None, features: Tensor, share: float) -> Tensor | None:
    """Mask without a random share of the tokens; the first token always stays. Pooled features have
    none."""
    if features.ndim == 2:
        return mask
    kept = torch.rand(features.shape[:2], device=features.device) >= share
    kept[:, 0] = True
    return kept if mask is None else kept & mask


def add_noise(features: Tensor, head: Head, noise: float) -> Tensor:
    """Gaussian, in units of each feature's own deviation as the head knows it."""
    return features.float() + noise * head.deviation * torch.randn_like(
        features,
        dtype=torch.float32,
    )
