"""Peak memory of fit-head and of an index, against the size of what they read or write.

    python -m benchmarks.speed.memory [--quick] [--json FILE]

Stores of random float16 features, 768 for images and 384 for captions, one caption an image, at two
sizes. `fit-head`: one epoch of `projection`; its data are the features of all pairs. `index`: exact,
with a run whose embeddings have 1,024 numbers; its data are the vectors of images and captions,
float32. Each action runs in a process of its own. Its peak is that of resident memory; what a process
takes beside its data (Python, torch, the libraries that the action imports, blocks of rows) is
measured on a store of 20,000 pairs and is the stated constant.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from apecache.recipes.recipe import as_recipe
from apecache.store.reader import FeatureStore
from benchmarks.made_up_store import write_feature_store
from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.speed.open_pairs import peak_mb

IMAGE_DIM = 768
TEXT_DIM = 384
OUT_DIM = 1024
SIZES = {"fit-head": (100_000, 400_000), "index": (100_000, 398_000)}
QUICK_SIZES = {"fit-head": (20_000, 40_000), "index": (20_000, 40_000)}
FEW_ROWS = 20_000
"""Enough for blocks of full size, which are part of the constant."""
RUN_ROWS = 2_000
TARGET = 1.3
SHARD_ROWS = 4096


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows, no goals to speak of")
    parser.add_argument("--only", default="", help="fit-head or index")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("ACTION", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        action, folder = options.run
        ACTIONS[action](Path(folder))
        print(json.dumps(peak_mb()))
        return
    sizes = QUICK_SIZES if options.quick else SIZES
    table: list[dict[str, Any]] = []
    for action, counts in sizes.items():
        if options.only in action:
            table += rows_of(action, counts)
    print_table(table)
    goals = goals_of(table)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-memory", goals=goals, rows=table, path=options.json)


def rows_of(action: str, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure an action at a few rows, whose peak is the constant, and at all sizes."""
    constant = peak_of(action, FEW_ROWS) - data_mb(action, FEW_ROWS)
    rows: list[dict[str, Any]] = []
    for n_rows in counts:
        peak = peak_of(action, n_rows)
        data = data_mb(action, n_rows)
        rows.append(
            {
                "action": action,
                "pairs": n_rows,
                "data_mb": round(data, 1),
                "peak_mb": round(peak, 1),
                "constant_mb": round(constant, 1),
                "ratio": round((peak - constant) / data, 3),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def data_mb(action: str, n_rows: int) -> float:
    """Return the size of the features that are read, or of the vectors that are written."""
    row_bytes = 2 * (IMAGE_DIM + TEXT_DIM) if action == "fit-head" else 2 * 4 * OUT_DIM
    return n_rows * row_bytes / 2**20


def peak_of(action: str, n_rows: int) -> float:
    """Write a store in this process, and act on it in another one; MB."""
    with tempfile.TemporaryDirectory() as folder:
        for step in ("write", action):
            command = [sys.executable, "-m", "benchmarks.speed.memory", "--run", step, folder]
            (Path(folder) / "rows").write_text(str(n_rows))
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
    peak: float = json.loads(done.stdout.splitlines()[-1])
    return peak


def write(folder: Path) -> None:
    """Write the store, and a run of its encoders with wide embeddings."""
    n_rows = int((folder / "rows").read_text())
    write_store(folder / "store", n_rows)
    write_store(folder / "small", RUN_ROWS)
    fit(FeatureStore.open(folder / "small"), folder / "wide-run")


def write_store(folder: Path, n_rows: int) -> None:
    """Write random features: one block of random numbers, scaled for each place."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((n_rows, IMAGE_DIM), dtype=np.float32).astype(np.float16)
    text = rng.standard_normal((n_rows, TEXT_DIM), dtype=np.float32).astype(np.float16)
    write_feature_store(
        folder,
        image,
        text,
        image_rows=list(range(n_rows)),
        splits=["train"] * n_rows,
        shard_rows=SHARD_ROWS,
    )


def fit(store: FeatureStore, out: Path) -> None:
    """Fit one epoch of the recipe `projection`."""
    from apecache.train.fit_head import FitSpec, fit_head

    recipe = as_recipe("projection")
    schedule = recipe.schedule.model_copy(update={"epochs": 1})
    fit_head(store, recipe.model_copy(update={"schedule": schedule}), out, FitSpec(device="cpu"))


def act_fit(folder: Path) -> None:
    """Fit heads on the store."""
    fit(FeatureStore.open(folder / "store"), folder / "run")


def act_index(folder: Path) -> None:
    """Index the store."""
    from apecache.search.index import build_index

    build_index(folder / "wide-run", FeatureStore.open(folder / "store"), folder / "index")


ACTIONS: dict[str, Callable[[Path], None]] = {
    "write": write,
    "fit-head": act_fit,
    "index": act_index,
}


def goals_of(table: list[dict[str, Any]]) -> list[Goal]:
    """Return the goal of each action, at its largest size."""
    goals: list[Goal] = []
    for action in dict.fromkeys(row["action"] for row in table):
        largest = [row for row in table if row["action"] == action][-1]
        goals.append(
            Goal(
                name=f"{action}, {largest['pairs']:,} pairs: (peak - constant) / data",
                value=largest["ratio"],
                target=TARGET,
                better="lower",
            )
        )
    return goals


if __name__ == "__main__":
    main()
