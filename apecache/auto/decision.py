"""Decide between candidates, from simple to complex, on images that chose none of them.

Three things make a candidate look better than it is. The decision accounts for each:

- Its settings were the best of many on dev. So the images that decide are others.
- The seed that made a trial the best one was lucky, and a new fit does not keep that luck. So
  candidates are fitted again with other seeds, and the variance over seeds is in the interval.
- Several candidates try to replace the simplest one. So each interval holds the true difference
  with probability 1 - 0.05 / comparisons (Bonferroni).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apecache.evaluate.comparison import MetricDifference, compare_hits
from apecache.metrics.statistics import LEVEL, RetrievalHits

METRIC = "mean R@1"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hold one candidate of the decision."""

    name: str
    seeds: tuple[tuple[Path, ...], ...]
    """Its runs for each seed; several runs of one seed make an ensemble."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Report whether a candidate replaced a simpler one."""

    candidate: str
    against: str
    difference: MetricDifference
    """Its interval is that of `level`."""
    replaced: bool
    level: float
    """Share of intervals that hold the true difference, from 0 to 1."""


def decide(hits: Mapping[str, Sequence[RetrievalHits]]) -> list[Decision]:
    """Keep the simplest candidate unless a later one is better by the lower end of an interval.

    Args:
        hits: For each candidate, from simple to complex, the answers of each of its seeds to the
            same queries. No seed and no image may have chosen among the candidates.

    Returns:
        One decision for each candidate but the first.
    """
    names = list(hits)
    kept_name = names[0]
    n_comparisons = len(names) - 1
    decisions: list[Decision] = []
    for name in names[1:]:
        level = 1 - (1 - LEVEL) / n_comparisons
        difference = compare_hits(
            hits[name],
            hits[kept_name],
            metric=METRIC,
            chance=0.0,
            level=level,
        )
        decision = Decision(
            candidate=name,
            against=kept_name,
            difference=difference,
            replaced=difference.low > 0,
            level=level,
        )
        decisions.append(decision)
        if decision.replaced:
            kept_name = name
    return decisions


def kept_candidate(decisions: Sequence[Decision]) -> str:
    """Return the name of the candidate that is left after all decisions."""
    last = decisions[-1]
    return last.candidate if last.replaced else last.against
