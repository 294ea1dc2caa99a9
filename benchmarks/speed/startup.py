"""How long the command takes before it does anything: `apecache --help`, and `extract` with nothing
to do.

    python -m benchmarks.speed.startup [--quick] [--json FILE]

Each command is a process of its own. Cases are interleaved, medians of their CPU time decide, wall
time stands beside. `python -c "import torch, …"` imports what `extract` needs and does nothing
else: the rest is ours.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.record import Goal, print_goals, print_table, write_result

DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
IMPORTS = "import timm, torch, transformers, zarr"


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description="Seconds before a command does anything.")
    parser.add_argument("--quick", action="store_true", help="three repetitions in place of seven")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    n_repetitions = 3 if options.quick else 7
    with tempfile.TemporaryDirectory() as folder:
        extract = finished_extraction(Path(folder))
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "apecache --help": [sys.executable, "-m", "apecache", "--help"],
            "imports alone": [sys.executable, "-c", IMPORTS],
            "extract, nothing to do": extract,
        }
        rows = measure(commands, n_repetitions)
    cpu = {row["case"]: float(row["cpu_s"]) for row in rows}
    goals = [
        Goal(
            name="CPU seconds of --help above python's own",
            value=cpu["apecache --help"] - cpu["python"],
            target=0.5,
            better="lower",
        ),
        Goal(
            name="CPU seconds of nothing to do above its imports",
            value=cpu["extract, nothing to do"] - cpu["imports alone"],
            target=5.0,
            better="lower",
        ),
    ]
    print_table(rows)
    print_goals(goals)
    write_result("speed-startup", goals=goals, rows=rows, path=options.json)


def finished_extraction(folder: Path) -> list[str]:
    """Extract the demo's drawings once and return the command, which has nothing left to do."""
    from apecache.encoders.packaged import write_packaged_encoders

    image, text = write_packaged_encoders(folder / "encoders")
    command = [
        sys.executable,
        "-m",
        "apecache",
        "extract",
        str(DRAWINGS),
        "--store",
        str(folder / "store"),
    ]
    command += [
        "--image",
        f"timm:{image}",
        "--text",
        f"hf:{text}",
        "--device",
        "cpu",
        "--resolution",
        "64",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return command


def measure(commands: Mapping[str, Sequence[str]], n_repetitions: int) -> list[dict[str, object]]:
    """Run all commands in turn, `n_repetitions` times after one warm-up; medians of each."""
    cpu_seconds: dict[str, list[float]] = {case: [] for case in commands}
    wall_seconds: dict[str, list[float]] = {case: [] for case in commands}
    for repetition in range(n_repetitions + 1):
        for case, command in commands.items():
            before = children_cpu_seconds()
            begin = time.perf_counter()
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            if repetition:
                wall_seconds[case].append(time.perf_counter() - begin)
                cpu_seconds[case].append(children_cpu_seconds() - before)
    return [
        {
            "case": case,
            "cpu_s": round(median(cpu_seconds[case]), 3),
            "wall_s": round(median(wall_seconds[case]), 3),
            "runs": n_repetitions,
        }
        for case in commands
    ]


def children_cpu_seconds() -> float:
    """User and system time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
