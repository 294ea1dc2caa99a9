"""The trials of a sweep: one line each in `trials.jsonl`, and their ranking."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apecache.fingerprint import Json
from apecache.metrics.statistics import estimate_from_recalls
from apecache.storage.replace import replace_text

logger = logging.getLogger(__name__)

TRIALS = "trials.jsonl"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Record one trial: its point of the space and its result. Recalls are in per cent."""

    number: int
    recipe: str
    settings: tuple[str, ...]
    """`section.key=value`, as `--set` takes them."""
    values: dict[str, Json]
    """The point of the space, by the names of its dimensions."""
    state: str
    """`done`, `stopped` by halving, or `failed` with its `error`."""
    epochs: int = 0
    recalls: tuple[float, ...] = ()
    """The best mean recall on dev of each seed."""
    mean: float | None = None
    low: float | None = None
    """Lower end of the 95 % interval of the mean, over seeds and dev images."""
    high: float | None = None
    error: str = ""
    chance: float | None = None
    """The mean recall of a random order; None in trials of older versions."""


def read_trials(out: Path) -> dict[int, Trial]:
    """Return the finished trials of a sweep's folder, by number."""
    path = out / TRIALS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    trials = {}
    for line in lines:
        trial = Trial(**json.loads(line))
        # JSON has lists alone; a trial that is read equals the one that was written.
        settings = tuple(trial.settings)
        recalls = tuple(trial.recalls)
        trials[trial.number] = replace(trial, settings=settings, recalls=recalls)
    return trials


def log_trial(trial: Trial) -> None:
    """Log a trial that ended: its mean recall, or its error as a warning."""
    settings = " ".join(trial.settings)
    if trial.mean is None:
        logger.warning("trial %d (%s) failed: %s", trial.number, settings, trial.error)
    else:
        logger.info(
            "trial %d (%s) %s: mean recall on dev %.1f %%",
            trial.number,
            settings,
            trial.state,
            trial.mean,
        )


def write_trials(out: Path, trials: Mapping[int, Trial]) -> None:
    """Write all trials into a sweep's folder, in the order of their numbers."""
    text = ""
    for number in sorted(trials):
        line = json.dumps(asdict(trials[number]), allow_nan=False)
        text += f"{line}\n"
    # The whole file at once: an interruption leaves the old file or the new one.
    replace_text(out / TRIALS, text)


def interval(recalls: Sequence[float], n_dev_images: int) -> dict[str, Any]:
    """Return the mean and its 95 % interval, as a trial has them."""
    estimate = estimate_from_recalls(recalls, n_dev_images)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def ranked(trials: dict[int, Trial]) -> list[Trial]:
    """Rank trials: done before stopped before failed ones, and within these by the mean on dev."""
    states = ("done", "stopped", "failed")

    def rank(trial: Trial) -> tuple[int, float, int]:
        return states.index(trial.state), -(trial.mean or 0.0), trial.number

    return sorted(trials.values(), key=rank)
