"""Judge committed results again by the present rule, without new runs.

    python -m benchmarks.laws.rejudge      # changes results/L*.json; then run benchmarks.laws.render

Results that were made before losses were recorded hold no evidence that their arms had learnt, so
that none of their recalls is testable. Their differences and intervals stay. The verdict of the rule
that they were made under is kept beside the new one, under `former`. Runs with recorded losses
were judged by all of the rule when they were made, and stay as they are.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.laws.law import COUNTED, SHIFTS, Claim, load_law
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
    if _recorded_losses(law):
        return law
    claims = {(claim.name, claim.metric): claim for claim in load_law(law["id"]).claims()}
    recipes = {arm["name"]: arm["about"].split(",")[0] for arm in law["arms"]}
    compared = []
    for one in law["compared"]:
        claim = claims.get((one["name"], one["metric"]))
        judgement = one["judgement"]
        if claim is not None and judgement["difference"] is not None:
            judgement = {**judgement, **_judged(claim, judgement, recipes)}
        compared.append({**one, "judgement": judgement})
    return {**law, "compared": compared}


def _judged(claim: Claim, judgement: dict[str, Any], recipes: dict[str, str]) -> dict[str, str]:
    low = judgement["low"]
    high = judgement["high"]
    if claim.saves or claim.metric in (*COUNTED, *SHIFTS):
        if judgement["verdict"] == "not decided" and claim.metric in SHIFTS:
            return {}
        measured_part = claim.saves and claim.metric not in COUNTED
        if measured_part:
            # Costs for each point of recall: the points are those of arms that may not have learnt.
            return {"verdict": "not testable", "why": NOT_RECORDED}
        least = claim.smallest
        if claim.saves and claim.published is not None:
            least = claim.published - claim.smallest
        verdict = verdict_of(claim, least, low, high)
        why = why_open(claim, least, low, high) if verdict == "not decided" else ""
        return {"verdict": verdict, "why": why}
    seen = {recipes.get(arm, "") in AUGMENTED for arm in claim.weights}
    reasons = ["the arms saw images augmented in different ways"] if len(seen) > 1 else []
    return {"verdict": "not testable", "why": "; ".join([*reasons, NOT_RECORDED])}


if __name__ == "__main__":
    main()
