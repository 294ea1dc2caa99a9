"""Choose the points of a sweep by Optuna.

Random points and grids are those of `Space`: a random point depends on the seed and its number
alone, without an extra package, and Optuna's `GridSampler` repeats points where a condition leaves
settings out.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from apecache.errors import MissingExtraError
from apecache.fingerprint import Json
from apecache.sweeps.space import Dimension, Space, Value, Values
from apecache.sweeps.trials import Trial

JOURNAL = "optuna.journal"


def ask_optuna(
    out: Path,
    space: Space,
    seed: int,
    trials: Mapping[int, Trial],
    numbers: range,
) -> list[Values]:
    """Choose points by Optuna's tree-structured Parzen estimator.

    A sweep that was interrupted chooses the points that it would have chosen: the journal is made
    anew from the trials of earlier batches of trials, and each point has its own seed.

    Args:
        out: The folder of the sweep; the journal is written there.
        space: The space to choose from.
        seed: The seed of the sampler.
        trials: The finished trials by number; only those of earlier batches of trials count.
        numbers: The numbers of the trials to choose points for.

    Returns:
        A point for each number.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (out / JOURNAL).unlink(missing_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name="apecache", direction="maximize")
    earlier = []
    for number in sorted(trials):
        trial = trials[number]
        if number < numbers.start and trial.mean is not None:
            earlier.append(
                frozen_trial(
                    optuna,
                    dimensions=space.dimensions,
                    values=trial.values,
                    score=trial.mean,
                )
            )
    study.add_trials(earlier)
    points = []
    for number in numbers:
        with warnings.catch_warnings():
            # `constant_liar` keeps points of one batch apart; Optuna calls it experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                seed=seed * 1_000_003 + number,
                constant_liar=True,
            )
        optuna_trial = study.ask()
        suggest = partial(_suggest, optuna_trial)
        points.append(space.choose(suggest))
    return points


def frozen_trial(
    optuna: ModuleType,
    dimensions: Mapping[str, Dimension],
    values: Mapping[str, Json],
    score: float | None,
) -> Any:
    """Build a finished trial as Optuna keeps it.

    Args:
        optuna: The imported module.
        dimensions: The dimensions of the space, by name.
        values: The point of the trial.
        score: Its mean recall on dev, to be maximized.
    """
    params = {}
    distributions = {}
    for name, value in values.items():
        dimension = dimensions[name]
        # As JSON: Optuna takes no lists as choices.
        params[name] = value if dimension.choice is None else json.dumps(value)
        distributions[name] = _distribution(optuna, dimension)
    return optuna.trial.create_trial(params=params, distributions=distributions, value=score)


def _distribution(optuna: ModuleType, dimension: Dimension) -> Any:
    """Return Optuna's distribution of a dimension."""
    distributions = optuna.distributions
    if dimension.choice is not None:
        return distributions.CategoricalDistribution(_choices(dimension.choice))
    if dimension.int_ is not None:
        low_int, high_int = dimension.int_
        return distributions.IntDistribution(low_int, high_int)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return distributions.FloatDistribution(low, high, log=dimension.log is not None)


def _suggest(optuna_trial: Any, name: str, dimension: Dimension) -> Value:
    """Let Optuna choose the value of a dimension."""
    if dimension.choice is not None:
        text = optuna_trial.suggest_categorical(name, _choices(dimension.choice))
        return json.loads(text)
    if dimension.int_ is not None:
        low_int, high_int = dimension.int_
        return optuna_trial.suggest_int(name, low_int, high_int)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return optuna_trial.suggest_float(name, low, high, log=dimension.log is not None)


def _choices(values: Sequence[Value]) -> list[str]:
    return [json.dumps(value) for value in values]
