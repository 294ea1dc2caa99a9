"""Judge committed results again by the present rule, without new runs.

    python -m benchmarks.laws.rejudge      # changes results/L*.json; then run benchmarks.laws.render

Results that were made before losses were recorded hold no evidence that their arms had learnt, so
that nothing of them is testable but what is counted. Their differences and intervals stay. The
verdict of the rule that they were made under is kept beside the new one, under `former`. Runs with
recorded losses were judged from their outcomes when they were made; what the rule asks since then,
and a result can answer, is asked of them here. A law's own words are those of its file.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.laws.law import COUNTED, Claim, load_law
from benchmarks.laws.testable import unmeasured, why_not_smaller
from benchmarks.laws.verdict import verdict_of, why_open

RESULTS = Path(__file__).parent / "results"
AUGMENTED = frozenset(
    {
        *(f"lilt-{row}" for row in "bdeghijkmop"),
        "lilt-pattern-b",
        "shared-encoder",
        "see-hear-read",
    }
)
"""Recipes whose images were augmented when these results were made; `freeze/...` had no crop."""
NOT_RECORDED = "the losses of its arms were not recorded"
ASKED_SINCE = ("top1", "unseen")
"""Metrics on which heads alone are measured only since results say what they reach."""


def main() -> None:
    for path in sorted(RESULTS.glob("L*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        changed = rejudged(value)
        path.write_text(json.dumps(changed, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(path.name)


def rejudged(value: dict[str, Any]) -> dict[str, Any]:
    """The same result with present verdicts, and the former ones under `former`."""
    changed = {**value, "law": _rejudged_law(value["law"])}
    if "earlier" in value:
        earlier = []
        for run in value["earlier"]:
            earlier.append({**run, "law": _rejudged_law(run["law"])})
        changed["earlier"] = earlier
    if not value.get("former") and not _recorded_losses(value["law"]):
        changed["former"] = [
            {"name": one["name"], "metric": one["metric"], "verdict": one["judgement"]["verdict"]}
            for one in value["law"]["compared"]
        ]
    return changed


def _recorded_losses(law: dict[str, Any]) -> bool:
    """CPU time is recorded since losses are."""
    return bool(law.get("cpu_hours"))


def _rejudged_law(law: dict[str, Any]) -> dict[str, Any]:
    known = load_law(law["id"])
    claims = {(claim.name, claim.metric): claim for claim in known.claims()}
    compared = []
    for one in law["compared"]:
        claim = claims.get((one["name"], one["metric"]))
        judgement = one["judgement"]
        if claim is not None and judgement["difference"] is not None:
            judge = _judged_since if _recorded_losses(law) else _judged
            judgement = {**judgement, **judge(claim, one, law)}
        compared.append({**one, "judgement": judgement})
    words = {"claim": known.claim, "figure": known.figure, "missing": known.missing}
    return {**law, **words, "compared": compared}


def _judged_since(claim: Claim, one: dict[str, Any], law: dict[str, Any]) -> dict[str, str]:
    """Of a run with recorded losses: what is asked since it was made."""
    if claim.metric in COUNTED:
        return {}
    trained = {arm["name"]: arm["costs"].get("trained") for arm in law["arms"]}
    reasons = [why_not_smaller(claim, trained)]
    if claim.metric in ASKED_SINCE and one.get("heads_alone") is None:
        reasons.append(unmeasured(claim.metric))
    why = "; ".join(reason for reason in reasons if reason)
    judgement = one["judgement"]
    if not why or (judgement["verdict"] == "not testable" and why in judgement["why"]):
        return {}
    return {"verdict": "not testable", "why": why}


def _judged(claim: Claim, one: dict[str, Any], law: dict[str, Any]) -> dict[str, str]:
    """Of a run without recorded losses."""
    if claim.metric in COUNTED:
        least = claim.smallest
        if claim.published is not None:
            least = claim.published - claim.smallest
        low = one["judgement"]["low"]
        high = one["judgement"]["high"]
        verdict = verdict_of(claim, least, low, high)
        why = why_open(claim, least, low, high) if verdict == "not decided" else ""
        return {"verdict": verdict, "why": why}
    if claim.saves:
        # Costs for each point of recall: the points are those of arms that may not have learnt.
        return {"verdict": "not testable", "why": NOT_RECORDED}
    recipes = {arm["name"]: arm["about"].split(",")[0] for arm in law["arms"]}
    seen = {recipes.get(arm, "") in AUGMENTED for arm in claim.weights}
    reasons = ["the arms saw images augmented in different ways"] if len(seen) > 1 else []
    return {"verdict": "not testable", "why": "; ".join([*reasons, NOT_RECORDED])}


if __name__ == "__main__":
    main()
