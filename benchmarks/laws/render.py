"""RESULTS.md, made of the JSON files in results/ and of nothing else.

    python -m benchmarks.laws.render                    # write RESULTS.md again
    python -m benchmarks.laws.render --from WORK        # take the results in a work folder first
    python -m benchmarks.laws.render --page laws.html   # and the same as a page with pictures

A result that is taken replaces that of the same law, and gets the commit, the machine and the
versions beside it. Laws of which nothing was measured are not taken.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
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
TAKES = (
    "Hours on one H100 at most, computed from operations at 0.4 of the peak; nothing of it was run. "
    "The committed runs have 80 steps on 1,000 images. A run of ten CPU hours on what comes nearest "
    "to testable (a text tower on cached image features, projections, closed forms, heads on all "
    "data) is still to be made."
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
                [result_of(one["law"]) for one in found],
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
            written.append(folder / f"{result.id}.json")
            value = {"name": f"laws-{result.id}", **about, "law": asdict(result)}
            written[-1].write_text(
                json.dumps(value, indent=1, allow_nan=False) + "\n",
                encoding="utf-8",
            )
    return written


def kept(folder: Path) -> list[dict[str, Any]]:
    """In the order of the laws."""
    paths = sorted(folder.glob("L*.json"), key=lambda path: (len(path.stem), path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def render(found: Sequence[dict[str, Any]]) -> str:
    """The whole of RESULTS.md."""
    laws = [result_of(one["law"]) for one in found]
    known = {law.id: law for law in laws}
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
    lines += _what_it_takes()
    for one, law in zip(found, laws, strict=True):
        lines += _law(law, one)
    return "\n".join(lines) + "\n"


def _former(found: Sequence[dict[str, Any]]) -> list[str]:
    """Verdicts of the former rule beside those of the present one, where they differ."""
    rows = []
    for one in found:
        for before, now in zip(one.get("former", ()), one["law"]["compared"], strict=False):
            judgement = now["judgement"]
            if before["verdict"] != judgement["verdict"]:
                row = (before["name"], before["metric"], before["verdict"], judgement["verdict"])
                rows.append((one["law"]["id"], *row, judgement["why"]))
    if not rows:
        return []
    columns = ("law", "comparison", "metric", "former verdict", "verdict", "why")
    return ["", "## Former and present verdicts", "", *FORMER, "", *_table(columns, rows)]


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
    verdicts = [one.judgement.verdict for one in law.compared]
    return law.verdict, ", ".join(str(verdicts.count(name)) for name in VERDICTS)


def _law(law: LawResult, about: dict[str, Any]) -> list[str]:
    setting = law.setting
    encoders = ", ".join(f"{role} `{name}`" for role, name in setting["encoders"].items())
    size = ", ".join(
        f"{key} {value}" for key, value in setting["size"].items() if value is not None
    )
    lines = [
        "",
        f"## {law.id}. {law.title}",
        "",
        law.claim,
        "",
        f"Source: {law.source}. Published: {law.figure}.",
    ]
    lines += [f"Open: {law.missing}"] * bool(law.missing)
    lines += [
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
