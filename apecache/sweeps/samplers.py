"""The points of the space that a sweep tries: at random, from a grid, or by Optuna."""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
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
    """Points by Optuna's tree-structured Parzen estimator, from the trials of earlier waves. The
    journal is made anew from them, and each point has a seed of its own, so that a sweep that goes
    on chooses what it would have chosen."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (out / JOURNAL).unlink(missing_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name="apecache", direction="maximize")
    earlier = [
        trials[number]
        for number in sorted(trials)
        if number < numbers.start and trials[number].mean is not None
    ]
    study.add_trials(
        [
            frozen_trial(optuna, dimensions=space.dimensions, values=trial.values, score=trial.mean)
            for trial in earlier
        ]
    )
    chosen = []
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(
                seed=seed * 1_000_003 + number,
                constant_liar=True,
            )
        asked = study.ask()
        suggest = partial(_suggest, asked)
        chosen.append(space.choose(suggest))
    return chosen


def frozen_trial(
    optuna: Any,
    dimensions: Mapping[str, Dimension],
    values: Mapping[str, Json],
    score: float | None,
) -> Any:
    """A finished trial as Optuna keeps it; choices are told apart by their JSON."""
    named = {name: dimensions[name] for name in values}
    params = {n: json.dumps(v) if named[n].choice is not None else v for n, v in values.items()}
    distributions = {name: _distribution(optuna, dimension) for name, dimension in named.items()}
    return optuna.trial.create_trial(params=params, distributions=distributions, value=score)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if dimension.choice is not None:
        return kinds.CategoricalDistribution([json.dumps(value) for value in dimension.choice])
    if dimension.int_ is not None:
        return kinds.IntDistribution(*dimension.int_)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return kinds.FloatDistribution(low, high, log=dimension.log is not None)


def _suggest(asked: Any, name: str, dimension: Dimension) -> Value:
    if dimension.choice is not None:
        return json.loads(
            asked.suggest_categorical(name, [json.dumps(value) for value in dimension.choice])
        )
    if dimension.int_ is not None:
        return asked.suggest_int(name, *dimension.int_)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return asked.suggest_float(name, low, high, log=dimension.log is not None)
