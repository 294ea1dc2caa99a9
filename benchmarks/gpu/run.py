"""Measure what one GPU reaches, beside the card's own ceilings, in under eight minutes.

    python -m benchmarks gpu                             # on any machine with CUDA
    python -m benchmarks gpu --only ceilings,fits        # some parts
    python -m benchmarks gpu --tiny --device cpu         # a dry run on the CPU

Each part is a process with a time limit, most important first. A part that fails says why and
costs only itself. When the time is over, the parts that are left are named as skipped. Writes
`benchmarks/results/gpu.json`. `README.md` beside this file says how it travels to a bare machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.goals import reached_goals
from benchmarks.gpu.parts import PartContext, Row, reason
from benchmarks.record import RESULTS, print_goals, print_table, write_result

SECONDS = 470
LEAST_SECONDS = 15
"""With less time left no part begins."""
TINY_FACTOR = 6
"""A dry run on a busy CPU may take so many times the limit of a part."""


@dataclass(frozen=True, kw_only=True)
class PartLimit:
    """Name a part, where it is, and its time limit."""

    name: str
    function: str
    """Module below `benchmarks.gpu` and function: `module:function`."""
    seconds: int


PARTS = (
    PartLimit(name="ceilings", function="ceilings:measure", seconds=40),
    PartLimit(name="agreement", function="heads:agreement", seconds=50),
    PartLimit(name="fits", function="heads:fits", seconds=60),
    PartLimit(name="populations", function="heads:populations", seconds=60),
    PartLimit(name="prepare", function="encoders:prepare", seconds=40),
    PartLimit(name="models", function="encoders:models", seconds=80),
    PartLimit(name="extractions", function="encoders:extractions", seconds=120),
    PartLimit(name="features", function="encoders:features", seconds=50),
    PartLimit(name="memory", function="heads:memory", seconds=30),
    PartLimit(name="losses", function="heads:losses", seconds=35),
    PartLimit(name="search", function="encoders:search", seconds=30),
)
NEEDS_INPUTS = ("models", "extractions", "features")


def main() -> None:
    options = parse_arguments()
    if options.part:
        run_part(options)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        rows = run_parts(options, begin)
    print_rows(rows)
    goals = reached_goals(rows)
    print_goals(goals)
    print(f"{time.perf_counter() - begin:.0f} s")
    target = options.json or (None if options.tiny else RESULTS / "gpu.json")
    if target:
        write_result("gpu", goals=goals, rows=rows, path=target)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what one GPU reaches.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of all parts together")
    parser.add_argument("--work", type=Path, help="folder of inputs; default: a temporary one")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a dry run")
    parser.add_argument("--quick", dest="tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def chosen_parts(only: str) -> Sequence[PartLimit]:
    """Return the parts of these names, with what they need, in their order."""
    names = set(filter(None, only.split(",")))
    unknown = names - {part.name for part in PARTS}
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; the parts are {known}")
    if names & set(NEEDS_INPUTS):
        names.add("prepare")
    return [part for part in PARTS if not names or part.name in names]


def run_parts(options: argparse.Namespace, begin: float) -> list[Row]:
    """Run the parts one after another, as long as there is time."""
    rows: list[Row] = []
    for part in chosen_parts(options.only):
        seconds_left = options.seconds - (time.perf_counter() - begin)
        if seconds_left < LEAST_SECONDS:
            rows.append({"part": part.name, "what": "skipped", "seconds_left": round(seconds_left)})
            continue
        limit = part.seconds * (TINY_FACTOR if options.tiny else 1)
        print(f"== {part.name}", flush=True)
        rows.extend(run_in_process(options, part.name, min(limit, seconds_left - 5)))
    return rows


def run_in_process(options: argparse.Namespace, name: str, limit_seconds: float) -> list[Row]:
    """Run one part in a process of its own; return its rows, and a last one that says how it
    ended."""
    path = options.work / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--part", name]
    command += ["--device", options.device, "--work", str(options.work)]
    if options.tiny:
        command.append("--tiny")
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        ending = "done" if process.wait(timeout=limit_seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        ending = "the time was over"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    seconds = round(time.perf_counter() - begin, 1)
    rows.append({"what": ending, "seconds": seconds})
    return [{"part": name, **row} for row in rows]


def run_part(options: argparse.Namespace) -> None:
    """Run a part in this process."""
    from importlib import import_module

    from apecache.device import resolve_device

    (part,) = (part for part in PARTS if part.name == options.part)
    module, _, function = part.function.partition(":")
    context = PartContext(
        device=resolve_device(options.device),
        tiny=options.tiny,
        work=options.work,
        out=options.work / f"{part.name}.json",
    )
    try:
        getattr(import_module(f"benchmarks.gpu.{module}"), function)(context)
    except Exception as error:
        # The reason is a result: the other parts still run.
        context.add("error", reason=reason(error))
        raise


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table for each kind of row of each part."""
    kinds = dict.fromkeys((row["part"], row["what"]) for row in rows)
    for part, what in kinds:
        print(f"\n{part}: {what}")
        same = [row for row in rows if (row["part"], row["what"]) == (part, what)]
        print_table([{k: v for k, v in row.items() if k not in ("part", "what")} for row in same])


if __name__ == "__main__":
    main()
