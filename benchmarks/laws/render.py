"""RESULTS.md, made of the JSON files in results/ and of nothing else.

    python -m benchmarks.laws.render                    # write RESULTS.md again
    python -m benchmarks.laws.render --from WORK        # take the results in a work folder first
    python -m benchmarks.laws.render --page laws.html   # and the same as a page with pictures

A result that is taken gets the commit, the machine and the versions beside it. Comparisons that it
measured replace those of the same law; what earlier runs alone measured stays under `earlier`.
Laws of which nothing was measured are not taken.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.laws.law import law_ids, load_law
from benchmarks.laws.page import HOW, laws_page
from benchmarks.laws.results import (
    COLUMNS,
    COSTS,
    FOLDER,
    ArmResult,
    Compared,
    LawResult,
    load_results,
    result_of,
)
from benchmarks.laws.verdict import DISAGREE, POWER, SEED_SPREAD, VERDICTS
from benchmarks.laws.what_it_takes import rows as takes_rows
from benchmarks.record import commit, machine, versions

RECALLS = ("tr", "ir", "recall", "r1", "top1", "unseen")
"""Metrics that a random order reaches some value of, which is printed beside them."""
NO_CHANCE = "The chance of these metrics was not recorded by this run."
TAKES = "Hours on one H100 at most, computed from operations at 0.4 of the peak; nothing was run."
SMALL = (
    "Laws and comparisons that are not in this table were measured with 80 steps on 1,000 images, "
    "before losses were recorded."
)
NOT_RUN = (
    "Not run again, because an arm trains the image tower, its norms or its adapters, so that the "
    "tower runs from pixels in every step: L3, L4, L5, L7, L8, L9 and L10, and most of L1, L2 and "
    "L12.",
    "Not run, although all arms read the image side from the cache: token anchors (L11), which attend "
    "to the tokens of both sides.",
    "What is left: the runs of the same law that are still to be made, at this size and at the "
    "rate of those that were made.",
)
FORMER = (
    "The former rule called a difference broken that was smaller than half of the recall, chance "
    "included, and compared arms of which some saw augmented images. What it called broken is "
    "withdrawn. `python -m benchmarks.laws.simulate` shows how often both rules are wrong.",
)
HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLE = HERE / "RESULTS.md"


def main() -> None:
    options = parse_arguments()
    if options.work:
        for path in take(options.work, options.results):
            print(path)
    found = kept(options.results)
    options.table.write_text(render(found), encoding="utf-8")
    print(options.table)
    if options.page:
        print(
            laws_page(
                [law for one in found for law in page_laws(one)],
                options.page,
                "python -m benchmarks.laws.render",
            )
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RESULTS.md from the JSON files of laws.")
    parser.add_argument(
        "--from",
        dest="work",
        type=Path,
        help="work folder of benchmarks.laws whose results are taken",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--page", type=Path, help="write them as one HTML page too")
    return parser.parse_args()


def take(work: Path, folder: Path) -> list[Path]:
    """Copy what was measured into `folder`; returns the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"commit": commit(), "machine": machine(), "versions": versions()}
    written = []
    for result in load_results(work / FOLDER):
        if any(arm.n_done or arm.failed for arm in result.arms):
            path = folder / f"{result.id}.json"
            value: dict[str, Any] = {"name": f"laws-{result.id}", **about, "law": asdict(result)}
            if path.is_file():
                value = with_earlier(value, json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            written.append(path)
    return written


def with_earlier(value: dict[str, Any], committed: dict[str, Any]) -> dict[str, Any]:
    """Add what the committed file alone has: its former verdicts, and runs of which at least one
    comparison was not measured again. The oldest run comes first."""
    again = _measured(value["law"])
    earlier = []
    for run in runs_of(committed):
        compared = [one for one in run["law"]["compared"] if _is_measured(one)]
        left = [one for one in compared if (one["name"], one["metric"]) not in again]
        if left:
            earlier.append({**run, "law": {**run["law"], "compared": left}})
    merged = dict(value)
    if earlier:
        merged["earlier"] = earlier
    if "former" in committed:
        merged["former"] = committed["former"]
    return merged


def runs_of(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a committed file, oldest first.

    Each has its commit, machine, versions and law.
    """
    latest = {name: one[name] for name in ("commit", "machine", "versions", "law")}
    return [*one.get("earlier", ()), latest]


def laws_of(one: dict[str, Any]) -> list[LawResult]:
    """Return the law of each run of a committed file, oldest first.

    Every comparison stands in one of them, what no run measured in the latest.
    """
    runs = [result_of(run["law"]) for run in runs_of(one)]
    *earlier, latest = runs
    elsewhere = {(compared.name, compared.metric) for law in earlier for compared in law.compared}
    kept = tuple(
        compared
        for compared in latest.compared
        if compared.judgement.difference is not None
        or (compared.name, compared.metric) not in elsewhere
    )
    return [*earlier, replace(latest, compared=kept)]


def page_laws(one: dict[str, Any]) -> list[LawResult]:
    """Return the laws of a page: where there are several runs, the title says which one it is."""
    laws = laws_of(one)
    if len(laws) == 1:
        return laws
    return [replace(law, title=f"{law.title} ({_short_setting(law.setting)})") for law in laws]


def _short_setting(setting: dict[str, Any]) -> str:
    encoders = setting["encoders"]
    return f"size {setting['size']['name']}, {encoders['image']} and {encoders['text']}"


def whole_law(laws: Sequence[LawResult]) -> LawResult:
    """Return the latest run with the comparisons of all of them."""
    compared = tuple(compared for law in laws for compared in law.compared)
    return replace(laws[-1], compared=compared)


def _measured(law: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one["name"], one["metric"]) for one in law["compared"] if _is_measured(one)}


def _is_measured(compared: dict[str, Any]) -> bool:
    return compared["judgement"]["difference"] is not None


def kept(folder: Path) -> list[dict[str, Any]]:
    """In the order of the laws."""
    paths = sorted(folder.glob("L*.json"), key=lambda path: (len(path.stem), path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def render(found: Sequence[dict[str, Any]]) -> str:
    """The whole of RESULTS.md."""
    runs = [laws_of(one) for one in found]
    known = {laws[-1].id: whole_law(laws) for laws in runs}
    lines = [
        "# Laws: what the papers claim, and what was measured",
        "",
        *_intro(),
        "",
        "## Verdicts",
        "",
    ]
    rows = [(name, load_law(name).title, *_verdict(known.get(name))) for name in law_ids()]
    lines += _table(("law", "title", "verdict", "held, broken, open, not testable"), rows)
    lines += _former(found)
    lines += _run_again(runs)
    lines += _what_it_takes()
    for one, laws in zip(found, runs, strict=True):
        lines += _title(laws[-1])
        for run, law in zip(runs_of(one), laws, strict=True):
            lines += _law(law, run)
    return "\n".join(lines) + "\n"


def _former(found: Sequence[dict[str, Any]]) -> list[str]:
    """Verdicts of the former rule beside those of the present one, where they differ."""
    rows = []
    for one in found:
        law = whole_law(laws_of(one))
        present = {(now.name, now.metric): now.judgement for now in law.compared}
        for before in one.get("former", ()):
            judgement = present[before["name"], before["metric"]]
            if before["verdict"] != judgement.verdict:
                row = (before["name"], before["metric"], before["verdict"], judgement.verdict)
                rows.append((law.id, *row, judgement.why))
    if not rows:
        return []
    columns = ("law", "comparison", "metric", "former verdict", "verdict", "why")
    return ["", "## Former and present verdicts", "", *FORMER, "", *_table(columns, rows)]


def _run_again(runs: Sequence[Sequence[LawResult]]) -> list[str]:
    """Return what was run with recorded losses, and what of the same laws is left."""
    again = [law for laws in runs for law in laws if law.cpu_hours]
    if not again:
        return []
    total = sum(law.cpu_hours for law in again)
    title = (
        f"CPU hours on one thread: {total:.2f} of the ten that were planned. Runs that laws share "
        "count for each of them. Features that a store had before are not counted."
    )
    columns = (
        "law",
        "setting",
        "held, broken, open, not testable",
        "CPU hours",
        "CPU hours of what is left",
    )
    rows = [(law.id, _short_setting(law.setting), *_spent(law)) for law in again]
    lines = ["", "## Runs with recorded losses", "", title, "", *_table(columns, rows)]
    for text in (SMALL, *NOT_RUN):
        lines += ["", text]
    return lines


def _spent(law: LawResult) -> tuple[str, str, str]:
    measured = [one for one in law.compared if one.judgement.difference is not None]
    hours_per_flop = law.cpu_hours / law.made_flops if law.made_flops else 0.0
    left = f"{hours_per_flop * law.left_flops:.1f}" if law.left_flops else ""
    return _counts(measured), f"{law.cpu_hours:.2f}", left


def _counts(compared: Sequence[Compared]) -> str:
    verdicts = [one.judgement.verdict for one in compared]
    return ", ".join(str(verdicts.count(name)) for name in VERDICTS)


def _what_it_takes() -> list[str]:
    columns = ("law", "size of the paper", "hours of an arm", "arms x seeds", "hours in all")
    return ["", "## What testing them would take", "", TAKES, "", *_table(columns, takes_rows())]


def _intro() -> list[str]:
    assumed = (
        f"Detectable is stated before any run: what {100 * POWER:g} % of experiments of this size "
        "would find, if "
        f"the paired difference has a variance over images of {DISAGREE:g} (scores from 0 to 1) "
        "and an arm a standard "
        f"deviation over seeds of {SEED_SPREAD:g} points."
    )
    written = "Written by `python -m benchmarks.laws.render` from `results/`; not by hand."
    return [line for text in (written, *HOW[:2], assumed, HOW[3]) for line in (text, "")][:-1]


def _verdict(law: LawResult | None) -> tuple[str, str]:
    if law is None:
        return "not measured yet", ""
    return law.verdict, _counts(law.compared)


def _title(law: LawResult) -> list[str]:
    lines = [
        "",
        f"## {law.id}. {law.title}",
        "",
        law.claim,
        "",
        f"Source: {law.source}. Published: {law.figure}.",
    ]
    return [*lines, *[f"Open: {law.missing}"] * bool(law.missing)]


def _law(law: LawResult, about: dict[str, Any]) -> list[str]:
    setting = law.setting
    encoders = ", ".join(f"{role} `{name}`" for role, name in setting["encoders"].items())
    size = ", ".join(
        f"{key} {value}" for key, value in setting["size"].items() if value is not None
    )
    lines = [
        "",
        (
            f"Measured with {size}, {setting['seeds']} seeds, reported on {setting['split']}; "
            f"{encoders}; "
        ),
    ]
    lines[-1] += (
        f"an hour costs {setting['price_per_hour']:g}; " if "price_per_hour" in setting else ""
    )
    lines[-1] += f"commit {about['commit'][:12]}, {about['machine']['cpus']} CPUs."
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
    lines += ["", *_table(columns, [_row(one) for one in law.compared])]
    if arms := [arm for arm in law.arms if arm.values or arm.costs or arm.failed]:
        lines += ["", *_arms(arms)]
    return lines


def _row(one: Compared) -> tuple[str, ...]:
    judgement = one.judgement
    published = "no figure" if one.published is None else f"{one.published:+.1f}"
    published += f" ({', '.join(f'{figure:g}' for figure in one.figures)})" if one.figures else ""
    published += f"; {one.place}" if one.place else ""
    least = "" if one.detectable is None else f"{one.detectable:.1f}"
    measured = "" if judgement.difference is None else f"{judgement.difference:+.2f} {one.unit}"
    span = (
        ""
        if judgement.low is None
        else f"{judgement.low:.2f} to {judgement.high:.2f}; {judgement.source}"
    )
    verdict = (
        f"**{judgement.verdict}**" if judgement.verdict in ("held", "broken") else judgement.verdict
    )
    verdict += f": {judgement.why}" if judgement.why else ""
    return (one.name, one.metric, published, least, f"{one.smallest:g}", measured, span, verdict)


def _arms(arms: Sequence[ArmResult]) -> list[str]:
    values = [name for name in COLUMNS if any(name in arm.values for arm in arms)]
    costs = [name for name in COSTS if any(name in arm.costs for arm in arms)]
    pointed = [name for name in costs if any(name in arm.per_point for arm in arms)]
    columns = (
        "arm",
        "recipe",
        "runs",
        *values,
        *costs,
        *(f"{name} a point of recall" for name in pointed),
    )
    rows = []
    for arm in arms:
        runs = f"{arm.n_done} of {arm.n_planned}" + "".join(
            f"; failed: {error}" for error in arm.failed
        )
        measured = [_number(arm.values.get(name)) for name in values]
        rows.append(
            (
                arm.name,
                arm.about,
                runs,
                *measured,
                *(_number(arm.costs.get(name)) for name in costs),
            )
        )
        rows[-1] += tuple(_number(arm.per_point.get(name)) for name in pointed)
    chance = next((arm.chance for arm in arms if arm.chance), {})
    blanks = ("",) * (len(costs) + len(pointed))
    if chance:
        rows.append(("chance", "", "", *(_number(chance.get(name)) for name in values), *blanks))
    lines = _table(columns, rows)
    if not chance and any(name in RECALLS for name in values):
        lines += ["", NO_CHANCE]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    if abs(value) < 1000:
        return f"{value:.2f}"
    if abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


if __name__ == "__main__":
    main()
