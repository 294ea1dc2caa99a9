"""Recipes of heads at small widths, and features for them."""

import torch
from torch import Tensor

from apecache.heads.head import HeadSpec
from apecache.recipes.recipe import AugmentationSpec, Recipe, load_recipe
from apecache.train.batches import FeaturePairs

IMAGE_DIM = 12
TEXT_DIM = 8
N_IMAGES = 8
N_CAPTIONS = 3
"""Of each image."""
N_TOKENS = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_recipe(name: str, *settings: str) -> Recipe:
    """A recipe of the zoo with small heads, without dropout and mixup."""
    recipe = load_recipe(name, settings)
    changes = {
        "image": _small_head(recipe.image),
        "text": _small_head(recipe.text),
        "augmentation": AugmentationSpec(),
    }
    return recipe.model_copy(update=changes)


def _small_head(spec: HeadSpec) -> HeadSpec:
    changes = {
        "dim": None if spec.dim is None else 10,
        "width": 16,
        "n_heads": 2,
        "dropout": 0.0,
        "input_dropout": 0.0,
    }
    return spec.model_copy(update=changes)


def small_pairs(recipe: Recipe) -> FeaturePairs:
    """Images with three captions each: pooled, or tokens, where texts differ in length."""
    n_texts = N_IMAGES * N_CAPTIONS
    image_shape: tuple[int, ...] = (N_IMAGES, IMAGE_DIM)
    text_shape: tuple[int, ...] = (n_texts, TEXT_DIM)
    text_lengths = None
    if recipe.image.cut == "tokens":
        image_shape = (N_IMAGES, N_TOKENS, IMAGE_DIM)
        text_shape = (n_texts, N_TOKENS, TEXT_DIM)
        text_lengths = torch.arange(n_texts) % N_TOKENS + 1
    return FeaturePairs(
        image=draw(*image_shape, seed=1) * 2 + 1,
        text=draw(*text_shape, seed=2) * 2 - 1,
        first_text=torch.arange(N_IMAGES + 1) * N_CAPTIONS,
        text_lengths=text_lengths,
    )
