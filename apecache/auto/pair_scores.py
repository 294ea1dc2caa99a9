"""Score how likely each caption is to be wrong, by heads that were fitted without its image.

Two out-of-fold questions are asked of a caption. How many images of the fold are closer to it than
its own image? How many images have captions that are closer to it than the other captions of its
own image? The caption of another image gives a uniform share for both, so the two shares are
p-values of the hypothesis that the caption is wrong. Fisher's method combines them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from apecache.auto.fold_fit import embed_pairs, fit_in_memory, select_images
from apecache.errors import RecipeError, counted
from apecache.heads.normalization import normalize, similarities
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs, join_groups

BLOCK = 1024
"""Captions that are compared with all images at a time."""
DEV_SHARE = 10
"""One image in so many of a fold's training images chooses the epoch."""
MAX_DEV_IMAGES = 500
TAIL = 0.8
"""Shares above this are taken to be those of wrong captions alone (Storey 2002)."""
N_BINS = 50


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Hold the scores of m captions, in the order of the pairs. Shares are in (0, 1]."""

    image_share: NDArray[np.float64]
    """Share of images that are at least as close to the caption as its own image."""
    sibling_share: NDArray[np.float64]
    """Share of images whose captions are at least as close as the image's other captions; NaN for
    the only caption of an image."""
    wrong_share: NDArray[np.float64]
    """Both combined: near 0 for a caption that fits, uniform for a wrong one."""
    posterior: NDArray[np.float64]
    """Estimated probability that the caption is wrong."""
    share_wrong: float
    """Estimated share of wrong captions. Captions that are hard, but right, count as well."""
    nearest_image: NDArray[np.int64]
    """Position of the image that is closest to the caption among those of its fold."""
    found: NDArray[np.bool_]
    """Whether that is the caption's own image."""


def score_pairs(
    pairs: FeaturePairs,
    recipe: Recipe,
    n_folds: int = 5,
    seed: int = 0,
) -> PairScores:
    """Score all captions, each by heads that were fitted without its image.

    Copies of an image, and images with equal captions, are in one fold.

    Args:
        pairs: Images and texts.
        recipe: Recipe of the heads.
        n_folds: Number of folds.
        seed: Seed of the folds and of the fits.

    Raises:
        RecipeError: There are too few images.
    """
    folds = _folds(pairs, n_folds, seed)
    n_texts = len(pairs.text)
    image_share = np.ones(n_texts)
    sibling_share = np.full(n_texts, np.nan)
    nearest_image = np.zeros(n_texts, np.int64)
    owners = pairs.image_of_text.numpy()
    generator = np.random.default_rng(seed)
    for fold in range(n_folds):
        fit_images = generator.permutation(np.flatnonzero(folds != fold))
        n_dev = min(MAX_DEV_IMAGES, len(fit_images) // DEV_SHARE)
        fit = fit_in_memory(
            recipe,
            train=select_images(pairs, np.sort(fit_images[n_dev:])),
            dev=select_images(pairs, np.sort(fit_images[:n_dev])),
            seed=seed,
        )
        images = np.flatnonzero(folds == fold)
        held_out = select_images(pairs, images)
        shares = _shares(*embed_pairs(fit.model, held_out), held_out)
        texts = np.flatnonzero(np.isin(owners, images))
        image_share[texts] = shares[0]
        sibling_share[texts] = shares[1]
        nearest_image[texts] = images[shares[2]]
    wrong_share = combine_shares(image_share, sibling_share)
    share_wrong = estimate_share_wrong(wrong_share)
    return PairScores(
        image_share=image_share,
        sibling_share=sibling_share,
        wrong_share=wrong_share,
        posterior=posterior_wrong(wrong_share, share_wrong),
        share_wrong=share_wrong,
        nearest_image=nearest_image,
        found=nearest_image == owners,
    )


def _folds(pairs: FeaturePairs, n_folds: int, seed: int) -> NDArray[np.int64]:
    """Return int64 [n]: the fold of each image."""
    n_images = len(pairs)
    if n_images < 4 * n_folds:
        raise RecipeError(
            f"{counted(n_images, 'image')} for {n_folds} folds; at least 4 a fold are needed"
        )
    groups = torch.arange(n_images)
    if pairs.content is not None:
        groups = pairs.content.unique(return_inverse=True)[1]
    if pairs.caption_ids is not None:
        groups = _groups_by_caption(pairs, groups)
    numbers = groups.numpy()
    n_groups = int(numbers.max()) + 1
    order = np.random.default_rng(seed).permutation(n_groups)
    folds: NDArray[np.int64] = (np.argsort(order) % n_folds)[numbers]
    return folds


def _groups_by_caption(pairs: FeaturePairs, groups: Tensor) -> Tensor:
    """Join the groups of images that share a caption."""
    assert pairs.caption_ids is not None
    n_captions = pairs.first_text.diff()
    n_columns = int(n_captions.max())
    # Images with fewer captions repeat their first one.
    columns = torch.arange(n_columns).expand(len(pairs), -1)
    columns = torch.where(columns < n_captions.unsqueeze(1), columns, 0)
    rows = pairs.first_text[:-1].unsqueeze(1) + columns
    return join_groups(groups, pairs.caption_ids[rows])


def _shares(
    image: Tensor,
    text: Tensor,
    pairs: FeaturePairs,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the share of closer images, of closer captions, and the nearest image."""
    owners = pairs.image_of_text.to(text.device)
    n_images = len(image)
    sums = torch.zeros_like(image).index_add_(0, owners, text)
    n_captions = pairs.first_text.diff().to(text.device)[owners]
    centroids = normalize(sums)
    # Without the caption itself: else every caption would be close to its own image's captions.
    siblings = normalize(sums[owners] - text)
    closer_images = torch.empty(len(text), device=text.device)
    closer_captions = torch.empty(len(text), device=text.device)
    nearest = torch.empty(len(text), dtype=torch.long, device=text.device)
    for begin in range(0, len(text), BLOCK):
        block = slice(begin, min(begin + BLOCK, len(text)))
        rows = torch.arange(block.stop - begin, device=text.device)
        own_images = owners[block]
        cosines = similarities(text[block], image)
        nearest[block] = cosines.argmax(1)
        # The own image counts as one, so that no share is 0.
        closer_images[block] = (cosines >= cosines[rows, own_images].unsqueeze(1)).sum(1).float()
        cosines = similarities(text[block], centroids)
        own_cosine = (text[block] * siblings[block]).sum(1)
        cosines[rows, own_images] = own_cosine
        closer_captions[block] = (cosines >= own_cosine.unsqueeze(1)).sum(1).float()
    closer_captions[n_captions < 2] = float("nan")
    image_share = (closer_images / n_images).double().cpu().numpy()
    sibling_share = (closer_captions / n_images).double().cpu().numpy()
    return image_share, sibling_share, nearest.cpu().numpy()


def combine_shares(
    image_share: NDArray[np.float64],
    sibling_share: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Combine two p-values of each caption by Fisher's method; a NaN leaves the first alone."""
    statistic = -2 * (np.log(image_share) + np.log(np.nan_to_num(sibling_share, nan=1.0)))
    combined = chi2.sf(statistic, 4)
    has_siblings = ~np.isnan(sibling_share)
    shares: NDArray[np.float64] = np.where(has_siblings, combined, image_share)
    return shares


def estimate_share_wrong(wrong_share: NDArray[np.float64]) -> float:
    """Estimate the share of wrong captions from those with large shares (Storey 2002).

    Captions that fit have small shares. Above `TAIL` there are wrong ones alone, and a part
    1 - `TAIL` of all wrong ones.
    """
    return min(1.0, float((wrong_share > TAIL).mean()) / (1 - TAIL))


def posterior_wrong(
    wrong_share: NDArray[np.float64],
    share_wrong: float,
) -> NDArray[np.float64]:
    """Estimate for each caption the probability that it is wrong.

    This is Efron's local false discovery rate. The density of the shares is a histogram that is
    made to fall monotonically. Wrong captions have density 1.
    """
    n_in_bin, edges = np.histogram(wrong_share, bins=N_BINS, range=(0.0, 1.0))
    density = n_in_bin * N_BINS / max(1, len(wrong_share))
    centers = (edges[:-1] + edges[1:]) / 2
    falling = IsotonicRegression(increasing=False).fit_transform(centers, density)
    bins = np.clip((wrong_share * N_BINS).astype(np.int64), 0, N_BINS - 1)
    posterior: NDArray[np.float64] = np.minimum(1.0, share_wrong / np.maximum(falling[bins], 1e-12))
    return posterior
