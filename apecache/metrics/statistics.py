"""Compute the intervals and p-values of printed figures, for all commands and pages.

A recall that S seeds of a recipe reach on n images is uncertain for two reasons, and their
variances are added:

    Var(mean over seeds) = s2 / S + v

s2 is the sample variance of the S recalls (S - 1 degrees of freedom). v is the variance of the mean
over seeds when other images are drawn, each with its captions, the same draw for all seeds. It is
the linearized variance of a ratio: with h_i hits among the c_i queries of image i, p = sum(h) /
sum(c) and u_i = (h_i - p c_i) / sum(c),

    v = n / (n - 1) * sum(u_i ** 2)

which is the limit of a bootstrap over images (Cochran 1977, Sampling Techniques, section 6.8),
without its noise. The candidates stay fixed. The share of s2 that comes from the draw of images is
counted in v too, so the interval is slightly too wide, never too narrow.

The quantile is Student's with Satterthwaite's degrees of freedom: (a + b)^2 / (a^2 / (S - 1) + b^2
/ (n - 1)) with a = s2 / S and b = v. A bootstrap over 2 to 5 seeds cannot replace it: resampling S
values understates their variance by (S - 1) / S, a half for two seeds. With one seed the interval
covers the images alone.

The ends are Wilson's, with the effective number of queries p (1 - p) / Var in place of n (Kott and
Carr 1997). They lie within 0 and 100, and 0 of n does not give "0 to 0": where no variance is seen,
each image counts as one query.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import binomtest

LEVEL = 0.95
"""Confidence of all intervals."""
Way = Literal["image_to_text", "text_to_image"]
"""The direction of a recall."""
WAYS: tuple[Way, Way] = ("image_to_text", "text_to_image")
Ends = tuple[float, float]
"""Lower and upper end of a 95 % interval, in per cent."""
Term = tuple[Way, int]
"""One recall: its direction and its K. A metric is the mean of one or several."""


@dataclass(frozen=True, kw_only=True)
class RetrievalHits:
    """Hold the answers of one run, image by image."""

    image_to_text: Mapping[int, NDArray[np.float64]]
    """For each K float64 [n_images], 1 where the image is a hit."""
    text_to_image: Mapping[int, NDArray[np.float64]]
    """For each K float64 [n_images], how many captions of the image are hits."""
    captions: NDArray[np.float64]
    """float64 [n_images], the captions of each image."""

    @property
    def n_images(self) -> int:
        """Return the number of images."""
        return len(self.captions)

    def among(self, images: NDArray[np.bool_]) -> "RetrievalHits":
        """Return the answers to the queries of some images; the candidates stay the same.

        Args:
            images: bool [n_images].
        """
        return RetrievalHits(
            image_to_text={k: hits[images] for k, hits in self.image_to_text.items()},
            text_to_image={k: hits[images] for k, hits in self.text_to_image.items()},
            captions=self.captions[images],
        )

    def value(self, terms: Sequence[Term]) -> float:
        """Return the mean recall of the terms, in per cent."""
        recalls = []
        for term in terms:
            hits, n_queries = self._answers(term)
            recalls.append(100 * float(hits.sum() / n_queries.sum()))
        return fmean(recalls)

    def influence(self, terms: Sequence[Term]) -> NDArray[np.float64]:
        """Return float64 [n_images]: how far each image moves `value`, in points; the sum is 0."""
        moved = np.zeros(self.n_images)
        for hits, n_queries in map(self._answers, terms):
            share = hits.sum() / n_queries.sum()
            moved += 100 * (hits - share * n_queries) / n_queries.sum()
        return moved / len(terms)

    def shares(self, terms: Sequence[Term]) -> NDArray[np.float64]:
        """Return what each image adds to `value`, float64 [n_images], in points.

        The sum is `value`.
        """
        added = np.zeros(self.n_images)
        for hits, n_queries in map(self._answers, terms):
            added += 100 * hits / n_queries.sum()
        return added / len(terms)

    def _answers(self, term: Term) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the hits and the queries of each image."""
        direction, k = term
        # An image is one query of its own; its captions are one query each.
        if direction == "image_to_text":
            return self.image_to_text[k], np.ones(self.n_images)
        return self.text_to_image[k], self.captions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Hold a recall, its 95 % interval, and where its variance comes from."""

    value: float
    """In per cent."""
    low: float
    high: float
    seed_variance: float
    """Variance over seeds, in points squared."""
    image_variance: float
    """Variance over images, in points squared."""
    n_seeds: int
    n_images: int


def estimate_recall(runs: Sequence[RetrievalHits], terms: Sequence[Term]) -> Estimate:
    """Estimate the mean over seeds of a recall, with the variance over seeds and over images.

    Args:
        runs: the answers of each seed, all of them to the same images and captions.
        terms: the recalls whose mean is the metric.
    """
    values = [run.value(terms) for run in runs]
    # Averaged over seeds first: all seeds answer the same draw of images.
    influence = np.mean([run.influence(terms) for run in runs], axis=0)
    n_images = runs[0].n_images
    n_captions = int(runs[0].captions.sum())
    asks_images_only = all(direction == "image_to_text" for direction, _ in terms)
    n_queries = n_images if asks_images_only else n_captions
    return _estimate(
        values,
        image_variance=variance_over_images(influence),
        n_images=n_images,
        n_queries=n_queries,
    )


def estimate_from_recalls(values: Sequence[float], n_images: int) -> Estimate:
    """Estimate the mean over seeds of a recall, or of a mean of recalls, without single answers.

    The variance over images is then an upper bound, v (100 - v) / n. It counts all captions of an
    image as one query, and assumes that the recalls of a mean, and the seeds, rise and fall
    together. Images must have nearly the same number of captions.

    Args:
        values: the recall of each seed, in per cent.
        n_images: images that each of them was measured on.
    """
    mean = fmean(values)
    bound = mean * (100 - mean) / n_images
    return _estimate(values, image_variance=bound, n_images=n_images, n_queries=n_images)


def _estimate(
    values: Sequence[float],
    *,
    image_variance: float,
    n_images: int,
    n_queries: int,
) -> Estimate:
    n_seeds = len(values)
    seed_variance = variance(values) / n_seeds if n_seeds > 1 else 0.0
    degrees = satterthwaite([(seed_variance, n_seeds - 1), (image_variance, n_images - 1)])
    mean = fmean(values)
    low, high = share_interval(
        mean,
        seed_variance + image_variance,
        degrees=degrees,
        n_images=n_images,
        n_queries=n_queries,
    )
    return Estimate(
        value=mean,
        low=low,
        high=high,
        seed_variance=seed_variance,
        image_variance=image_variance,
        n_seeds=n_seeds,
        n_images=n_images,
    )


def share_interval(
    share: float,
    squared_error: float,
    *,
    degrees: float,
    n_images: int,
    n_queries: int,
) -> Ends:
    """Return Wilson's interval of a share with a known variance.

    Args:
        share: in per cent.
        squared_error: variance of `share`, in points squared.
        degrees: of freedom of that variance.
        n_images: the effective number of queries where no variance is seen.
        n_queries: the largest effective number of queries.
    """
    p = share / 100
    spread = p * (1 - p)
    # From points squared to shares squared.
    variance_of_p = squared_error / 1e4
    has_variance = spread > 0 and variance_of_p > 0
    effective = min(spread / variance_of_p, n_queries) if has_variance else n_images
    quantile = student_quantile(degrees)
    shrink = 1 + quantile**2 / effective
    center = (p + quantile**2 / (2 * effective)) / shrink
    half = quantile / shrink * math.sqrt(spread / effective + quantile**2 / (4 * effective**2))
    # Rounding must not leave the share itself outside its interval.
    low = min(p, max(0.0, center - half))
    high = max(p, min(1.0, center + half))
    return 100 * low, 100 * high


def count_interval(n_hits: int, n_trials: int) -> Ends:
    """Return Wilson's 95 % interval of a share of independent trials, in per cent."""
    ends = binomtest(n_hits, n_trials).proportion_ci(confidence_level=LEVEL, method="wilson")
    return 100 * float(ends.low), 100 * float(ends.high)


def accuracy_interval(accuracy: float, n_trials: int) -> Ends:
    """Return `count_interval` of an accuracy in per cent."""
    return count_interval(round(accuracy / 100 * n_trials), n_trials)


def variance_over_images(influence: NDArray[np.float64]) -> float:
    """Return n / (n - 1) times the sum of squares of influences that add up to 0.

    It is 0 for one image.
    """
    n_images = len(influence)
    if n_images <= 1:
        return 0.0
    return float(n_images / (n_images - 1) * np.square(influence).sum())


def smallest_variance(n_images: int) -> float:
    """Return the smallest variance of a paired difference on n images, in points squared.

    It is roughly that of one image answered otherwise. No such image among n does not prove that
    there are none: half a count is added to each cell of the table (Agresti and Min 2005, Simple
    improved confidence intervals for comparing matched proportions).
    """
    return (100 / (n_images + 2)) ** 2


def satterthwaite(parts: Iterable[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances of means.

    Args:
        parts: each variance with its own degrees of freedom. A variance without degrees of freedom
            (one seed, one image) is left out.
    """
    terms = [term for term in parts if term[1] > 0]
    total = sum(variance_of_mean for variance_of_mean, _ in terms)
    spread = sum(variance_of_mean**2 / degrees for variance_of_mean, degrees in terms)
    if spread > 0:
        return total**2 / spread
    return max((degrees for _, degrees in terms), default=1.0)


def student_quantile(degrees: float, level: float = LEVEL) -> float:
    """Return the two-sided quantile of Student's distribution, at 95 % by default."""
    return float(stdtrit(max(degrees, 1.0), (1 + level) / 2))


def student_p_value(difference: float, squared_error: float, degrees: float) -> float:
    """Return the two-sided p-value of a difference; 1 for no difference.

    Args:
        difference: in points.
        squared_error: variance of `difference`, in points squared.
        degrees: of freedom of that variance.
    """
    if difference == 0:
        return 1.0
    if squared_error <= 0:
        return 0.0
    t = -abs(difference) / math.sqrt(squared_error)
    return float(2 * stdtr(max(degrees, 1.0), t))


def sign_flip_p_value(
    differences: NDArray[np.float64],
    n_flips: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the p-value of a paired permutation test: how often random signs give as large a sum.

    Under the null hypothesis the two sides could be exchanged on each image. All signs are tried
    where that takes no more than `n_flips` sums; otherwise signs are drawn by `seed`, and the
    observed ones count as one draw, so that p is never 0 (Phipson and Smyth 2010).

    Args:
        differences: float64 [n], the difference on each image.
    """
    # A difference of 0 stays 0 under any sign.
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(float(moved.sum()))
    # A tolerance, because sums of the same numbers round differently.
    threshold = observed - 1e-9 * float(np.abs(moved).sum())
    if 2 ** len(moved) <= n_flips:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        all_signs = 1 - 2.0 * bits
        return float((np.abs(all_signs @ moved) >= threshold).mean())
    generator = np.random.default_rng(seed)
    n_larger = 0
    # In blocks, so that memory stays small on large splits.
    for begin in range(0, n_flips, 500):
        n_block = min(500, n_flips - begin)
        signs = 1 - 2.0 * generator.integers(0, 2, size=(n_block, len(moved)))
        n_larger += int((np.abs(signs @ moved) >= threshold).sum())
    return (n_larger + 1) / (n_flips + 1)
