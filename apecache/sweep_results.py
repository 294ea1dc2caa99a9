"""What a sweep found: its trials, one line each in `trials.jsonl`, and how they are ranked."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from apecache.durable import replace_text
from apecache.fingerprint import Json

TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """`recalls`: best mean recall on dev of each seed; `low`, `high`: 95 % interval of their mean (Student; None for
    one seed). `state`: `done`, `stopped` by halving, or `failed` with its `error`."""

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


def read_trials(out: Path) -> dict[int, Trial]:
    """The finished trials of a sweep's folder, by number."""
    path = out / TRIALS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Trial(**json.loads(line)) for line in lines]
    return {t.number: replace(t, settings=tuple(t.settings), recalls=tuple(t.recalls)) for t in found}


def write_trials(out: Path, trials: Mapping[int, Trial]) -> None:
    lines = (json.dumps(asdict(trials[number]), allow_nan=False) for number in sorted(trials))
    replace_text(out / TRIALS, "".join(f"{line}\n" for line in lines))


def interval(recalls: Sequence[float]) -> dict[str, Any]:
    """Mean and the 95 % interval of the mean, as a trial has them."""
    mean, n = fmean(recalls), len(recalls)
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(n - 1, 0.975)) * stdev(recalls) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ranked(trials: dict[int, Trial]) -> list[Trial]:
    """Whole trials before stopped ones before failed ones; then by their mean on dev."""
    states = ("done", "stopped", "failed")
    return sorted(trials.values(), key=lambda t: (states.index(t.state), -(t.mean or 0.0), t.number))
