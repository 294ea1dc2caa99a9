"""Compare benchmarks of this checkout with those of an older one, in turns on one machine.

    python -m benchmarks.compare --base ../before "speed.store" "speed.commits --quick" [--turns 5]

Each checkout has an environment of its own (`make .venv/.dev`). Both run each benchmark in turn, and
the other one begins each time, so that a busy machine slows both. Rows that both have are compared by
the median of their CPU time.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Goal, print_goals, print_table, write_result

HERE = Path(__file__).parents[1]
OWN = re.compile(
    r"apecache|store|of it|population|solo|step|commit|resume|seal|open|info|load all|hash|verify"
)
"""Cases of this project; all others are of peers, and show how much a machine varies."""
SLOWEST = 1.05
"""Largest ratio of CPU times, after to before, that is not a loss."""
Times = dict[str, list[float]]
"""CPU times of all turns, by the name of a case."""


def main() -> None:
    options = parse_arguments()
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for command in options.benchmarks:
        compared_rows = compared(command, options.base, options.turns)
        rows += compared_rows
        own_ratios = [row["ratio"] for row in compared_rows if OWN.search(row["case"])]
        goals.append(
            Goal(
                name=f"{command}: slowest own case, after / before, CPU",
                value=max(own_ratios, default=math.nan),
                target=SLOWEST,
                better="lower",
            )
        )
        # Written after each benchmark, since all of them take long.
        write_result("speed-compare", goals=goals, rows=rows, path=options.json)
    print_table(rows)
    print_goals(goals)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of two checkouts in turns.")
    parser.add_argument("benchmarks", nargs="+", help="name and options, as one argument each")
    parser.add_argument("--base", type=Path, required=True, help="the older checkout")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compared(command: str, base: Path, turns: int) -> list[dict[str, Any]]:
    """Run a benchmark in both checkouts in turns; return a row for each case that both have."""
    times: dict[Path, Times] = {base: defaultdict(list), HERE: defaultdict(list)}
    for turn in range(turns):
        order = (base, HERE) if turn % 2 == 0 else (HERE, base)
        for checkout in order:
            print(f"{command}: turn {turn + 1} of {turns}, {checkout.name}", file=sys.stderr)
            for case, milliseconds in cpu_times(measured(command, checkout)).items():
                times[checkout][case].append(milliseconds)
    rows: list[dict[str, Any]] = []
    for case, after in times[HERE].items():
        before = times[base].get(case)
        if before and min(before) > 0:
            ratios = sorted(new / old for new, old in zip(after, before, strict=True))
            rows.append(
                {
                    "benchmark": command,
                    "case": case,
                    "before": round(statistics.median(before), 4),
                    "after": round(statistics.median(after), 4),
                    "ratio": round(statistics.median(after) / statistics.median(before), 3),
                    "low": round(ratios[0], 3),
                    "high": round(ratios[-1], 3),
                }
            )
    return rows


def measured(command: str, checkout: Path) -> list[dict[str, Any]]:
    """Run a benchmark in a checkout with its own environment; return its rows."""
    name, *options = command.split()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        program = [str(checkout / ".venv" / "bin" / "python"), "-m", f"benchmarks.{name}"]
        run = subprocess.run(
            [*program, *options, "--json", str(result)],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        # A missed goal may be an exit code; without a result there is nothing to compare.
        if not result.is_file():
            sys.exit(f"{checkout}: {command} ended with {run.returncode}\n{run.stderr[-2000:]}")
        rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
        return rows


def cpu_times(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the CPU times of a result by the name of their case."""
    times: dict[str, float] = {}
    for row in rows:
        named = [
            f"{value}" if isinstance(value, str) else f"{column} {value}"
            for column, value in row.items()
            if isinstance(value, str | int) and "cpu" not in column.lower()
        ]
        case = ", ".join(named)
        for column, value in row.items():
            is_cpu = "cpu" in column.lower() or "cpu" in case.lower()
            is_time = isinstance(value, int | float) and " / " not in column and "%" not in case
            if is_cpu and is_time and column not in case:
                times[f"{case}: {column}"] = float(value)
    return times


if __name__ == "__main__":
    main()
