"""Import features in forked processes that kill themselves, as a program: one line of JSON each.

    python killed_imports.py FOLDER SOURCE COUNT SEED

Every store is killed three times at a random system call, then the import is finished. Each line
says how often it was killed, how many rows the last run imported, and the digest of the store.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apecache.store.import_features import import_features
from apecache.store.import_spec import ImportSpec
from benchmarks.reliability.injection.syscalls import Call, Kill, intercepted, unsynced
from benchmarks.reliability.injection.tower import tree_digest


def run_import(store: Path, source: Path) -> int:
    """Import the source; returns the rows that this run imported."""
    spec = ImportSpec(source=source, shard_rows=4, by_row=True, max_bad=0.05)
    report = import_features(store, spec)
    return sum(array.n_imported for array in report.arrays)


def killed(store: Path, source: Path, kill: Kill) -> bool:
    """Run an import in a process of its own that is killed on the way; was it reached?"""
    child = os.fork()
    if child == 0:
        with intercepted(store, unsynced(kill)):
            run_import(store, source)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def count_calls(store: Path, source: Path) -> int:
    """Return how many system calls of an import change the folder of its store."""
    n_calls = 0

    def count(_: Call, perform: Callable[..., Any]) -> Any:
        nonlocal n_calls
        n_calls += 1
        return perform()

    with intercepted(store, unsynced(count)):
        run_import(store, source)
    return n_calls


def main() -> None:
    folder = Path(sys.argv[1])
    source = Path(sys.argv[2])
    n_calls = count_calls(folder / "counted", source)
    chance = random.Random(int(sys.argv[4]))
    for number in range(int(sys.argv[3])):
        store = folder / str(number)
        n_kills = 0
        for _ in range(3):
            kill = Kill(
                nth=chance.randrange(1, n_calls),
                when=chance.choice(["before", "halfway", "after"]),
            )
            n_kills += killed(store, source, kill)
        with intercepted(store, unsynced()):
            n_rows = run_import(store, source)
        outcome = {"kills": n_kills, "rows": n_rows, "digest": tree_digest(store)}
        print(json.dumps(outcome))  # noqa: T201  (the answer to the test)


if __name__ == "__main__":
    main()
