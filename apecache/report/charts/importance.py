"""How much each setting of a sweep mattered, by Optuna's PED-ANOVA (Watanabe et al. 2023,
arXiv:2304.10255)."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from apecache.errors import MissingExtraError
from apecache.sweeps.samplers import frozen_trial
from apecache.sweeps.space import Dimension

FEWEST = 8
"""Trials below which nothing is said."""


def importances(
    dimensions: Mapping[str, Dimension],
    points: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
) -> dict[str, float]:
    """Shares that add up to 1, the largest first, of the settings that vary; empty for fewer than
    `FEWEST` trials or scores that are all the same.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None
    if len(points) < FEWEST or len(set(scores)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    varied = {
        name for name in dimensions if len({json.dumps(point.get(name)) for point in points}) > 1
    }
    study = optuna.create_study(direction="maximize")
    for point, score in zip(points, scores, strict=True):
        there = {name: value for name, value in point.items() if name in varied}
        study.add_trial(frozen_trial(optuna, dimensions=dimensions, values=there, score=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the evaluator experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}
