"""Compute how much each setting of a sweep mattered, by Optuna's PED-ANOVA.

Source: Watanabe et al. 2023, arXiv:2304.10255.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from apecache.errors import MissingExtraError
from apecache.sweeps.samplers import frozen_trial
from apecache.sweeps.space import Dimension

FEWEST = 8
"""With fewer trials nothing is computed."""


def importances(
    dimensions: Mapping[str, Dimension],
    points: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
) -> dict[str, float]:
    """Return each varying setting's share of the importance, the largest first.

    Args:
        dimensions: how each setting was to be chosen, by name.
        points: the settings of each trial.
        scores: of the same trials, larger is better.

    Returns:
        Shares that add up to 1; nothing for fewer than `FEWEST` trials, or if all scores are equal.

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
    varied_names = set()
    for name in dimensions:
        # As JSON, in which 1, 1.0 and true differ, and lists can be members of a set.
        values = {json.dumps(point.get(name)) for point in points}
        if len(values) > 1:
            varied_names.add(name)
    study = optuna.create_study(direction="maximize")
    for point, score in zip(points, scores, strict=True):
        varied = {name: value for name, value in point.items() if name in varied_names}
        trial = frozen_trial(optuna, dimensions=dimensions, values=varied, score=score)
        study.add_trial(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the evaluator experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}
