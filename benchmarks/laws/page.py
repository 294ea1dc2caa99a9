"""One page of laws: what was published and what was measured, as tables and as a picture of each
law."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apecache.report.charts.intervals import Intervals, Row
from apecache.report.page import Cell, Page, Table, write_page
from benchmarks.laws.results import COSTS, ArmResult, Compared, LawResult
from benchmarks.laws.verdict import VERDICTS

ARM_COLUMNS = ("tr", "ir", "recall", "r1", "top1", "unseen")
UNITS = {
    "points": "points of difference",
    "% saved": "per cent saved",
    "r": "Pearson's correlation",
}
HOW = (
    "Differences are paired: all arms answer the same queries, seed by seed. A 95 % interval adds "
    "the variance over "
    "seeds (Student) and that over images (bootstrap, each image with its captions; candidates "
    "stay); with one seed it "
    "speaks of the images alone. Three seeds are few: where their spread is most of the variance, an "
    "interval holds the truth in about 92 of 100 cases rather than 95, and a verdict at the edge of "
    "what counts is false in about 4 of 100 (`benchmarks/results/laws-simulation.json`).",
    "A comparison is testable only if every arm that trains weights lowered its loss below 0.8 of "
    "ln(candidates), all arms saw the same augmentation and as many samples as the law gives them, "
    "and the best arm reaches, above chance, half of what heads alone (a closed form) reach on the "
    "same features, recalls and accuracies alike. Of a loss with further terms the contrastive one is "
    "taken. Where the paper says that an arm is small, it must train fewer parameters than the "
    "others. How far norms moved is testable only where the arms learned; what is counted always is. "
    "What counts is a tenth of the best arm's recall above chance, at most half of "
    "the published difference in proportion to the level, and at most the law's own figure. An "
    "order is held where the interval lies above 0 and the difference counts; broken where the "
    "interval is not above 0 and holds no difference that counts. An equality is held where the "
    "whole interval lies within what counts, and broken where it lies beyond.",
    (
        "The detectable difference is stated before any run, from the numbers of images and seeds "
        "alone."
    ),
    "No arm was tuned by itself, except where a law says so under Open: each recipe runs with its "
    "own settings, at the steps and the batch of the size; where "
    "the batch is smaller than the recipe's, its learning rate falls with the square root. Where "
    "the size names a rate "
    "(lr), all arms whose towers train have that one, because a recipe's own is for many more "
    "steps.",
)


def laws_page(laws: Sequence[LawResult], out: Path, command: str = "", title: str = "Laws") -> Path:
    """Write the page, whose folder must exist; returns where."""
    settings = _by_setting(laws)
    tables = [
        _summary(laws),
        *_setting_table(settings),
        *(table for law in laws for table in _tables(law)),
    ]
    pictures = tuple(picture for law in laws for picture in law_pictures(law))
    notes = (*HOW, *(f"{law.id}: {law.missing}" for law in laws if law.missing))
    alone = "; ".join(next(iter(settings))) if len(settings) == 1 else ""
    about = alone or "The laws were tried in several calls; see Settings."
    page = Page(
        title=title,
        subtitle=about,
        commands=(command,) if command else (),
        tables=tuple(tables),
        notes=notes,
        intervals=pictures,
    )
    return write_page(page, out)


def law_pictures(law: LawResult) -> tuple[Intervals, ...]:
    """One for each unit that the law's differences have."""
    units = dict.fromkeys(one.unit for one in law.compared)
    return tuple(
        _picture(law, unit, [one for one in law.compared if one.unit == unit]) for unit in units
    )


def _picture(law: LawResult, unit: str, compared: Sequence[Compared]) -> Intervals:
    rows = tuple(
        Row(
            name=f"{one.name} ({one.metric})",
            published=one.published,
            measured=one.judgement.difference,
            low=one.judgement.low,
            high=one.judgement.high,
            verdict=one.judgement.verdict,
        )
        for one in compared
    )
    return Intervals(
        title=f"{law.id}. {law.title}",
        unit=UNITS[unit],
        rows=rows,
        note=f"{law.source}. {law.claim}",
    )


def _by_setting(laws: Sequence[LawResult]) -> dict[tuple[str, str], list[str]]:
    """Laws that were run in different calls may differ: size and encoders of each setting, and its
    laws."""
    found: dict[tuple[str, str], list[str]] = {}
    for law in laws:
        found.setdefault((_size(law.setting), _encoders(law.setting)), []).append(law.id)
    return found


def _setting_table(settings: dict[tuple[str, str], list[str]]) -> tuple[Table, ...]:
    rows = tuple((", ".join(ids), *about) for about, ids in settings.items())
    return (
        (Table(title="Settings", columns=("laws", "size", "encoders"), rows=rows),)
        if len(rows) > 1
        else ()
    )


def _size(about: dict[str, Any]) -> str:
    size = {
        key: value for key, value in about["size"].items() if value is not None and key != "name"
    }
    sizes = ", ".join(f"{key} {value}" for key, value in size.items())
    price = f"; an hour costs {about['price_per_hour']:g}" if "price_per_hour" in about else ""
    return (
        f"size {about['size']['name']} ({sizes}), {about['seeds']} seeds, reported on "
        f"{about['split']}{price}"
    )


def _encoders(about: dict[str, Any]) -> str:
    return ", ".join(f"{role} {name}" for role, name in about["encoders"].items())


def _summary(laws: Sequence[LawResult]) -> Table:
    rows = tuple((law.id, law.title, law.verdict, _tally(law), law.source) for law in laws)
    return Table(
        title="Verdicts",
        columns=("law", "title", "verdict", "held, broken, open, not testable", "source"),
        rows=rows,
    )


def _tally(law: LawResult) -> str:
    verdicts = [one.judgement.verdict for one in law.compared]
    return ", ".join(str(verdicts.count(name)) for name in VERDICTS)


def _tables(law: LawResult) -> tuple[Table, ...]:
    columns = (
        "comparison",
        "metric",
        "published",
        "detectable",
        "counts from",
        "measured",
        "95 %",
        "verdict",
    )
    rows = tuple(_compared_row(one) for one in law.compared)
    note = f"Published: {law.figure}." if law.figure else ""
    compared = Table(
        title=f"{law.id}. {law.title}: comparisons",
        columns=columns,
        rows=rows,
        note=f"{law.claim} {note}".strip(),
    )
    return (compared, *_arm_tables(law))


def _compared_row(one: Compared) -> tuple[Cell, ...]:
    judgement = one.judgement
    published = "no figure" if one.published is None else f"{one.published:+.1f} {one.unit}"
    where = f" ({one.place})" if one.place else ""
    least = "" if one.detectable is None else f"{one.detectable:.1f}"
    measured = "" if judgement.difference is None else f"{judgement.difference:+.2f} {one.unit}"
    span = (
        ""
        if judgement.low is None
        else f"{judgement.low:.2f} to {judgement.high:.2f} ({judgement.source})"
    )
    verdict = judgement.verdict + (f": {judgement.why}" if judgement.why else "")
    return (
        one.name,
        one.metric,
        f"{published}{where}",
        least,
        f"{one.smallest:g}",
        measured,
        span,
        verdict,
    )


def _arm_tables(law: LawResult) -> tuple[Table, ...]:
    known = [name for name in ARM_COLUMNS if any(name in arm.values for arm in law.arms)]
    costs = [name for name in COSTS if any(name in arm.costs for arm in law.arms)]
    arms = [arm for arm in law.arms if arm.values or arm.costs]
    if not arms:
        return ()
    values = tuple(_arm_row(arm, known, costs) for arm in arms)
    chance = next((arm.chance for arm in arms if arm.chance), {})
    if chance:
        values += (("chance", "", "", *map(chance.get, known), *(None for _ in costs)),)
    columns = ("arm", "recipe", "runs", *known, *costs)
    found = [
        Table(
            title=f"{law.id}. {law.title}: arms",
            columns=columns,
            rows=values,
            note="Means over seeds; seconds are those of training.",
        )
    ]
    if law.id == "L12":
        found.append(_per_point(arms, costs))
    return tuple(found)


def _arm_row(arm: ArmResult, known: Sequence[str], costs: Sequence[str]) -> tuple[Cell, ...]:
    runs = f"{arm.n_done} of {arm.n_planned}" + (
        f"; failed: {'; '.join(arm.failed)}" if arm.failed else ""
    )
    return (
        arm.name,
        arm.about,
        runs,
        *map(arm.values.get, known),
        *(_readable(arm.costs.get(name)) for name in costs),
    )


def _per_point(arms: Sequence[ArmResult], costs: Sequence[str]) -> Table:
    rows = tuple(
        (arm.name, *(_readable(arm.per_point.get(name)) for name in costs)) for arm in arms
    )
    return Table(
        title="Costs for each point of recall",
        columns=("arm", *costs),
        rows=rows,
        note="Recall: mean of R@1, R@5 and R@10 both ways.",
    )


def _readable(value: float | None) -> Cell:
    """Large numbers without decimals, small ones with two figures."""
    if value is None or 0.01 <= abs(value) < 1000 or value == 0:
        return value
    return f"{value:.2g}" if abs(value) < 1 else round(value)
