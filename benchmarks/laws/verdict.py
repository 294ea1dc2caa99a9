"""From outcomes to verdicts: differences with intervals, what could be seen at all, held, broken,
not decided or not testable.

A comparison is testable only if its arms could show the published order at this size. Every arm
that trains weights has lowered its loss clearly below that of a guess, ln(candidates); all arms saw
the same augmentation, and as many samples as the law gives them; and the best arm reaches, above
chance, a stated share of what heads alone reach on the cached features (`testable.py`). What counts
as a difference is a share of recall above chance, so that it shrinks with the level.

A difference is paired: the arms answer the same queries with the same seeds. Its 95 % interval has
two sources: the spread of the difference over seeds (Student), and resampling of the images, each
with its captions, the same ones for all arms and seeds (bootstrap; candidates stay as they are).
The variances are added, and the degrees of freedom are Satterthwaite's. Arms that answer all
queries alike have no interval of "0 to 0": the variance over images is at least that of one image
answered otherwise. With one seed the interval speaks of the images alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, variance
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from apecache.metrics.statistics import satterthwaite, smallest_variance, student_quantile
from benchmarks.laws.law import COUNTED, SHIFTS, Claim
from benchmarks.laws.outcome import Outcome, Part

RESAMPLES = 1000
POWER = 0.8
DISAGREE = 0.25
"""Assumed before running: the variance over images of a paired difference of two arms, for scores
from 0 to 1; a quarter of the queries answered otherwise by one of them has it."""
SEED_SPREAD = 1.0
"""Assumed before running: the standard deviation over seeds of one arm, in points."""
SHIFT_SPREAD = 0.1
SAVING_SPREAD = 5.0
"""The same of correlations, and of savings in per cent where a measured recall or time is a part of
them."""
ABOVE_CHANCE = 2.0
"""Standard errors that one of the arms must be above chance."""
COUNTS = 0.1
"""Smallest difference that counts, as a share of the best arm's recall above chance."""
Verdict = Literal["held", "broken", "not decided", "not testable"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`difference`: with its interval `low` to `high`, None where it was not measured. `source`:
    what the interval speaks of. `why`: of a verdict that needs a word."""

    verdict: Verdict
    why: str = ""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""
    n_seeds: int = 0
    n_images: int = 0


def detectable(claim: Claim, n_images: int, n_seeds: int) -> float:
    """The smallest true difference that runs of this size find in four of five cases, under the
    assumptions above; 0 for what is counted."""
    if claim.metric in COUNTED:
        return 0.0
    shares = not (claim.saves or claim.metric in SHIFTS)
    n_arms = len(claim.weights)
    of_images = 1e4 * DISAGREE * n_arms / 2 / n_images if shares else 0.0
    if shares:
        spread = SEED_SPREAD
    elif claim.saves:
        spread = SAVING_SPREAD
    else:
        spread = SHIFT_SPREAD
    of_seeds = n_arms * spread**2 / n_seeds
    degrees = satterthwaite([(of_seeds, n_seeds - 1), (of_images, n_images - 1)])
    return float(stdtrit(degrees, 0.975) + stdtrit(degrees, POWER)) * math.sqrt(
        of_seeds + of_images
    )


def judge(
    claim: Claim,
    outcomes: Mapping[str, Sequence[Outcome]],
    not_testable: str = "",
    resamples: int = RESAMPLES,
) -> Judgement:
    """`outcomes`: of each arm by seed, all of them done; one where all seeds are the same.
    `not_testable`: why the comparison cannot be decided at this size, see `testable.py`; what was
    measured is reported all the same."""
    n_seeds = min((len(found) for found in outcomes.values() if len(found) > 1), default=1)
    values = [
        [one.value(claim.metric) for one in _seeds(outcomes[arm], n_seeds)] for arm in claim.weights
    ]
    known = [[value for value in row if value is not None] for row in values]
    if any(len(row) < n_seeds for row in known):
        return Judgement(
            verdict="not decided",
            why="an arm has no value: a recall of 0, or too few norms",
            n_seeds=n_seeds,
        )
    differences = [claim.difference([row[seed] for row in known]) for seed in range(n_seeds)]
    replicates, n_images = _replicates(claim, outcomes, n_seeds, resamples)
    difference, half, source = _interval(
        claim,
        differences=differences,
        replicates=replicates,
        n_images=n_images,
    )
    low = difference - half
    high = difference + half
    least = _least(claim, known, _chance(claim, outcomes))
    verdict = verdict_of(claim, least, low, high)
    why = why_open(claim, least, low, high) if verdict == "not decided" else ""
    if reason := _undecidable(claim, outcomes, source):
        verdict = "not decided"
        why = reason
    if not_testable:
        verdict = "not testable"
        why = not_testable
    return Judgement(
        verdict=verdict,
        why=why,
        difference=difference,
        low=low,
        high=high,
        source=source,
        n_seeds=n_seeds,
        n_images=n_images,
    )


def _chance(claim: Claim, outcomes: Mapping[str, Sequence[Outcome]]) -> float:
    return max(one.chance.get(claim.metric, 0.0) for found in outcomes.values() for one in found)


def _least(claim: Claim, values: Sequence[Sequence[float]], chance: float) -> float:
    """The smallest difference that counts. Of recalls it is a share of what the best arm reaches
    above chance, at most half of the published difference in proportion to the published level, and
    at most the law's own figure."""
    if claim.saves and claim.published is not None:
        # As much as is published, up to what counts.
        return claim.published - claim.smallest
    if claim.saves or claim.metric in SHIFTS:
        return claim.smallest
    level = max(0.0, max(fmean(row) for row in values) - chance)
    share = COUNTS
    top = max(claim.figures, default=0.0)
    if claim.published and not claim.equal and top > 0:
        share = min(share, abs(claim.published) / top / 2)
    return min(claim.smallest, share * level)


def verdict_of(claim: Claim, least: float, low: float, high: float) -> Verdict:
    """Of an order: held where the interval lies above 0 and its middle is at least `least`, broken
    where it holds nothing that counts and is not above 0. Of an equality: held where the interval lies
    within `least` of 0, broken where it lies beyond."""
    if claim.equal:
        if -least < low and high < least:
            return "held"
        return "broken" if low > least or high < -least else "not decided"
    if low > 0 and (low + high) / 2 >= least:
        return "held"
    if claim.saves and claim.published is not None:
        # It saves less than is published. That may be a choice of ours, such as a width.
        return "broken" if high < 0 else "not decided"
    # A difference that is there, but too small to count, does not break an order.
    return "broken" if low <= 0 and high < max(0.0, least) else "not decided"


def why_open(claim: Claim, least: float, low: float, high: float) -> str:
    if claim.saves and claim.published is not None:
        return f"it saves {(low + high) / 2:.1f} %, and {claim.published:.1f} % are published"
    if not claim.equal and low > 0:
        return f"there is a difference, but it is smaller than what counts, {least:.2f}"
    return (
        f"the interval {'reaches' if claim.equal else 'holds 0 and'} differences that would "
        "count at this level"
    )


def _undecidable(claim: Claim, outcomes: Mapping[str, Sequence[Outcome]], source: str) -> str:
    if source == "nothing":
        return "one seed of what has no queries: there is no interval"
    shares = [
        [part for one in found for part in one.parts(claim.metric)] for found in outcomes.values()
    ]
    if not all(shares):
        return ""
    chance = _chance(claim, outcomes)
    best = max(fmean(part.value for part in parts) for parts in shares)
    n = min(len(part.keys) for parts in shares for part in parts)
    error = 100 * math.sqrt(max(chance, 1e-9) / 100 * (1 - chance / 100) / n)
    learnt = best > chance + ABOVE_CHANCE * error
    return "" if learnt else "no arm is above chance, so nothing was learnt to be compared"


def _seeds(found: Sequence[Outcome], n_seeds: int) -> Sequence[Outcome]:
    return found[:n_seeds] if len(found) > 1 else [found[0]] * n_seeds


def _interval(
    claim: Claim,
    differences: list[float],
    replicates: NDArray[np.float64] | None,
    n_images: int,
) -> tuple[float, float, str]:
    """(difference, half of the interval, what it speaks of)."""
    n_seeds = len(differences)
    mean = fmean(differences)
    if claim.metric in COUNTED:
        return mean, 0.0, "counted, exact"
    of_seeds = variance(differences) / n_seeds if n_seeds > 1 else 0.0
    of_images = (
        0.0
        if replicates is None
        else max(float(replicates.var(ddof=1)), smallest_variance(n_images))
    )
    if n_seeds == 1 and replicates is None:
        return mean, 0.0, "nothing"
    degrees = satterthwaite([(of_seeds, n_seeds - 1), (of_images, n_images - 1)])
    names = ("seeds",) * (n_seeds > 1) + ("images",) * (replicates is not None)
    return mean, student_quantile(degrees) * math.sqrt(of_seeds + of_images), " and ".join(names)


def _replicates(
    claim: Claim,
    outcomes: Mapping[str, Sequence[Outcome]],
    n_seeds: int,
    resamples: int = RESAMPLES,
) -> tuple[NDArray[np.float64] | None, int]:
    """The mean difference over seeds in each resample of the images, and how many images there
    are."""
    parts = list[Part]()
    weights = list[float]()
    for arm, weight in claim.weights.items():
        own = [part for one in _seeds(outcomes[arm], n_seeds) for part in one.parts(claim.metric)]
        parts += own
        weights += [weight / len(own) for _ in own]
    known = {part.keys for part in parts}
    keys = sorted(set[str]().union(*known))
    if not keys:
        return None, 0
    places = {key: place for place, key in enumerate(keys)}
    rows = {part_keys: [places[key] for key in part_keys] for part_keys in known}
    # Arms that answer the same queries have the same divisor in every resample, so that their hits
    # can be added up before.
    hits_of = dict[bytes, NDArray[np.float64]]()
    counts_of = dict[bytes, NDArray[np.float64]]()
    for part, weight in zip(parts, weights, strict=True):
        counts = np.zeros(len(keys))
        counts[rows[part.keys]] = part.counts
        queries = counts.tobytes()
        counts_of[queries] = counts
        hits = hits_of.setdefault(queries, np.zeros(len(keys)))
        hits[rows[part.keys]] += weight * part.hits
    # In one product, because reading the draws takes longer than what is computed from them.
    sums = _draws(len(keys), resamples) @ np.column_stack(
        [*hits_of.values(), *counts_of.values()],
    )
    hit_sums, count_sums = np.hsplit(sums, 2)
    return 100 * (hit_sums / np.maximum(count_sums, 1)).sum(1), len(keys)


@lru_cache(maxsize=4)
def _draws(n_images: int, resamples: int) -> NDArray[np.float64]:
    """How often each image is in each resample, [resamples, images]."""
    draws = np.random.default_rng(0).multinomial(
        n_images,
        np.full(n_images, 1 / n_images),
        resamples,
    )
    return draws.astype(np.float64)
