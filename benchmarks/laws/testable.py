"""Whether a comparison can be decided at the size that was run."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.laws.law import COUNTED, PER_POINT, RETRIEVAL, SHIFTS, Claim, Metric
from benchmarks.laws.outcome import Outcome

LEFT = 0.8
"""Share of ln(candidates), the loss of a guess, below which the last epoch's loss must be."""
OF_HEADS = 0.5
"""Share of the recall above chance of heads alone that the best arm must reach."""
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

    A cost for each point of recall is one of what was learnt, so its arms must have learnt too.
    """
    if claim.metric in (*COUNTED, *SHIFTS):
        return ""
    reasons = [_unequal(outcomes), _unlearnt(outcomes), _too_low(claim, outcomes, heads_alone)]
    return "; ".join(reason for reason in reasons if reason)


def _unequal(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    trained = {arm: found[0] for arm, found in outcomes.items() if found[0].samples}
    if len({one.augmentation for one in trained.values()}) > 1:
        return "the arms saw images augmented in different ways"
    # What the law itself varies, a share of the steps or of the data, is divided out.
    samples = {round(one.samples / one.law_share) for one in trained.values()}
    if samples and max(samples) > 1.05 * min(samples):
        return f"the arms saw {min(samples):,} to {max(samples):,} samples"
    return ""


def _unlearnt(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    for arm, found in outcomes.items():
        if not found[0].samples or found[0].costs.get("trained", math.inf) <= FEW_PARAMETERS:
            continue
        losses = [one.loss for one in found]
        if None in losses:
            return f"the loss of {arm} was not recorded"
        guess = math.log(found[0].candidates)
        mean_loss = fmean(loss for loss in losses if loss is not None)
        if mean_loss > LEFT * guess:
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
    metric: Metric = "recall" if claim.metric in PER_POINT else claim.metric
    if metric not in RETRIEVAL:
        return ""
    if heads_alone is None or (reached := heads_alone.value(metric)) is None:
        return "what heads alone reach was not measured"
    values = [[one.value(metric) for one in found] for found in outcomes.values()]
    best = max(fmean(value for value in row if value is not None) for row in values)
    chance = heads_alone.chance.get(metric, 0.0)
    if best - chance < OF_HEADS * (reached - chance):
        return (
            f"the best arm reaches {best:.1f}, heads alone ({HEADS_ALONE}) {reached:.1f}, "
            f"chance is {chance:.1f}"
        )
    return ""
