"""What a job has given: ranks, from which every metric is made, and costs. One JSON file each, in
`outcomes/`."""

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.errors import RunError
from apecache.fingerprint import Json
from apecache.storage.replace import replace_text
from benchmarks.laws.law import COUNTED, PER_POINT, SHIFTS, Metric

KS = (1, 5, 10)
FOLDER = "outcomes"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Of one set of queries, 0 is first. `keys` [n]: of the images; `image`: ranks of their best
    own caption (of a labeled image: of its class); `text` [m]: ranks of the captions' images, and
    `owners` their places in `keys`."""

    keys: tuple[str, ...]
    image: tuple[int, ...]
    text: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A share in the making: `hits` and `counts` of each image [n], named by `keys`."""

    keys: tuple[str, ...]
    hits: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def value(self) -> float:
        """In per cent."""
        return float(100 * self.hits.sum() / self.counts.sum())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`error`: why the run failed; then nothing else is known. `languages`: ranks among each one's
    captions. `shifts`: correlations of LAW metrics. `costs`: counted metrics, and `seconds` and
    `peak` (bytes) as measured. `chance`: of the metrics that were measured, in per cent. `seconds`:
    of all, extraction for the first job included; `cpu_seconds`: the same of this process's CPU
    time, on all its threads. `loss`: mean of the last epoch, of the contrastive term alone, among
    `candidates`; `samples`: pairs that the training went through, of which the law itself gives the
    arm `law_share`; `augmentation`: of the recipe."""

    digest: str
    about: dict[str, Json]
    error: str = ""
    retrieval: Ranks | None = None
    labels: Ranks | None = None
    languages: dict[str, Ranks] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    heads_alone: bool = False
    loss: float | None = None
    candidates: int = 0
    samples: int = 0
    law_share: float = 1.0
    augmentation: str = ""

    def has(self, metric: str) -> bool:
        if self.error:
            return False
        match metric:
            case "top1":
                return self.labels is not None
            case "unseen":
                return bool(self.languages)
            case "image-shift-rises" | "text-shift-falls":
                return metric in self.shifts
            case _ if metric in COUNTED:
                return metric in self.costs
            case _ if metric in PER_POINT:
                return self.retrieval is not None and _cost_of(metric) in self.costs
        return self.retrieval is not None

    def parts(self, metric: Metric) -> tuple[Part, ...]:
        """The metric is the mean of their values; none for what is no share of queries."""
        match metric:
            case "tr" | "ir" | "recall" | "r1" if self.retrieval:
                ks = (1,) if metric == "r1" else KS
                both = (_to_text(self.retrieval, ks), _to_image(self.retrieval, ks))
                if metric in ("recall", "r1"):
                    return both
                if metric == "tr":
                    return both[:1]
                return both[1:]
            case "top1" if self.labels:
                return (_to_text(self.labels, (1,)),)
            case "unseen":
                found = self.languages.values()
                return tuple(
                    part for ranks in found for part in (_to_text(ranks, KS), _to_image(ranks, KS))
                )
        return ()

    def value(self, metric: Metric) -> float | None:
        """None where it was not measured."""
        if not self.has(metric):
            return None
        if parts := self.parts(metric):
            return sum(part.value for part in parts) / len(parts)
        if metric in SHIFTS:
            return self.shifts[metric]
        if metric in COUNTED:
            return self.costs[metric]
        points = self.value("recall")
        return self.costs[_cost_of(metric)] / points if points else None


def _cost_of(metric: str) -> str:
    return {
        "flops-per-point": "total-flops",
        "seconds-per-point": "seconds",
        "bytes-per-point": "peak-bytes",
    }[metric]


def _to_text(ranks: Ranks, ks: tuple[int, ...]) -> Part:
    return Part(keys=ranks.keys, hits=_hits(ranks.image, ks), counts=np.ones(len(ranks.keys)))


def _to_image(ranks: Ranks, ks: tuple[int, ...]) -> Part:
    owners = np.array(ranks.owners)
    n = len(ranks.keys)
    hits = np.bincount(owners, _hits(ranks.text, ks), minlength=n).astype(np.float64)
    return Part(
        keys=ranks.keys,
        hits=hits,
        counts=np.bincount(owners, minlength=n).astype(np.float64),
    )


@lru_cache(maxsize=256)
def _hits(ranks: tuple[int, ...], ks: tuple[int, ...]) -> NDArray[np.float64]:
    """Cached, because a judgement asks several times for the hits of the same ranks."""
    found = np.array(ranks)[:, None] < np.array(ks)
    hits: NDArray[np.float64] = found.mean(1, dtype=np.float64)
    hits.setflags(write=False)
    return hits


def save_outcome(outcome: Outcome, work: Path) -> None:
    """The whole file at once."""
    (work / FOLDER).mkdir(parents=True, exist_ok=True)
    replace_text(
        work / FOLDER / f"{outcome.digest}.json",
        json.dumps(asdict(outcome), allow_nan=False) + "\n",
    )


def load_outcome(digest: str, work: Path) -> Outcome | None:
    """None where there is none. Raises RunError for a damaged file."""
    path = work / FOLDER / f"{digest}.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for name in ("retrieval", "labels"):
            value[name] = value[name] and _ranks(value[name])
        value["languages"] = {name: _ranks(ranks) for name, ranks in value["languages"].items()}
        return Outcome(**value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged ({str(error).splitlines()[0]}); remove it to run this job again"
        ) from None


def _ranks(value: dict[str, list[Json]]) -> Ranks:
    return Ranks(**{name: tuple(values) for name, values in value.items()})
