"""Probes: what a simple classifier finds in features of images or texts, before the head and after
it.

What falls from before to after is what the alignment gave up ("what is conserved", LilT section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from apecache.errors import DataError
from apecache.evaluate.labelled import LabelledFeatures

REGULARISATIONS = tuple(float(10**power) for power in np.arange(-4, 3.1, 0.5))
NEIGHBOURS = (1, 5, 10, 20, 50)
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Test accuracies in per cent, of the setting that was best on a fifth of the training rows:
    `regularisation` is scikit-learn's C, `neighbours` the k. `chance`: the share of the most
    frequent training class in the test."""

    linear: float
    linear_per_class: float
    regularisation: float
    knn: float
    neighbours: int
    chance: float
    n_train: int
    n_test: int
    n_classes: int


def probe_features(
    found: LabelledFeatures,
    train_split: str,
    split: str,
    seed: int = 0,
) -> tuple[ProbeReport, ProbeReport]:
    """Of the encoder's features and of the run's embeddings, learned on one split, measured on the
    other.

    Raises:
        DataError: as `probe` does.
    """
    rows = [
        [i for i, other in enumerate(found.splits) if other == name]
        for name in (train_split, split)
    ]
    train_labels, test_labels = ([found.labels[i] for i in chosen] for chosen in rows)

    def report(features: Tensor) -> ProbeReport:
        train, test = (features[chosen].float().cpu().numpy() for chosen in rows)
        return probe(
            train,
            train_labels=train_labels,
            test=test,
            test_labels=test_labels,
            seed=seed,
        )

    return report(found.features), report(found.embedded)


def probe(
    train: NDArray[np.floating],
    train_labels: Sequence[str],
    test: NDArray[np.floating],
    test_labels: Sequence[str],
    seed: int = 0,
) -> ProbeReport:
    """A linear probe (multinomial logistic regression on standardised features) and k nearest
    neighbours by cosine.

    Args:
        train, test: [n, dim], any scale.
        train_labels, test_labels: one class name each; every class of the test must occur in
            training.

    Raises:
        DataError: one class only, a class of the test without training images, or too few images to
            choose on.
    """
    classes, counts = np.unique(np.asarray(train_labels), return_counts=True)
    strange = sorted(set(test_labels) - set(classes.tolist()))
    if strange or len(classes) < 2:
        what = f"class {strange[0]!r} has no training rows" if strange else "one class only"
        raise DataError(f"no probe possible: {what}; give --probe-train-split another split")
    if counts.min() < 2 or round(VALIDATION_SHARE * len(train_labels)) < len(classes):
        raise DataError(
            f"{len(train_labels)} training rows of {len(classes)} classes are too few to choose on"
        )
    x = _standardised(train, test)[0]
    z = _standardised(train, test)[1]
    y = np.asarray(train_labels)
    split = StratifiedShuffleSplit(1, test_size=VALIDATION_SHARE, random_state=seed)
    fit, choose = next(split.split(x, y))
    c = max(
        REGULARISATIONS,
        key=lambda value: (_linear(value, x[fit], y[fit]).score(x[choose], y[choose]), -value),
    )
    ks = [k for k in NEIGHBOURS if k <= len(fit)]
    k = max(
        ks,
        key=lambda value: (_knn(value, train[fit], y[fit]).score(train[choose], y[choose]), value),
    )
    wanted = np.asarray(test_labels)
    linear = _linear(c, x, y).predict(z)
    per_class = [float((linear[wanted == name] == name).mean()) for name in np.unique(wanted)]
    frequent = classes[counts.argmax()]
    return ProbeReport(
        linear=100 * float((linear == wanted).mean()),
        linear_per_class=100 * float(np.mean(per_class)),
        regularisation=c,
        knn=100 * float(_knn(k, train, y).score(test, wanted)),
        neighbours=k,
        chance=100 * float((wanted == frequent).mean()),
        n_train=len(train),
        n_test=len(test),
        n_classes=len(classes),
    )


def _standardised(
    train: NDArray[np.floating],
    test: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wide = train.astype(np.float64)
    mean = wide.mean(0)
    deviation = wide.std(0)
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    return (wide - mean) / scale, (test.astype(np.float64) - mean) / scale


def _linear(c: float, x: NDArray[np.float64], y: NDArray[np.str_]) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000, tol=1e-3).fit(x, y)


def _knn(k: int, x: NDArray[np.floating], y: NDArray[np.str_]) -> KNeighborsClassifier:
    return KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x.astype(np.float32), y)
