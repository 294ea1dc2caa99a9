"""What tests of recipes and trainers share: a recipe, and rows of data of a given size."""

from pathlib import Path

import torch

from apecache.train.batches import FeaturePairs

SMALL = str(Path(__file__).with_name("small.toml"))
"""A file: two linear heads of a few dimensions."""


def pairs_of(n_images: int, n_texts: int) -> FeaturePairs:
    """Rows as features: so many images, their captions spread evenly."""
    first_text = torch.linspace(0, n_texts, n_images + 1).long()
    return FeaturePairs(
        image=torch.arange(n_images).unsqueeze(1),
        text=torch.arange(n_texts).unsqueeze(1),
        first_text=first_text,
    )
