"""Time and memory of opening a store of ten million pairs, before any caption is read.

    python -m benchmarks.speed.open_pairs [--quick] [--pairs N] [--json FILE]

The store is made up: five captions an image, features of one number. It is read as the table of
its block and, after a change of its splits, as a view. Each opening runs in a process of its own,
so that its peak is its own; memory is counted above what the imported libraries take. What users ask
next (splits, image rows, captions) has rows of its own and no goal.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from apecache.storage.local_files import LocalFiles
from apecache.store.reader import FeatureStore
from apecache.store.view_edits import split_store
from benchmarks.made_up_store import write_feature_store
from benchmarks.record import Goal, print_goals, print_table, write_result

CAPTIONS = 5
TARGET_SECONDS = 2.0
TARGET_MB = 200.0
STEPS: dict[str, Callable[[FeatureStore], object]] = {
    "open": lambda store: (store.digest, len(store.pairs.digest)),
    "open, find the features": lambda store: [
        (array.rows, array.complete) for array in store.arrays()
    ],
    "open, splits": lambda store: store.pairs.split_counts(),
    "open, image of each caption": lambda store: store.pairs.image_rows.sum(),
    "open, captions": lambda store: len(store.pairs.captions),
}
"""What a process does; a step has goals if it reads no column."""
WITHOUT_COLUMNS = ("open", "open, find the features")


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 pairs")
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("STEP", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        step, store = options.run
        print(json.dumps(measured(step, Path(store))))
        return
    n_pairs = 100_000 if options.quick else options.pairs
    with tempfile.TemporaryDirectory() as folder:
        stores = write_stores(Path(folder), n_pairs)
        table = [
            {"store": name, "pairs": n_pairs, **row}
            for name, store in stores.items()
            for row in rows_of(store, options.repeats)
        ]
    print_table(table)
    goals = goals_of(table, n_pairs)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-open-pairs", goals=goals, rows=table, path=options.json)


def write_stores(folder: Path, n_pairs: int) -> dict[str, Path]:
    """Write the same pairs twice, in a process that ends: as one table, and as a view."""
    stores = {"one table": folder / "table", "view": folder / "view"}
    for name, store in stores.items():
        print(f"writing {n_pairs:,} pairs: {name} …", file=sys.stderr, flush=True)
        write_pairs(store, n_pairs)
    split_store(LocalFiles(stores["view"]), (("train", 0.9), ("val", 0.1)), by="key")
    return stores


def write_pairs(store: Path, n_pairs: int) -> None:
    """Write a store of made-up pairs, whose features are one number each."""
    n_images = n_pairs // CAPTIONS
    write_feature_store(
        store,
        np.ones((n_images, 1), np.float16),
        np.ones((n_pairs, 1), np.float16),
        image_rows=[row // CAPTIONS for row in range(n_pairs)],
        splits=["train"] * n_images,
        keys=[f"images/{row // 1000:05d}/{row:09d}.jpg" for row in range(n_images)],
        captions=[f"caption {row} of a made-up picture of number {row}" for row in range(n_pairs)],
        shard_rows=1 << 18,
    )


def rows_of(store: Path, repeats: int) -> list[dict[str, Any]]:
    """Return medians of each step, measured in turn."""
    turns: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    for _ in range(repeats):
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.speed.open_pairs", "--run", step, store]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            turns[step].append(json.loads(done.stdout))
    table: list[dict[str, Any]] = []
    for step, figures in turns.items():
        medians = {
            name: round(statistics.median(figure[name] for figure in figures), 3)
            for name in figures[0]
        }
        table.append({"step": step, **medians})
    return table


def measured(step: str, store: Path) -> dict[str, float]:
    """Open a store in this process, and do a step."""
    before_mb = peak_mb()
    begin_cpu = time.process_time()
    begin = time.perf_counter()
    STEPS[step](FeatureStore.open(store))
    return {
        "wall_s": time.perf_counter() - begin,
        "cpu_s": time.process_time() - begin_cpu,
        "added_mb": peak_mb() - before_mb,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Return the peak of this process's resident memory."""
    status = Path("/proc/self/status")
    # Where it can be read: `getrusage` begins with the peak of the parent process.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def goals_of(table: list[dict[str, Any]], n_pairs: int) -> list[Goal]:
    """Return the goals: the slowest and the largest opening that reads no column."""
    rows = [row for row in table if row["step"] in WITHOUT_COLUMNS]
    return [
        Goal(
            name=f"opening {n_pairs:,} pairs, seconds",
            value=max(row["wall_s"] for row in rows),
            target=TARGET_SECONDS,
            better="lower",
        ),
        Goal(
            name=f"memory of an opened store of {n_pairs:,} pairs, MB",
            value=max(row["added_mb"] for row in rows),
            target=TARGET_MB,
            better="lower",
        ),
    ]


if __name__ == "__main__":
    main()
