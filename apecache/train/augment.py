"""Augment training batches in feature space."""

from dataclasses import replace

import torch
from torch import Tensor

from apecache.heads.head import Head
from apecache.recipes.recipe import AugmentationSpec
from apecache.train.batches import Batch


def augment(batch: Batch, spec: AugmentationSpec, image: Head, text: Head) -> Batch:
    """Augment a batch as the recipe says. Random numbers come from torch's global generators.

    Args:
        batch: Batch of features.
        spec: Augmentation section of the recipe.
        image: Image head, whose statistics scale the noise.
        text: Text head, as `image`.
    """
    if spec.mixup:
        batch = mix(batch, spec.mixup)
    if spec.token_dropout:
        # Image before text, here and below: the order of draws decides what a seed gives.
        image_mask = hide_tokens(batch.image_mask, batch.image, spec.token_dropout)
        text_mask = hide_tokens(batch.text_mask, batch.text, spec.token_dropout)
        batch = replace(batch, image_mask=image_mask, text_mask=text_mask)
    if spec.noise:
        noisy_image = add_noise(batch.image, image, spec.noise)
        noisy_text = add_noise(batch.text, text, spec.noise)
        batch = replace(batch, image=noisy_image, text=noisy_text)
    return batch


def mix(batch: Batch, alpha: float) -> Batch:
    """Mix one half of the images with the other half, and their captions likewise.

    All mixtures share *one* coefficient from Beta(alpha, alpha) (FuseMix, section 5.1). An odd
    image is left out. A mixture belongs to its own captions, and to those of other mixtures of the
    same two groups.

    Returns:
        A batch of n // 2 mixtures, float32.
    """
    coefficient = float(torch.distributions.Beta(alpha, alpha).sample())
    half = len(batch.image) // 2
    captions = len(batch.text) // len(batch.image)
    image, text = (
        _mix_halves(x, n, coefficient)
        for x, n in ((batch.image, half), (batch.text, half * captions))
    )
    groups = None
    if batch.groups is not None:
        image_groups = mixed_groups(batch.groups.image)
        groups = replace(
            batch.groups,
            image=image_groups,
            text=image_groups.unsqueeze(1).expand(-1, captions).flatten(),
            n_pairs=None,
        )
    return Batch(image=image, text=text, image_mask=None, text_mask=None, groups=groups)


def mixed_groups(groups: Tensor) -> Tensor:
    """Number the groups of mixtures.

    Args:
        groups: int64 [n], group of each image, numbers from 0 below n.

    Returns:
        int64 [n // 2]: equal numbers where the groups of both halves are equal.
    """
    half = len(groups) // 2
    # Numbers are below n, so each pair of groups has its own sum.
    return groups[:half] * len(groups) + groups[half : 2 * half]


def _mix_halves(x: Tensor, half: int, coefficient: float) -> Tensor:
    """Mix the first `half` rows with the next `half`, in float32."""
    return coefficient * x[:half].float() + (1 - coefficient) * x[half : 2 * half].float()


def hide_tokens(mask: Tensor | None, features: Tensor, share: float) -> Tensor | None:
    """Return a mask without a random share of the tokens.

    Args:
        mask: bool [n, tokens]; None: all tokens are valid.
        features: [n, tokens, dim], or pooled [n, dim], which have no tokens to hide.
        share: Probability that a token is hidden.
    """
    if features.ndim == 2:
        return mask
    keep_mask = torch.rand(features.shape[:2], device=features.device) >= share
    # The first token always stays: a head needs at least one.
    keep_mask[:, 0] = True
    return keep_mask if mask is None else keep_mask & mask


def add_noise(features: Tensor, head: Head, noise: float) -> Tensor:
    """Add Gaussian noise, in units of each feature's deviation as measured by the head."""
    gaussian = torch.randn_like(features, dtype=torch.float32)
    return features.float() + noise * head.deviation * gaussian
