"""Time of searching, beside the bare matrix product, and what approximate kinds find of the true
ten nearest.

    python -m benchmarks.speed.search [--quick] [--json FILE]

Vectors are drawn around 1,000 centers, queries like them, all normalized. Cases are interleaved in
one process; figures are medians of milliseconds per query in one batch. Memory is the peak while
searching, beyond what is there before, at a quarter of the vectors and at all of them.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apecache.search.exact import Floats, recall
from apecache.search.faiss_index import VectorIndex, build_vectors
from benchmarks.record import Goal, print_goals, print_table, write_result

DIM = 512
N_QUERIES = 256
TOP = 10
EXACT = "exact (flat)"
BARE = "matrix product + topk"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer vectors, lists and repeats")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, lists, repeats = (20_000, 128, 5) if options.quick else (100_000, 512, 9)
    vectors, queries = clustered(rows + N_QUERIES)
    kinds = {
        EXACT: ("flat", None),
        f"IVF{lists}, nprobe {lists // 32}": (f"IVF{lists},Flat", lists // 32),
    }
    kinds |= {"HNSW32, efSearch 64": ("HNSW32", None)}
    table = measure(vectors, queries=queries, kinds=kinds, repeats=repeats)
    memory = [extra_memory(vectors[:n], queries) for n in (rows // 4, rows)]
    table.append(
        {"case": f"{EXACT}: peak memory of a search, MB, at N / 4 and N", "CPU ms/query": memory[0]}
    )
    table[-1]["wall ms/query"] = memory[1]
    print_table(table)
    goals = goals_of(table, memory)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-search", goals=goals, rows=table, path=options.json)


def clustered(n: int, n_centers: int = 1000) -> tuple[Floats, Floats]:
    chance = np.random.default_rng(0)
    centers = chance.standard_normal((n_centers, DIM), dtype=np.float32)
    vectors = centers[chance.integers(n_centers, size=n)]
    vectors += chance.standard_normal((n, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:-N_QUERIES], vectors[-N_QUERIES:].copy()


def measure(
    vectors: Floats,
    queries: Floats,
    kinds: dict[str, tuple[str, int | None]],
    repeats: int,
) -> list[dict[str, Any]]:
    built: dict[str, VectorIndex] = {}
    seconds: dict[str, float] = {}
    for name, (kind, nprobe) in kinds.items():
        built[name], report = build_vectors(kind, vectors)
        built[name].tune(nprobe, None)
        seconds[name] = report.build_seconds
    x = torch.from_numpy(vectors)
    q = torch.from_numpy(queries)
    cases: dict[str, Callable[[], object]] = {BARE: lambda: (q @ x.T).topk(TOP)}
    cases |= {"FAISS IndexFlatIP": lambda: built[EXACT].index.search(queries, TOP)}
    cases |= {name: lambda index=index: index.search(queries, TOP) for name, index in built.items()}  # type: ignore[misc]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(timed(case))
    best = (q @ x.T).topk(TOP).values.numpy()
    return [
        {
            "case": name,
            "CPU ms/query": 1000 * statistics.median(cpu for cpu, _ in found) / len(queries),
            "wall ms/query": 1000 * statistics.median(wall for _, wall in found) / len(queries),
            "recall@10": recall(
                queries,
                vectors=vectors,
                found=built[name].search(queries, TOP)[1],
                best=best,
            )
            if name in built
            else 1.0,
            "build, s": seconds.get(name, 0.0),
        }
        for name, found in times.items()
    ]


def timed(case: Callable[[], object]) -> tuple[float, float]:
    cpu = time.process_time()
    wall = time.perf_counter()
    case()
    return time.process_time() - cpu, time.perf_counter() - wall


def extra_memory(vectors: Floats, queries: Floats) -> float:
    """MB at the peak of an exact search beyond those before it; NaN where the system does not
    tell."""
    index, _ = build_vectors("flat", vectors)
    index.search(queries, TOP)
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what the warm-up left in the heap would hide what is taken again
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        index.search(queries, TOP)
        return max(0.0, resident("VmHWM") - before)
    except (OSError, AttributeError):
        return float("nan")


def resident(name: str) -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) / 1024


def goals_of(table: list[dict[str, Any]], memory: list[float]) -> list[Goal]:
    cpu = {row["case"]: row["CPU ms/query"] for row in table}
    lists = next(row for row in table if row["case"].startswith("IVF"))
    graph = next(row for row in table if row["case"].startswith("HNSW"))
    return [
        Goal(
            name="exact search / matrix product + topk",
            value=cpu[EXACT] / cpu[BARE],
            target=1.05,
            better="lower",
        ),
        Goal(name="recall@10 of lists", value=lists["recall@10"], target=0.95, better="higher"),
        Goal(name="recall@10 of the graph", value=graph["recall@10"], target=0.95, better="higher"),
        Goal(
            name="lists / exact",
            value=lists["CPU ms/query"] / cpu[EXACT],
            target=0.6,
            better="lower",
        ),
        Goal(
            name="growth of a search's memory from N / 4 to N, MB",
            value=memory[1] - memory[0],
            target=4.0,
            better="lower",
        ),
    ]


if __name__ == "__main__":
    main()
