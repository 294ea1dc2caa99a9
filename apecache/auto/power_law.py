"""Fit a power law with an offset to recalls at several numbers of training images.

    recall(n) = limit - scale * n ** -exponent

For a given exponent the other two follow from least squares, so that only the exponent is searched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXPONENTS = np.geomspace(0.05, 1.5, 60)
LEVELS = (2.5, 97.5)
"""Percentiles of a bootstrap that make a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Hold a fitted law. Recalls are in per cent."""

    limit: float
    """Recall with unlimited data, at most 100."""
    scale: float
    """At least 0: more data never hurts."""
    exponent: float

    def at(self, n_images: float) -> float:
        """Return the recall with `n_images` training images, within 0 and 100."""
        recall = self.limit - self.scale * n_images**-self.exponent
        return float(np.clip(recall, 0.0, 100.0))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predict a recall, with a 95 % interval by bootstrap over the fits."""

    n_images: int
    recall: float
    low: float
    high: float


def fit_power_law(n_images: Sequence[float], recalls: Sequence[float]) -> PowerLaw:
    """Fit the law by least squares.

    Args:
        n_images: Training images of each point; at least two different numbers.
        recalls: Recall of each point, in per cent.

    Raises:
        ValueError: fewer than two different numbers of images.
    """
    image_counts = np.asarray(n_images, np.float64)
    values = np.asarray(recalls, np.float64)
    if len(np.unique(image_counts)) < 2:
        raise ValueError("a law needs at least two different numbers of images")
    best: tuple[float, PowerLaw] | None = None
    # For a fixed exponent the law is linear: a grid cannot end in a local minimum.
    for exponent in EXPONENTS.tolist():
        law = _with_exponent(image_counts, values, exponent)
        predicted = law.limit - law.scale * image_counts**-exponent
        error = float(np.square(predicted - values).sum())
        if best is None or error < best[0]:
            best = (error, law)
    assert best is not None
    return best[1]


def _with_exponent(
    image_counts: NDArray[np.float64],
    values: NDArray[np.float64],
    exponent: float,
) -> PowerLaw:
    """Fit limit and scale, within their bounds."""
    decay = image_counts**-exponent
    centered = decay - decay.mean()
    scale = -float((centered * values).sum() / np.square(centered).sum())
    limit = float(values.mean() + scale * decay.mean())
    # Recalls that fall with more images are noise: the curve is flat then.
    if scale < 0:
        return PowerLaw(limit=float(values.mean()), scale=0.0, exponent=exponent)
    if limit > 100:
        # With the limit at its bound only the scale is left to fit.
        scale = float(((100 - values) * decay).sum() / np.square(decay).sum())
        return PowerLaw(limit=100.0, scale=scale, exponent=exponent)
    return PowerLaw(limit=limit, scale=scale, exponent=exponent)


def predict(
    recalls: Mapping[int, Sequence[float]],
    targets: Sequence[int],
    n_draws: int = 500,
    seed: int = 0,
) -> list[Prediction]:
    """Predict recalls with other numbers of images.

    Args:
        recalls: For each number of training images the recall of each seed, in per cent.
        targets: Numbers of images to predict.
        n_draws: Draws of the bootstrap: at each number of images, as many seeds as there are.
        seed: Seed of the draws.
    """
    law = _fit_all(recalls)
    generator = np.random.default_rng(seed)
    laws: list[PowerLaw] = []
    # Seeds are drawn anew within each size: sizes are chosen, and not random.
    for _ in range(n_draws):
        resampled: dict[int, list[float]] = {}
        for n_images, values in recalls.items():
            picks = generator.integers(0, len(values), len(values))
            resampled[n_images] = [values[pick] for pick in picks.tolist()]
        laws.append(_fit_all(resampled))
    predictions: list[Prediction] = []
    for target in targets:
        low, high = np.percentile([drawn_law.at(target) for drawn_law in laws], LEVELS).tolist()
        recall = law.at(target)
        prediction = Prediction(
            n_images=target,
            recall=recall,
            # Few seeds may give an interval beside the fit; it is widened to hold it.
            low=min(low, recall),
            high=max(high, recall),
        )
        predictions.append(prediction)
    return predictions


def _fit_all(recalls: Mapping[int, Sequence[float]]) -> PowerLaw:
    all_sizes: list[float] = []
    all_recalls: list[float] = []
    for n_images, of_seeds in recalls.items():
        all_sizes += [float(n_images)] * len(of_seeds)
        all_recalls += list(of_seeds)
    return fit_power_law(all_sizes, all_recalls)
