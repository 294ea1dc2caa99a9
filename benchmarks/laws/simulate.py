"""How often the rule of the laws is wrong: verdicts on made-up outcomes of which the truth is known.

    python -m benchmarks.laws.simulate            # writes results/laws-simulation.json
    python -m benchmarks.laws.simulate --quick    # a few trials, for a smoke test

Two arms with three seeds each answer the same 1,000 images. An image has a difficulty that all arms
and seeds share, and every seed adds its own. The first arm's true recall lies above that of the
second by a share of the second's recall above chance. The claim is that the first one is better.
`broken` is false where the true effect is at least what counts; `held` is false where it is not
above 0. The former rule is applied to the same intervals.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from benchmarks.laws.law import Claim
from benchmarks.laws.outcome import Outcome, Ranks
from benchmarks.laws.verdict import COUNTS, Judgement, judge
from benchmarks.record import Goal, print_goals, print_table, write_result

LEVELS = (1.0, 3.0, 10.0, 30.0, 60.0)
"""True recall of the second arm above chance, in points."""
EFFECTS = (-0.2, 0.0, 0.1, 0.2, 0.5)
"""True difference, as a share of that."""
CHANCE = 0.5
N_IMAGES = 1000
N_SEEDS = 3
SEED_SPREAD = 0.05
"""Standard deviation over seeds of an arm's recall, as a share of it."""
SHARED = 0.7
"""Correlation of an image's difficulty between arms and seeds."""
SMALLEST = 2.0
"""Points that counted in the former rule, and that still are the most that can count. No difference
is published, so that a tenth of the level counts; a published one would let less count."""
RESAMPLES = 200
MOST_FALSE = 5.0
HERE = Path(__file__).parent


def main() -> None:
    options = parse_arguments()
    trials = 5 if options.quick else options.trials
    rows = [simulate(level, effect=effect, trials=trials) for level in LEVELS for effect in EFFECTS]
    print_table(rows)
    goals = goals_of(rows)
    if options.quick:
        return
    print_goals(goals)
    write_result("laws-simulation", goals=goals, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="False and missed verdicts of the laws' rule.")
    parser.add_argument("--trials", type=int, default=200, help="of each level and effect")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def simulate(level: float, effect: float, trials: int) -> dict[str, Any]:
    """One row: shares of verdicts in per cent."""
    claim = Claim(
        weights={"a": 1.0, "b": -1.0},
        metric="recall",
        smallest=SMALLEST,
    )
    shares = (CHANCE + level * (1 + effect)) / 100, (CHANCE + level) / 100
    verdicts = list[str]()
    former = list[str]()
    covered = list[bool]()
    for trial in range(trials):
        seed = int(1e6 * level + 1e3 * (effect + 1)) * 1000 + trial
        rng = np.random.default_rng(seed)
        difficulty = rng.normal(size=N_IMAGES)
        outcomes = {
            name: _arm(share, difficulty, rng) for name, share in zip("ab", shares, strict=True)
        }
        found = judge(claim, outcomes, resamples=RESAMPLES)
        verdicts.append(found.verdict)
        former.append(former_verdict(claim, outcomes, found))
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= level * effect <= found.high)
    return {
        "recall above chance": level,
        "true effect": f"{100 * effect:+.0f} %",
        "held": _percent(verdicts, "held"),
        "broken": _percent(verdicts, "broken"),
        "not decided": _percent(verdicts, "not decided"),
        "covered": round(100 * fmean(covered), 1),
        "former held": _percent(former, "held"),
        "former broken": _percent(former, "broken"),
        "trials": trials,
    }


def _percent(verdicts: list[str], name: str) -> float:
    return round(100 * verdicts.count(name) / len(verdicts), 1)


def _arm(share: float, difficulty: NDArray[np.float64], rng: np.random.Generator) -> list[Outcome]:
    found = []
    for seed in range(N_SEEDS):
        p = min(0.99, max(1e-4, share * (1 + SEED_SPREAD * float(rng.normal()))))
        image = _ranks(p, difficulty, rng)
        text = _ranks(p, difficulty, rng)
        keys = tuple(f"{row:04d}" for row in range(N_IMAGES))
        retrieval = Ranks(keys=keys, image=image, text=text, owners=tuple(range(N_IMAGES)))
        found.append(
            Outcome(
                digest=str(seed),
                about={},
                retrieval=retrieval,
                chance={"recall": CHANCE},
            )
        )
    return found


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


def goals_of(rows: list[dict[str, Any]]) -> list[Goal]:
    """At most 5 % false at any level; covered by at least 90 % of 95 % intervals."""
    false_broken = [row["broken"] for row in rows if _effect(row) >= COUNTS]
    false_held = [row["held"] for row in rows if _effect(row) <= 0]
    missed = [100 - row["held"] for row in rows if _effect(row) >= 0.5]
    return [
        Goal(
            name="false `broken`, per cent, at the worst level",
            value=max(false_broken),
            target=MOST_FALSE,
            better="lower",
        ),
        Goal(
            name="false `held`, per cent, at the worst level",
            value=max(false_held),
            target=MOST_FALSE,
            better="lower",
        ),
        Goal(
            name="effects of +50 % that are not held, per cent, at the best level",
            value=min(missed),
            target=20.0,
            better="lower",
        ),
        Goal(
            name="true differences within the 95 % interval, per cent, at the worst level",
            value=min(row["covered"] for row in rows),
            target=90.0,
            better="higher",
        ),
    ]


def _effect(row: dict[str, Any]) -> float:
    return float(row["true effect"].rstrip(" %")) / 100


if __name__ == "__main__":
    main()
