"""What an import of features costs beside copying their file and hashing the copy.

    python -m benchmarks.speed.import_features [--quick] [--json FILE]

1,000,000 rows of 768 float16 numbers in a .npy. Each turn copies the file durably and hashes the
copy, then imports it into a new store, in a process of its own; the store is removed. The import
makes the table of the store too, hashes the source, and reads back what it wrote. The same rows
with 8 numbers show what the table alone takes, in time and in memory. Figures are medians.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from apecache.store.import_features import import_features
from apecache.store.import_spec import FeatureInput, ImportSpec
from benchmarks.record import Goal, print_goals, print_table, write_result

ROWS = 1_000_000
QUICK_ROWS = 100_000
DIM = 768
NARROW_DIM = 8
BLOCK_ROWS = 50_000
BLOCK_BYTES = 1 << 20
TURNS = 5
QUICK_TURNS = 3
MEMORY_TARGET_MB = 200.0
"""Some shards in several forms, whatever the number of rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 rows, 3 turns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("ACTION", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        action, folder = options.run
        print(json.dumps(measured(action, Path(folder))))
        return
    n_rows = QUICK_ROWS if options.quick else ROWS
    n_turns = QUICK_TURNS if options.quick else TURNS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder / "wide.npy", n_rows, DIM)
        write_features(folder / "narrow.npy", n_rows, NARROW_DIM)
        actions = ("copy", "import wide", "import narrow")
        turns: dict[str, list[dict[str, float]]] = {action: [] for action in actions}
        for _ in range(n_turns):
            for action in actions:
                turns[action].append(in_process(action, folder))
            table, goals = summary(turns, n_rows)
            # After every turn: a run that is stopped leaves what it has measured.
            if options.json or not options.quick:
                write_result("speed-import", goals=goals, rows=table, path=options.json)
    print_table(table)
    print_goals(goals)


def write_features(path: Path, n_rows: int, dim: int) -> None:
    """Write a .npy of float16 rows: one block of random numbers, scaled for each place."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(n_rows, BLOCK_ROWS), dim), dtype=np.float32)
    shape = {"descr": "<f2", "fortran_order": False, "shape": (n_rows, dim)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, shape)
        for first in range(0, n_rows, BLOCK_ROWS):
            scaled = block[: n_rows - first] * np.float32(1 + first / n_rows)
            scaled.astype(np.float16).tofile(file)


def in_process(action: str, folder: Path) -> dict[str, float]:
    """Measure an action in a process of its own, whose peak of memory is its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.import_features",
        "--run",
        action,
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def measured(action: str, folder: Path) -> dict[str, float]:
    """Run an action; wall and CPU seconds, and the peak of resident memory in MB."""
    # Pages of the last action that are not on the disk yet would slow this one.
    os.sync()
    begin_wall = time.perf_counter()
    begin_cpu = time.process_time()
    if action == "copy":
        copy_and_hash(folder / "wide.npy", folder / "copy.npy")
    else:
        source = folder / f"{action.removeprefix('import ')}.npy"
        import_features(folder / "store", ImportSpec(image=FeatureInput(features=source)))
    wall_seconds = time.perf_counter() - begin_wall
    cpu_seconds = time.process_time() - begin_cpu
    peak_mb = peak_memory_mb()
    (folder / "copy.npy").unlink(missing_ok=True)
    shutil.rmtree(folder / "store", ignore_errors=True)
    return {"wall_s": wall_seconds, "cpu_s": cpu_seconds, "peak_mb": peak_mb}


def peak_memory_mb() -> float:
    """Return the peak of this process's resident memory."""
    status = Path("/proc/self/status")
    # Where it can be read: `getrusage` begins with the peak of the parent process.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def copy_and_hash(source: Path, target: Path) -> None:
    """Copy a file so that it survives a power cut, then hash the copy."""
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, BLOCK_BYTES)
        writing.flush()
        os.fsync(writing.fileno())
    hasher = blake3()
    with target.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)


def summary(
    turns: dict[str, list[dict[str, float]]],
    n_rows: int,
) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Return the table of medians, and the goals."""
    names = {
        "copy": "copy the file and hash the copy",
        "import wide": f"import {n_rows:,} x {DIM}",
        "import narrow": f"import {n_rows:,} x {NARROW_DIM}: the table",
    }
    table: list[dict[str, Any]] = []
    for action, name in names.items():
        medians: dict[str, Any] = {
            key: round(statistics.median(turn[key] for turn in turns[action]), 2)
            for key in ("wall_s", "cpu_s", "peak_mb")
        }
        table.append({"case": name, **medians, "turns": len(turns[action])})
    wall_ratio = ratio(turns["import wide"], turns["copy"], "wall_s")
    cpu_ratio = ratio(turns["import wide"], turns["copy"], "cpu_s")
    peaks = zip(turns["import wide"], turns["import narrow"], strict=True)
    extra_mb = statistics.median(wide["peak_mb"] - narrow["peak_mb"] for wide, narrow in peaks)
    table.append({"case": "import / copy and hash", "wall_s": wall_ratio, "cpu_s": cpu_ratio})
    goals = [
        Goal(
            name=f"import of {n_rows:,} x {DIM} float16 / copy and hash, wall time",
            value=wall_ratio,
            target=2.0,
            better="lower",
        ),
        Goal(
            name="peak memory above that of the table alone, MB",
            value=round(extra_mb, 1),
            target=MEMORY_TARGET_MB,
            better="lower",
        ),
    ]
    return table, goals


def ratio(
    imports: Sequence[dict[str, float]],
    copies: Sequence[dict[str, float]],
    key: str,
) -> float:
    """Return the median of the ratios of turns: a busy machine is so for both of a turn."""
    turns = zip(imports, copies, strict=True)
    return round(statistics.median(wide[key] / copy[key] for wide, copy in turns), 3)


if __name__ == "__main__":
    main()
