"""Probe with a simple classifier what features of images or texts hold, before and after the head.

The drop from before to after is what the alignment lost ("what is conserved", LilT section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from apecache.arguments import require_integer
from apecache.errors import DataError
from apecache.evaluate.labeled import LabeledFeatures

REGULARIZATIONS = tuple(float(10**power) for power in np.arange(-4, 3.1, 0.5))
"""Values of scikit-learn's C to choose from."""
NEIGHBORS = (1, 5, 10, 20, 50)
"""Values of k to choose from."""
VALIDATION_SHARE = 0.2
"""Share of the training rows that C and k are chosen on."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Hold test accuracies in per cent, of the settings chosen on a fifth of the training rows."""

    linear: float
    linear_per_class: float
    """The mean over classes of the accuracy on each."""
    regularization: float
    """The chosen value of scikit-learn's C."""
    knn: float
    neighbors: int
    """The chosen k."""
    chance: float
    """Share of the most frequent training class in the test."""
    n_train: int
    n_test: int
    n_classes: int


def probe_features(
    found: LabeledFeatures,
    train_split: str,
    split: str,
    seed: int = 0,
) -> tuple[ProbeReport, ProbeReport]:
    """Probe the encoder's features and the run's embeddings.

    Args:
        found: features and embeddings of labeled images or texts.
        train_split: the split to learn on.
        split: the split to measure.
        seed: of the split into training and validation rows.

    Returns:
        The report of the features, and that of the embeddings.

    Raises:
        DataError: as `probe` does.
    """
    train_rows = _rows_of(found.splits, train_split)
    test_rows = _rows_of(found.splits, split)
    train_labels = [found.labels[row] for row in train_rows]
    test_labels = [found.labels[row] for row in test_rows]

    def report(features: Tensor) -> ProbeReport:
        return probe(
            features[train_rows].float().cpu().numpy(),
            train_labels=train_labels,
            test=features[test_rows].float().cpu().numpy(),
            test_labels=test_labels,
            seed=seed,
        )

    return report(found.features), report(found.embedded)


def _rows_of(splits: Sequence[str], name: str) -> list[int]:
    return [row for row, split in enumerate(splits) if split == name]


def probe(
    train: NDArray[np.floating],
    train_labels: Sequence[str],
    test: NDArray[np.floating],
    test_labels: Sequence[str],
    seed: int = 0,
) -> ProbeReport:
    """Measure a linear probe and k nearest neighbors by cosine.

    The linear probe is multinomial logistic regression on standardized features.

    Args:
        train: [n_train, dim], any scale.
        train_labels: the class name of each row.
        test: [n_test, dim], any scale.
        test_labels: the class name of each row; every class must occur in training.
        seed: of the split into training and validation rows.

    Raises:
        DataError: one class only, a class of the test without training images, or too few images to
            choose on.
    """
    require_integer(seed, "seed")
    classes, class_sizes = np.unique(np.asarray(train_labels), return_counts=True)
    strange = sorted(set(test_labels) - set(classes.tolist()))
    if strange or len(classes) < 2:
        fault = f"class {strange[0]!r} has no training rows" if strange else "one class only"
        raise DataError(f"no probe possible: {fault}; give --probe-train-split another split")
    if class_sizes.min() < 2 or round(VALIDATION_SHARE * len(train_labels)) < len(classes):
        raise DataError(
            f"{len(train_labels)} training rows of {len(classes)} classes are too few to choose on"
        )
    x, z = _standardized(train, test)
    y = np.asarray(train_labels)
    # Stratified, so that small classes are among the rows that C and k are chosen on.
    split = StratifiedShuffleSplit(1, test_size=VALIDATION_SHARE, random_state=seed)
    fit, choose = next(split.split(x, y))

    def linear_score(c: float) -> float:
        return float(_linear(c, x[fit], y[fit]).score(x[choose], y[choose]))

    def knn_score(k: int) -> float:
        return float(_knn(k, train[fit], y[fit]).score(train[choose], y[choose]))

    # Of equal scores the simplest classifier: the strongest regularization, the most neighbors.
    c = max(REGULARIZATIONS, key=lambda value: (linear_score(value), -value))
    ks = [k for k in NEIGHBORS if k <= len(fit)]
    k = max(ks, key=lambda value: (knn_score(value), value))
    test_targets = np.asarray(test_labels)
    linear = _linear(c, x, y).predict(z)
    per_class = [
        float((linear[test_targets == name] == name).mean()) for name in np.unique(test_targets)
    ]
    frequent = classes[class_sizes.argmax()]
    return ProbeReport(
        linear=100 * float((linear == test_targets).mean()),
        linear_per_class=100 * float(np.mean(per_class)),
        regularization=c,
        knn=100 * float(_knn(k, train, y).score(test, test_targets)),
        neighbors=k,
        chance=100 * float((test_targets == frequent).mean()),
        n_train=len(train),
        n_test=len(test),
        n_classes=len(classes),
    )


def _standardized(
    train: NDArray[np.floating],
    test: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standardize both by the mean and deviation of `train`."""
    wide = train.astype(np.float64)
    mean = wide.mean(0)
    deviation = wide.std(0)
    # A constant feature is not divided by its rounding error.
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    standardized_train = (wide - mean) / scale
    standardized_test = (test.astype(np.float64) - mean) / scale
    return standardized_train, standardized_test


def _linear(c: float, x: NDArray[np.float64], y: NDArray[np.str_]) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000, tol=1e-3).fit(x, y)


def _knn(k: int, x: NDArray[np.floating], y: NDArray[np.str_]) -> KNeighborsClassifier:
    # Brute force, because scikit-learn's search trees have no cosine.
    classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    return classifier.fit(x.astype(np.float32), y)
