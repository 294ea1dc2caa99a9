"""How often the rule of the laws is wrong: verdicts on made-up outcomes of which the truth is known.

    python -m benchmarks.laws.simulate            # writes results/laws-simulation.json
    python -m benchmarks.laws.simulate --quick    # a few trials, for a smoke test

Arms with three seeds each answer the same 1,000 images. An image has a difficulty that all arms and
seeds share, and every seed adds its own. The first arm's true recall differs from that of the others
by a share of their recall above chance, the effect; one of the effects is just what counts. Heads
alone are measured once, and every comparison passes the gate of what is testable.

Kinds of claims: an order of two arms; an order whose published difference lets less count; an order
of arms that reach just the half of heads alone, so that chance decides which trials are testable; an
equality; and a difference of differences.

Of an order `held` is false where the true difference is not above 0, and `broken` where it is at
least what counts. Of an equality `held` is false where the true difference is at least what counts,
and `broken` where it is not more. A true difference is missed where the right verdict is not given:
`held` of an order whose difference counts, `broken` of an order whose difference is not above 0, and
of an equality the same of differences below and above what counts. Shares of false, missed and
covered are of the trials that were testable. The former rule is applied to the same intervals.
"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from benchmarks.laws.law import Claim
from benchmarks.laws.outcome import Outcome, Ranks
from benchmarks.laws.testable import LEAST_OF_HEADS, why_not_testable
from benchmarks.laws.verdict import COUNTS, Judgement, Verdict, judge
from benchmarks.record import Goal, print_goals, print_table, write_result

LEVELS = (1.0, 3.0, 10.0, 30.0, 60.0)
"""True recall above chance of all arms but the first, in points."""
EFFECTS = (-0.2, 0.0, None, 0.2, 0.5)
"""True difference, as a share of that; None: just what counts."""
POWER_LEVEL = 10.0
POWER_EFFECT = 0.5
"""Where a true difference should be found in four of five trials."""
CHANCE = 0.5
MOST = 99.0
"""Highest recall of heads alone, in points."""
N_IMAGES = 1000
N_SEEDS = 3
SEED_SPREAD = 0.05
"""Standard deviation over seeds of an arm's recall, as a share of it."""
SHARED = 0.7
"""Correlation of an image's difficulty between arms and seeds."""
SMALLEST = 2.0
"""Points that counted in the former rule, and that still are the most that can count."""
RESAMPLES = 200
MOST_FALSE = 5.0
KEYS = tuple(f"{row:04d}" for row in range(N_IMAGES))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of claim. `heads`: level of heads alone as a multiple of the best arm's."""

    name: str
    claim: Claim
    heads: float = 1.0

    @property
    def share(self) -> float:
        """What counts, as a share of the best arm's recall above chance."""
        if self.claim.published is None:
            return COUNTS
        return min(COUNTS, self.claim.published / max(self.claim.figures) / 2)

    def counts_from(self, level: float, effect: float) -> float:
        """The true difference that counts, in points."""
        return min(SMALLEST, self.share * level * (1 + max(effect, 0.0)))

    def counting_effect(self, level: float) -> float:
        """The effect that is just what counts, of which itself is a part of the best level."""
        return min(SMALLEST / level, self.share / (1 - self.share))

    def right(self, level: float, effect: float) -> Verdict | None:
        """The right verdict; None where a difference is there and does not count, or just does."""
        counts = self.counts_from(level, effect)
        difference = abs(level * effect)
        counted = difference > counts or math.isclose(difference, counts)
        if not self.claim.equal:
            if effect <= 0:
                return "broken"
            return "held" if counted else None
        if not counted:
            return "held"
        return None if math.isclose(difference, counts) else "broken"

    def false(self, level: float, effect: float) -> tuple[Verdict, ...]:
        """The wrong verdicts; of an equality whose difference just counts both are."""
        match self.right(level, effect):
            case "held":
                return ("broken",)
            case "broken":
                return ("held",)
        return ("held", "broken") if self.claim.equal else ()


def claim_of(**given: Any) -> Claim:
    weights = {"a": 1.0, "b": -1.0}
    return Claim.model_validate(
        {"weights": weights, "metric": "recall", "smallest": SMALLEST, **given}
    )


KINDS = (
    Kind(name="order", claim=claim_of()),
    Kind(
        name="order, published",
        # L1, i > g: what counts is 4.5 % of the recall.
        claim=claim_of(figures=(75.4, 68.6), published=75.4 - 68.6),
    ),
    Kind(name="order at the gate", claim=claim_of(), heads=1 / LEAST_OF_HEADS),
    Kind(name="equality", claim=claim_of(equal=True)),
    Kind(
        name="difference of differences",
        claim=claim_of(weights={"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}),
    ),
)


def main() -> None:
    options = parse_arguments()
    trials = 5 if options.quick else options.trials
    planned = [
        (level, effect, trials_of(kind, level, effect, trials), kind)
        for kind in KINDS
        for level in LEVELS
        for effect in effects_of(kind, level)
    ]
    with ProcessPoolExecutor(max_workers=options.processes) as pool:
        rows = list(pool.map(simulate, *zip(*planned, strict=True)))
    print_table(rows)
    goals = goals_of(rows)
    if options.quick:
        return
    print_goals(goals)
    write_result("laws-simulation", goals=goals, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="False and missed verdicts of the laws' rule.")
    parser.add_argument(
        "--trials",
        type=int,
        default=1000,
        help="of each kind and level at 0 and at what just counts; of other effects a fifth",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def effects_of(kind: Kind, level: float) -> list[float]:
    """Without those whose heads alone would be right about more than all images."""
    found = [kind.counting_effect(level) if effect is None else effect for effect in EFFECTS]
    return [effect for effect in sorted(found) if _heads_level(kind, level, effect) <= MOST]


def trials_of(kind: Kind, level: float, effect: float, trials: int) -> int:
    """Most where a verdict is false most often: where nothing is there, and where it just counts."""
    is_edge = effect in (0.0, kind.counting_effect(level))
    return trials if is_edge else max(1, trials // 5)


def _heads_level(kind: Kind, level: float, effect: float) -> float:
    return CHANCE + kind.heads * level * (1 + max(effect, 0.0))


def simulate(level: float, effect: float, trials: int, kind: Kind = KINDS[0]) -> dict[str, Any]:
    """One row: shares of verdicts in per cent."""
    verdicts = list[str]()
    former = list[str]()
    covered = list[bool]()
    for trial in range(trials):
        # All numbers are whole and not below 0, as a seed must be.
        places = (KINDS.index(kind), round(100 * level), round(1e4 * (1 + effect)), trial)
        rng = np.random.default_rng(places)
        outcomes, heads = _made_up(kind, level, effect, rng)
        not_testable = why_not_testable(kind.claim, outcomes, heads)
        found = judge(kind.claim, outcomes, not_testable, resamples=RESAMPLES)
        verdicts.append(found.verdict)
        if found.verdict != "not testable":
            former.append(former_verdict(kind.claim, outcomes, found))
            assert found.low is not None
            assert found.high is not None
            covered.append(found.low <= level * effect <= found.high)
    tested = [verdict for verdict in verdicts if verdict != "not testable"]
    right = kind.right(level, effect)
    row: dict[str, Any] = {
        "claim": kind.name,
        "recall above chance": level,
        "true effect": f"{100 * effect:+.1f} %",
        "points": round(level * effect, 2),
        "counts from": round(kind.counts_from(level, effect), 2),
        "held": _percent(verdicts, "held"),
        "broken": _percent(verdicts, "broken"),
        "not decided": _percent(verdicts, "not decided"),
        "not testable": _percent(verdicts, "not testable"),
        "right": right or "",
        "missed": "" if right is None else round(100 - _percent(tested, right), 1),
        "false held": _percent(tested, "held") if "held" in kind.false(level, effect) else "",
        "false broken": _percent(tested, "broken") if "broken" in kind.false(level, effect) else "",
        "covered": round(100 * fmean(covered), 1) if covered else "",
        "trials": trials,
    }
    if kind == KINDS[0]:
        row |= {
            "former held": _percent(former, "held"),
            "former broken": _percent(former, "broken"),
        }
    return row


def _percent(verdicts: Sequence[str], name: str) -> float:
    return round(100 * verdicts.count(name) / len(verdicts), 1) if verdicts else 0.0


def _made_up(
    kind: Kind,
    level: float,
    effect: float,
    rng: np.random.Generator,
) -> tuple[dict[str, list[Outcome]], Outcome]:
    """Outcomes of the arms by seed, and of heads alone."""
    difficulty = rng.normal(size=N_IMAGES)
    outcomes = {}
    for arm in kind.claim.weights:
        points = CHANCE + level * (1 + effect if arm == "a" else 1)
        shares = [points / 100 * (1 + SEED_SPREAD * float(rng.normal())) for _ in range(N_SEEDS)]
        outcomes[arm] = [_outcome(share, difficulty, rng) for share in shares]
    return outcomes, _outcome(_heads_level(kind, level, effect) / 100, difficulty, rng)


def _outcome(share: float, difficulty: NDArray[np.float64], rng: np.random.Generator) -> Outcome:
    """Of an arm that has learnt."""
    p = min(0.99, max(1e-4, share))
    retrieval = Ranks(
        keys=KEYS,
        image=_ranks(p, difficulty, rng),
        text=_ranks(p, difficulty, rng),
        owners=tuple(range(N_IMAGES)),
    )
    return Outcome(
        digest="",
        about={},
        retrieval=retrieval,
        chance={"recall": CHANCE},
        loss=1.0,
        candidates=64,
        samples=6400,
    )


def _ranks(p: float, difficulty: NDArray[np.float64], rng: np.random.Generator) -> tuple[int, ...]:
    """0 for hits at all of R@1, 5 and 10, of which a share `p` is expected."""
    noise = rng.normal(size=len(difficulty))
    score = math.sqrt(SHARED) * difficulty + math.sqrt(1 - SHARED) * noise
    return tuple(np.where(score < ndtri(p), 0, 50).tolist())


def former_verdict(claim: Claim, outcomes: dict[str, list[Outcome]], found: Judgement) -> str:
    """The rule up to now: what counted was a number of points, or half of the recall if less."""
    assert found.difference is not None
    assert found.low is not None
    assert found.high is not None
    if found.why.startswith("no arm is above chance"):
        return "not decided"
    values = [[one.value("recall") or 0.0 for one in arm] for arm in outcomes.values()]
    best = max(fmean(row) for row in values)
    least = min(claim.smallest, best / 2)
    if found.low > 0 and found.difference >= claim.smallest:
        return "held"
    return "broken" if found.high < least or found.high < 0 else "not decided"


def goals_of(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Of each kind at most 5 % false at any level, and at one level and effect four of five found;
    covered by at least 90 % of 95 % intervals."""
    goals = list[Goal]()
    for kind in KINDS:
        own = [row for row in rows if row["claim"] == kind.name]
        for verdict in ("held", "broken"):
            shares = [row[f"false {verdict}"] for row in own if row[f"false {verdict}"] != ""]
            goals.append(
                Goal(
                    name=f"{kind.name}: false `{verdict}`, per cent, at the worst level",
                    value=max(shares),
                    target=MOST_FALSE,
                    better="lower",
                )
            )
        (missed,) = [
            row["missed"]
            for row in own
            if row["recall above chance"] == POWER_LEVEL
            and row["points"] == POWER_EFFECT * POWER_LEVEL
        ]
        goals.append(
            Goal(
                name=(
                    f"{kind.name}: effects of {100 * POWER_EFFECT:+.0f} % at {POWER_LEVEL:g} points "
                    "above chance that are missed, per cent"
                ),
                value=missed,
                target=20.0,
                better="lower",
            )
        )
    goals.append(
        Goal(
            name="true differences within the 95 % interval, per cent, at the worst level",
            value=min(row["covered"] for row in rows if row["covered"] != ""),
            target=90.0,
            better="higher",
        )
    )
    return goals


if __name__ == "__main__":
    main()
