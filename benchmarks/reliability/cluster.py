"""Kills on a Ray cluster of three simulated nodes: of actors, of nodes, of drivers.

    python -m benchmarks.reliability.cluster [--quick] [--json FILE]

The scenarios are those of `injection.cluster`, with 20 kills each; `--quick` takes the
counts of the tests.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.reliability.injection.cluster import (
    KINDS,
    NODES,
    Nodes,
    cluster_kills,
    running_nodes,
)
from benchmarks.reliability.injection.tower import TowerSpec

KILLS = 20
QUICK_KILLS = 1


def measure(nodes: Nodes, folder: Path, kind: str, count: int, seed: int) -> dict[str, Any]:
    """One row: what was killed, and what was broken by it."""
    begin = time.perf_counter()
    result = cluster_kills(
        nodes,
        folder=folder,
        spec=TowerSpec(),
        kind=kind,
        count=count,
        seed=seed,
    )
    seconds = round(time.perf_counter() - begin, 1)
    about = {"killed": kind, "kills": result.kills, "nodes": NODES, "stores": result.stores}
    told = {
        "shards": result.stores * TowerSpec().n_shards,
        "broken": len(result.wrong),
        "seconds": seconds,
        "seed": seed,
    }
    return {**about, **told, "example": result.wrong[0][:200] if result.wrong else ""}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the counts of the tests")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument(
        "--only",
        choices=KINDS,
        help="one kind of kill; writes no result without --json",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(10**6),
        help="default: another one",
    )
    options = parser.parse_args()
    rows = []
    count = QUICK_KILLS if options.quick else KILLS
    with running_nodes() as nodes, tempfile.TemporaryDirectory() as folder:
        for kind in [options.only] if options.only else KINDS:
            print(f"{kind} …", file=sys.stderr, flush=True)
            (Path(folder) / kind).mkdir()
            rows.append(
                measure(
                    nodes,
                    folder=Path(folder) / kind,
                    kind=kind,
                    count=count,
                    seed=options.seed,
                )
            )
    print_table([{name: value for name, value in row.items() if name != "example"} for row in rows])
    goals = [
        Goal(
            name=f"kill -9 of one {row['killed']}: broken promises",
            value=row["broken"],
            target=0,
            better="lower",
        )
        for row in rows
    ]
    goals += [
        Goal(
            name=f"kill -9 of one {row['killed']}: kills",
            value=row["kills"],
            target=count,
            better="higher",
        )
        for row in rows
    ]
    print_goals(goals)
    if options.json or not (options.only or options.quick):
        write_result("reliability-cluster", goals=goals, rows=rows, path=options.json)
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
