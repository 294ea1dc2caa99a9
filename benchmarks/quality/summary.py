"""The table of all that was tried on Flickr8k's val, from the committed results.

    python -m benchmarks.quality.summary

`docs/results/quality.md` has these lines; a test compares them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import RESULTS

HEADER = (
    "| heads | image encoders | mean R@1 | seeds | seconds of a fit | trained parameters |",
    "|---|---|---|---|---|---|",
)
METRIC = "mean R@1"
BOTH = "lite0, lite2"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Say where a line of the table comes from."""

    name: str
    result: str
    """Name of the results file."""
    match: Mapping[str, str]
    """What the row has."""
    encoders: str = "lite0"
    metric: str = METRIC


ENTRIES = (
    Entry(name="`cca`, closed form", result="quality-heads", match={"recipe": "cca"}),
    Entry(
        name="`weighted-cca`, closed form", result="quality-heads", match={"recipe": "weighted-cca"}
    ),
    Entry(name="`projection`", result="quality-heads", match={"recipe": "projection"}),
    Entry(name="`gated`", result="quality-heads", match={"recipe": "gated"}),
    Entry(name="`mixed`", result="quality-heads", match={"recipe": "mixed"}),
    Entry(
        name="`mixed`, `gated` and two of `projection`, joined",
        result="quality-heads",
        match={"recipe": "mixed + gated + projection + projection"},
    ),
    Entry(
        name="`apecache auto`",
        result="quality-auto-flickr8k",
        match={"case": "auto"},
    ),
    Entry(
        name="last two blocks of the text tower, with `projection`",
        result="quality-unfrozen",
        match={"recipe": "lit-warm"},
    ),
    Entry(
        name="the same, ranked by CSLS",
        result="quality-unfrozen",
        match={"recipe": "lit-warm"},
        metric="by CSLS",
    ),
    Entry(
        name="`projection`, gated encoders",
        result="quality-unfrozen-two",
        match={"recipe": "projection"},
        encoders=BOTH,
    ),
    Entry(
        name="last two blocks of the text tower, with `projection` and gated encoders",
        result="quality-unfrozen-two",
        match={"recipe": "lit-warm"},
        encoders=BOTH,
    ),
    Entry(
        name="the same, ranked by CSLS",
        result="quality-unfrozen-two",
        match={"recipe": "lit-warm"},
        encoders=BOTH,
        metric="by CSLS",
    ),
)


def main() -> None:
    print("\n".join(table_lines()))


def table_lines() -> list[str]:
    """Return the lines of the table, as Markdown."""
    return [*HEADER, *(line_of(entry) for entry in ENTRIES)]


def line_of(entry: Entry) -> str:
    """Return one line."""
    row = row_of(entry)
    cells = [
        entry.name,
        entry.encoders,
        f"{row[entry.metric]:.1f}",
        str(row.get("seeds", 1)),
        f"{row['seconds']:,.0f}" if row["seconds"] >= 1 else "below 1",
        millions(row.get("parameters")),
    ]
    return f"| {' | '.join(cells)} |"


def row_of(entry: Entry) -> Mapping[str, Any]:
    """Return the row of the results that an entry names."""
    path = RESULTS / f"{entry.result}.json"
    rows: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if entry.match.items() <= row.items():
            return row
    raise LookupError(f"{path}: no row has {dict(entry.match)}")


def millions(count: Any) -> str:
    """Return a number of parameters in millions; empty where it is not recorded."""
    return f"{count / 1e6:.1f} M" if isinstance(count, int) else ""


if __name__ == "__main__":
    main()
