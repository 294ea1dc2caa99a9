"""What is known of a law: one JSON file each in `results/`, from which pages and tables are made,
and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from apecache.errors import RunError
from apecache.storage.replace import replace_text
from benchmarks.laws.jobs import Planned, training_flops
from benchmarks.laws.law import COUNTED, Arm, Claim, Law, Metric
from benchmarks.laws.outcome import Outcome
from benchmarks.laws.setting import LawsSetting
from benchmarks.laws.testable import level_metric, why_not_testable
from benchmarks.laws.verdict import Judgement, detectable, judge

FOLDER = "results"
COLUMNS: tuple[Metric, ...] = (
    "tr",
    "ir",
    "recall",
    "r1",
    "top1",
    "unseen",
    "image-shift-rises",
    "text-shift-falls",
)
COSTS = ("trained", "total-flops", "peak-bytes", "seconds", "money")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison. `figures`: as published, of its arms in their order; `published`: their
    difference, `place` where they stand. `detectable`: stated before any run. `unit` of
    differences. `heads_alone`: what heads alone reach, None where that was not measured."""

    name: str
    metric: str
    unit: str
    equal: bool
    smallest: float
    figures: tuple[float, ...]
    published: float | None
    place: str
    detectable: float | None
    judgement: Judgement
    heads_alone: float | None = None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """`about`: its recipe and what is special. `values`: by metric, mean over seeds; `costs`: means
    likewise. `failed`: errors of runs. `chance`: of the metrics that are recalls or accuracies;
    empty in results of older versions."""

    name: str
    about: str
    published: dict[str, float]
    n_done: int
    n_planned: int
    values: dict[str, float]
    costs: dict[str, float]
    failed: tuple[str, ...] = ()
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def per_point(self) -> dict[str, float]:
        """Costs for each point of recall."""
        points = self.values.get("recall", 0.0)
        return {name: cost / points for name, cost in self.costs.items()} if points else {}


@dataclass(frozen=True, kw_only=True)
class LawResult:
    """`setting`: how large the runs were, on what, without paths. `cpu_hours`: of the runs that
    were made, each once; `made_flops`, `left_flops`: counted operations of the steps of these and
    of those still to be made. All three are 0 in results of older versions."""

    id: str
    title: str
    source: str
    claim: str
    figure: str
    missing: str
    setting: dict[str, Any]
    compared: tuple[Compared, ...]
    arms: tuple[ArmResult, ...]
    cpu_hours: float = 0.0
    made_flops: float = 0.0
    left_flops: float = 0.0

    @property
    def verdict(self) -> str:
        """`broken` where a comparison is; else `held`, where none is open; else how many of them
        were decided."""
        verdicts = [one.judgement.verdict for one in self.compared]
        if "broken" in verdicts:
            return "broken"
        held = verdicts.count("held")
        if held == len(verdicts):
            return "held"
        if verdicts.count("not testable") == len(verdicts):
            return "not testable"
        if held:
            return f"held as far as decided ({held} of {len(verdicts)})"
        return "not decided"


def law_result(
    planned: Sequence[Planned],
    outcomes: Mapping[str, Outcome],
    setting: LawsSetting,
) -> LawResult:
    """Of all claims of one law. `outcomes`: by the digests of jobs."""
    law = planned[0].law
    compared = tuple(_compared(one, outcomes, setting) for one in planned)
    arms = tuple(
        _arm(name, law=law, planned=planned, outcomes=outcomes, price=setting.price)
        for name in law.arms
    )
    jobs = {job.digest: job for one in planned for job in one.all_jobs if job.fits}
    made = [digest for digest in jobs if digest in outcomes]
    flops = {digest: training_flops(job) for digest, job in jobs.items()}
    return LawResult(
        id=law.id,
        title=law.title,
        source=law.source,
        claim=law.claim,
        figure=law.figure,
        missing=law.missing,
        setting=described(setting),
        compared=compared,
        arms=arms,
        cpu_hours=sum(outcomes[digest].cpu_seconds for digest in made) / 3600,
        made_flops=sum(flops[digest] for digest in made),
        left_flops=sum(flop for digest, flop in flops.items() if digest not in made),
    )


def described(setting: LawsSetting) -> dict[str, Any]:
    names = {
        role: spec.slug if spec.folder else str(spec) for role, spec in setting.encoders.items()
    }
    about: dict[str, Any] = {
        "size": asdict(setting.size),
        "seeds": setting.seeds,
        "split": setting.split,
    }
    about |= {"price_per_hour": setting.price} if setting.price is not None else {}
    return {**about, "encoders": names}


def reported_images(setting: LawsSetting) -> int:
    there = sum(pair.split == setting.split and bool(pair.captions) for pair in setting.pairs)
    return min(there, setting.size.test_images or there)


def _compared(one: Planned, outcomes: Mapping[str, Outcome], setting: LawsSetting) -> Compared:
    claim = one.claim
    n_images = (
        len(setting.labels)
        if claim.metric == "top1" and setting.labels
        else reported_images(setting)
    )
    n_seeds = max((len(jobs) for jobs in one.jobs.values()), default=setting.seeds)
    least = None if one.why_not else detectable(claim, n_images, n_seeds)
    if claim.saves:
        unit = "% saved"
    elif claim.metric.endswith(("rises", "falls")):
        unit = "r"
    else:
        unit = "points"
    known = (claim.figures, claim.published, claim.place)
    figures, published, place = known
    return Compared(
        name=claim.name,
        metric=claim.metric,
        unit=unit,
        equal=claim.equal,
        smallest=claim.smallest,
        figures=figures,
        published=published,
        place=place,
        detectable=least,
        judgement=_judged(one, outcomes, least),
        heads_alone=_reached(one, outcomes),
    )


def _reached(one: Planned, outcomes: Mapping[str, Outcome]) -> float | None:
    heads = None if one.heads is None else outcomes.get(one.heads.digest)
    return None if heads is None else heads.value(level_metric(one.claim))


def _judged(one: Planned, outcomes: Mapping[str, Outcome], least: float | None) -> Judgement:
    if one.why_not:
        return Judgement(verdict="not decided", why=one.why_not)
    found: dict[str, list[Outcome]] = {}
    for arm, jobs in one.jobs.items():
        known = [outcomes.get(job.digest) for job in jobs]
        failed = [outcome.error for outcome in known if outcome is not None and outcome.error]
        if failed:
            return Judgement(verdict="not decided", why=f"a run of {arm} failed: {failed[0]}")
        done = [
            outcome for outcome in known if outcome is not None and outcome.has(one.claim.metric)
        ]
        if one.claim.metric in COUNTED and not done and known[0] is not None:
            return Judgement(
                verdict="not decided",
                why=f"the encoders of {arm} are no towers whose costs can be counted",
            )
        found[arm] = done
    missing = {
        arm: len(one.jobs[arm]) - len(done)
        for arm, done in found.items()
        if len(done) < len(one.jobs[arm])
    }
    if missing:
        runs = ", ".join(f"{count} of {arm}" for arm, count in missing.items())
        return Judgement(
            verdict="not decided",
            why=f"runs are still to be made: {runs}{too_small(one.claim, least)}",
        )
    heads = None if one.heads is None else outcomes.get(one.heads.digest)
    if one.heads is not None and heads is None:
        return Judgement(
            verdict="not decided",
            why=f"runs are still to be made: heads alone{too_small(one.claim, least)}",
        )
    judged = {
        arm: [replace(outcome, law_share=_law_share(one, arm)) for outcome in known]
        for arm, known in found.items()
    }
    return judge(one.claim, judged, why_not_testable(one.claim, judged, heads))


def _law_share(one: Planned, arm: str) -> float:
    """The share of the samples that the law itself gives an arm."""
    described = one.law.arms[arm]
    by_steps = one.jobs[arm][0].recipe.schedule.steps > 0
    return described.steps * (1.0 if by_steps else described.data)


def too_small(claim: Claim, least: float | None) -> str:
    """Why runs that would be made for this claim alone may not be worth it."""
    if claim.published is None or claim.equal or not least or abs(claim.published) >= least:
        return ""
    return (
        f"; the published difference, {abs(claim.published):.1f}, is less than they detect, "
        f"{least:.1f}"
    )


def _arm(
    name: str,
    law: Law,
    planned: Sequence[Planned],
    outcomes: Mapping[str, Outcome],
    price: float | None,
) -> ArmResult:
    jobs = {job.digest: job for one in planned for job in one.jobs.get(name, ())}
    known = [outcomes[digest] for digest in jobs if digest in outcomes]
    done = [outcome for outcome in known if not outcome.error]
    values = {metric: [one.value(metric) for one in done] for metric in COLUMNS}
    found = {metric: [v for v in row if v is not None] for metric, row in values.items()}
    every = {cost: [one.costs[cost] for one in done if cost in one.costs] for cost in COSTS}
    costs = {cost: fmean(row) for cost, row in every.items() if row}
    if price is not None and "seconds" in costs:
        costs["money"] = costs["seconds"] / 3600 * price
    arm = law.arms[name]
    return ArmResult(
        name=name,
        about=_about(arm),
        published={str(metric): figure for metric, figure in arm.published.items()},
        n_done=len(done),
        n_planned=len(jobs),
        values={metric: fmean(row) for metric, row in found.items() if row},
        costs=costs,
        failed=tuple(dict.fromkeys(one.error for one in known if one.error)),
        chance=dict(done[0].chance) if done else {},
    )


def _about(arm: Arm) -> str:
    given = {"image": arm.image, "text": arm.text, "teacher": arm.teacher, "start": arm.start}
    usual = {"image": "image", "text": "text", "teacher": "", "start": "pretrained"}
    notes = [f"{key} {value}" for key, value in given.items() if value != usual[key]]
    notes += [f"{100 * arm.data:g} % of the data"] * (arm.data < 1) + [
        f"{100 * arm.noise:g} % wrong"
    ] * bool(arm.noise)
    notes += [f"{100 * arm.steps:g} % of the steps"] * (arm.steps < 1)
    notes += [*arm.settings, *(f"without {section}" for section in arm.without)]
    return ", ".join([arm.recipe, *notes])


def save_result(result: LawResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(
        folder / f"{result.id}.json",
        json.dumps(asdict(result), indent=1, allow_nan=False) + "\n",
    )


def load_results(folder: Path) -> list[LawResult]:
    """In the order of the laws. Raises RunError for a file that is none of ours."""
    paths = sorted(folder.glob("L*.json"), key=lambda path: (len(path.stem), path.stem))
    return [load_result(path) for path in paths]


def load_result(path: Path) -> LawResult:
    """Raises RunError as `load_results` does."""
    try:
        return result_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path} is no result of a law ({str(error).splitlines()[0]}); run the laws again"
        ) from None


def result_of(value: Mapping[str, Any]) -> LawResult:
    """What `asdict` made of it, after JSON. Raises KeyError, TypeError or ValueError."""
    known = {name: value[name] for name in LawResult.__dataclass_fields__ if name in value}
    known["compared"] = tuple(_read_compared(one) for one in value["compared"])
    known["arms"] = tuple(
        ArmResult(**{**one, "failed": tuple(one["failed"])}) for one in value["arms"]
    )
    return LawResult(**known)


def _read_compared(value: dict[str, Any]) -> Compared:
    judgement = Judgement(**value["judgement"])
    return Compared(**{**value, "figures": tuple(value["figures"]), "judgement": judgement})
