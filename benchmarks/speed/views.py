"""CPU time of reading features through views, beside the same features without a view.

    python -m benchmarks.speed.views [--quick] [--json FILE]

A store of 65,536 images x 768 float16 gets views: its table in order, the table with every hundredth
image repeated, the table without every hundredth image, and the table shuffled. Cases are interleaved
in one process; a ratio is the median of the ratios of its turns, in CPU time. Wall time is printed
beside, for the shuffled view also with one thread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.storage.local_files import LocalFiles
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.store.view_edits import edited_view, newest_view
from benchmarks.made_up_store import write_feature_store
from benchmarks.record import Goal, print_goals, print_table, write_result

DIM = 768
SHARD_ROWS = 4096
SPACING = 100
"""One row in so many is repeated, or left out."""
TARGET = 1.1
PLAIN = "no view"


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    n_rows, repeats = (2 * SHARD_ROWS, 5) if options.quick else (16 * SHARD_ROWS, 31)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder) / "store", n_rows, repeats)
    print_table(table)
    ratios = {row["case"]: row["CPU / no view"] for row in table}
    goals = [
        Goal(
            name="view of a table in order, CPU / no view",
            value=ratios["in order"],
            target=TARGET,
            better="lower",
        )
    ]
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-views", goals=goals, rows=table, path=options.json)


def measure(folder: Path, n_rows: int, repeats: int) -> list[dict[str, Any]]:
    """Return medians of every case."""
    cases = cases_of(folder, n_rows)
    turns: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(repeats + 1):
        for case, load in cases.items():
            cpu = time.process_time()
            wall = time.perf_counter()
            load()
            turns[case].append((time.process_time() - cpu, time.perf_counter() - wall))
    table: list[dict[str, Any]] = []
    scale = 1000 * 100e6 / (2 * DIM * n_rows)
    for case, times in turns.items():
        # The first turn warms up.
        pairs = list(zip(times, turns[PLAIN], strict=True))[1:]
        cpu_ratio = statistics.median(own[0] / plain[0] for own, plain in pairs)
        wall_ratio = statistics.median(own[1] / plain[1] for own, plain in pairs)
        table.append(
            {
                "case": case,
                "CPU ms/100 MB": round(scale * statistics.median(own[0] for own, _ in pairs), 1),
                "wall ms/100 MB": round(scale * statistics.median(own[1] for own, _ in pairs), 1),
                "CPU / no view": round(cpu_ratio, 3),
                "wall / no view": round(wall_ratio, 3),
            }
        )
    return table


def cases_of(folder: Path, n_rows: int) -> dict[str, Callable[[], object]]:
    """Write the store with its views; return what loads the features of each."""
    rng = np.random.default_rng(0)
    write_feature_store(
        folder,
        rng.standard_normal((n_rows, DIM), dtype=np.float32).astype(np.float16),
        np.zeros((0, 1), np.float16),
        image_rows=[],
        splits=[""] * n_rows,
        modalities=("image",),
        shard_rows=SHARD_ROWS,
    )
    plain = FeatureStore.open(folder)
    in_order = np.arange(n_rows)
    spaced = np.arange(0, n_rows - SPACING, SPACING)
    indexes = {
        "in order": in_order,
        "every 100th repeated": np.insert(in_order, spaced + SPACING // 2, spaced),
        "without every 100th": np.delete(in_order, spaced),
        "shuffled": rng.permutation(n_rows),
    }
    files = LocalFiles(folder)
    first = newest_view(files)
    cases: dict[str, Callable[[], object]] = {PLAIN: lambda: plain.array("image").load()}
    for case, index in indexes.items():
        keys = np.array([f"{row}.png" for row in range(len(index))], dtype=object)
        blank = np.full(len(index), "", dtype=object)
        table = replace_images(first.table, keys, blank)
        record = edited_view(
            files,
            first,
            table,
            rows={"image": index, "text": np.zeros(0, np.int64)},
            problems=blank.tolist(),
        )
        store = FeatureStore.open(folder, record.view)
        cases[case] = loader(store, None)
    cases["shuffled, one thread"] = loader(store, 1)
    return cases


def replace_images(
    table: PairTable,
    keys: NDArray[np.object_],
    blank: NDArray[np.object_],
) -> PairTable:
    """Return a table of other images, without captions."""
    return PairTable(
        keys=keys,
        splits=blank,
        labels=blank,
        captions=table.captions,
        languages=table.languages,
        image_rows=table.image_rows,
        digest="",
    )


def loader(store: FeatureStore, threads: int | None) -> Callable[[], object]:
    """Return what loads a view's features, with the index that the store has read."""
    return lambda: store.array("image").load(threads=threads)


if __name__ == "__main__":
    main()
