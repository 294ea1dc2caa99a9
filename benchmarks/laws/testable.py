"""Whether a comparison can be decided at the size that was run."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.laws.law import COUNTED, PER_POINT, SHIFTS, Claim, Metric
from benchmarks.laws.outcome import Outcome

MOST_LOSS = 0.8
"""Share of ln(candidates), the loss of a guess, below which the last epoch's loss must be."""
LEAST_OF_HEADS = 0.5
"""Share of the value above chance of heads alone that the best arm must reach."""
HEADS_ALONE = "cca"
"""Recipe of heads alone: a closed form, so that it depends on no schedule."""
FEW_PARAMETERS = 2
"""Temperature and bias: an arm that trains no more has no loss to lower."""


def why_not_testable(
    claim: Claim,
    outcomes: Mapping[str, Sequence[Outcome]],
    heads_alone: Outcome | None,
) -> str:
    """Say why the comparison cannot be decided, in one line; empty if it can.

    A cost for each point of recall, and how far norms moved, are of what was learnt, so the arms
    must have learnt too. Only what is counted needs no run.
    """
    if claim.metric in COUNTED:
        return ""
    trained = {arm: found[0].costs.get("trained") for arm, found in outcomes.items()}
    reasons = [
        why_not_smaller(claim, trained),
        _unequal(outcomes),
        _unlearnt(outcomes),
        _too_low(claim, outcomes, heads_alone),
    ]
    return "; ".join(reason for reason in reasons if reason)


def why_not_smaller(claim: Claim, trained: Mapping[str, float | None]) -> str:
    """Say which arm is not as small as the paper's; empty if all are.

    Args:
        claim: The claim, whose `smaller` names arms.
        trained: Parameters that each arm trains; None where they were not counted.
    """
    for small in claim.smaller:
        for other in claim.weights:
            if other in claim.smaller:
                continue
            n_small = trained.get(small)
            n_other = trained.get(other)
            if n_small is None or n_other is None:
                return "how many parameters its arms train was not counted"
            if n_small >= n_other:
                return (
                    f"the small arm, {small}, trains {_millions(n_small)} parameters and {other} "
                    f"{_millions(n_other)}"
                )
    return ""


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g} M"


def _has_steps(outcome: Outcome) -> bool:
    """Whether its recipe trains. Outcomes that are older than the count of samples have none."""
    recipe = outcome.about.get("recipe")
    schedule = recipe["schedule"] if isinstance(recipe, dict) else {}
    return bool(outcome.samples or schedule.get("epochs") or schedule.get("steps"))


def _unequal(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    trained = {arm: found[0] for arm, found in outcomes.items() if _has_steps(found[0])}
    if len({one.augmentation for one in trained.values()}) > 1:
        return "the arms saw images augmented in different ways"
    # What the law itself varies, a share of the steps or of the data, is divided out.
    samples = {round(one.samples / one.law_share) for one in trained.values()}
    if samples and max(samples) > 1.05 * min(samples):
        return f"the arms saw {min(samples):,} to {max(samples):,} samples"
    return ""


def _unlearnt(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    for arm, found in outcomes.items():
        few = found[0].costs.get("trained", math.inf) <= FEW_PARAMETERS
        if few or not _has_steps(found[0]):
            continue
        losses = [one.loss for one in found]
        if None in losses:
            return f"the loss of {arm} was not recorded"
        if not found[0].candidates:
            return f"the number of candidates of {arm} was not recorded"
        guess = math.log(found[0].candidates)
        mean_loss = fmean(loss for loss in losses if loss is not None)
        if mean_loss > MOST_LOSS * guess:
            return (
                f"{arm} has hardly learnt: its loss is {mean_loss:.2f}, and ln({found[0].candidates}) "
                f"is {guess:.2f}"
            )
    return ""


def _too_low(
    claim: Claim,
    outcomes: Mapping[str, Sequence[Outcome]],
    heads_alone: Outcome | None,
) -> str:
    if claim.metric in SHIFTS:
        # Heads alone have no norms that move.
        return ""
    metric = level_metric(claim)
    if heads_alone is None or (reached := heads_alone.value(metric)) is None:
        return unmeasured(metric)
    values = [[one.value(metric) for one in found] for found in outcomes.values()]
    best = max(fmean(value for value in row if value is not None) for row in values)
    chance = heads_alone.chance.get(metric, 0.0)
    if reached <= chance:
        return f"heads alone ({HEADS_ALONE}) reach {reached:.1f}, and chance is {chance:.1f}"
    if best - chance < LEAST_OF_HEADS * (reached - chance):
        return (
            f"the best arm reaches {best:.1f}, heads alone ({HEADS_ALONE}) {reached:.1f}, "
            f"chance is {chance:.1f}"
        )
    return ""


def level_metric(claim: Claim) -> Metric:
    """Return the metric on which heads alone are compared with the arms."""
    return "recall" if claim.metric in PER_POINT else claim.metric


def unmeasured(metric: Metric) -> str:
    return f"what heads alone reach was not measured ({metric})"
