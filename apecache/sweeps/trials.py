"""What a sweep found: its trials, one line each in `trials.jsonl`, and how they are ranked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apecache.fingerprint import Json
from apecache.metrics.statistics import estimate_from_recalls
from apecache.storage.atomic import replace_text

TRIALS = "trials.jsonl"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`recalls`: best mean recall on dev of each seed; `low`, `high`: 95 % interval of their mean
    over seeds and dev images. `chance`: what a random order would have; None in trials of older
    versions. `state`: `done`, `stopped` by halving, or `failed` with its `error`."""

    number: int
    recipe: str
    settings: tuple[str, ...]
    values: dict[str, Json]
    state: str
    epochs: int = 0
    recalls: tuple[float, ...] = ()
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    error: str = ""
    chance: float | None = None


def read_trials(out: Path) -> dict[int, Trial]:
    """The finished trials of a sweep's folder, by number."""
    path = out / TRIALS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Trial(**json.loads(line)) for line in lines]
    return {
        t.number: replace(t, settings=tuple(t.settings), recalls=tuple(t.recalls)) for t in found
    }


def write_trials(out: Path, trials: Mapping[int, Trial]) -> None:
    lines = (json.dumps(asdict(trials[number]), allow_nan=False) for number in sorted(trials))
    replace_text(out / TRIALS, "".join(f"{line}\n" for line in lines))


def interval(recalls: Sequence[float], n_dev_images: int) -> dict[str, Any]:
    """Return the mean and its 95 % interval, as a trial has them."""
    estimate = estimate_from_recalls(recalls, n_dev_images)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def ranked(trials: dict[int, Trial]) -> list[Trial]:
    """Whole trials before stopped ones before failed ones; then by their mean on dev."""
    states = ("done", "stopped", "failed")
    return sorted(
        trials.values(),
        key=lambda t: (states.index(t.state), -(t.mean or 0.0), t.number),
    )
