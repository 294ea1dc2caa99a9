"""What a commit costs with 10 to 10,000 shards in the store, and what opening, resuming and
verifying them costs.

    python -m benchmarks.speed.commits [--quick] [--json FILE]

Shards have a few rows, so that the protocol is measured and not the data. Stores of all sizes take
turns at committing, so that a machine that is busy for a while is so for all; figures are medians.
Files that are read are in the system's cache; small stores, which have grown most while they were
committed to, are not read. The last rows have as many rows a shard as extraction chooses at most:
there a record holds 4,096 hashes.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from apecache_cli.store import describe

from apecache.encoders.spec import EncoderSpec
from apecache.extraction.arrays import MAX_SHARD_ROWS
from apecache.fingerprint import Fingerprint, content_hash
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import ArrayLayout, ArrayRecord, with_metadata
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store
from apecache.store.writer import ArrayWriter, PairColumns, create_array, create_store
from benchmarks.record import Goal, print_goals, print_table, write_result

SIZES = (10, 100, 1_000, 10_000)
QUICK_SIZES = (10, 100, 1_000)
SHARD_ROWS = 4
DIM = 8
RESUME = "resume: which shards are pending"
OPEN = "open, share done, complete"
INFO = "what apecache info reads"
Times = tuple[float, float]
"""CPU and wall seconds."""
TABLE = "pair table in memory, bytes for an image and a caption of 60 characters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="up to 1,000 shards, and fewer repeats",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes, turns, repeats = (QUICK_SIZES, 9, 3) if options.quick else (SIZES, 41, 5)
    with tempfile.TemporaryDirectory() as folder:
        firsts = [n - turns if n >= 10 * turns else n for n in sizes]
        stores = [
            Store(Path(folder) / str(n), first + turns, SHARD_ROWS)
            for n, first in zip(sizes, firsts, strict=True)
        ]
        for store, first in zip(stores, firsts, strict=True):
            store.commit(range(first))
        table = commit_times(stores, sizes=sizes, firsts=firsts, turns=turns)
        table += reading_times(stores[-2:], [label(n) for n in sizes[-2:]], repeats)
        long = Store(Path(folder) / "long", sizes[-1] // 10, MAX_SHARD_ROWS)
        long.commit(range(long.layout.n_shards))
        many = reading_times([long], [label(long.layout.n_shards)], repeats)
        table += [
            {**row, "case": f"{row['case']} ({MAX_SHARD_ROWS:,} rows a shard)"} for row in many
        ]
        table.append(
            {"case": TABLE, label(sizes[-1]): table_bytes(Path(folder) / "table", 10 * sizes[-1])}
        )
    print_table(table)
    goals = goals_of(table, sizes)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-commits", goals=goals, rows=table, path=options.json)


def label(n_shards: int) -> str:
    return f"{n_shards:,} shards"


class Store:
    """An array of images that is filled shard by shard, through the writer."""

    def __init__(self, path: Path, n_shards: int, shard_rows: int) -> None:
        self.path = path
        rows = n_shards * shard_rows
        files = LocalFiles(path)
        blank = [""] * rows
        create_store(
            files,
            pairs=PairColumns(
                keys=[str(i) for i in range(rows)],
                splits=blank,
                labels=blank,
                captions=[],
                languages=[],
                image_rows=[],
                digest="t",
                origin="",
            ),
            root="",
            version="0",
        )
        self.layout = ArrayLayout(
            rows=rows,
            dim=DIM,
            dtype="float16",
            shard_rows=shard_rows,
            batch_size=64,
            threads=1,
        )
        fingerprint = Fingerprint(fields={"encoder": {}, "storage": {}})
        record = ArrayRecord(
            modality="image",
            name="e",
            spec=EncoderSpec("timm", "e", "image"),
            fingerprint=fingerprint,
            layout=self.layout,
            metadata={},
            environment={},
            table="t",
        )
        self.writer = ArrayWriter(files, with_metadata(record))
        create_array(files, self.writer.record)
        self.features = (
            np.random.default_rng(0).standard_normal((shard_rows, DIM)).astype(np.float16)
        )
        self.content = [content_hash(str(i)) for i in range(shard_rows)]

    def commit(self, shards: range) -> None:
        for shard in shards:
            self.writer.commit(shard, self.features, self.content)

    def cases(self) -> dict[str, Callable[[], object]]:
        return {
            RESUME: self.writer.pending,
            "seal": self.writer.seal,
            OPEN: self._open,
            INFO: self._info,
            "load all features": lambda: self._array().load(),
            "hashes of all inputs": lambda: self._array().content(),
            "verify": self._verify,
        }

    def _array(self) -> Any:
        """Opened anew, so that nothing is known of it."""
        return FeatureStore.open(self.path).array("image")

    def _open(self) -> None:
        array = self._array()
        if not array.complete or array.share_done != 1:
            raise RuntimeError("the store should be complete")

    def _info(self) -> None:
        opened = FeatureStore.open(self.path)
        opened.pairs.split_counts()
        for array in opened.arrays():
            describe(array)

    def _verify(self) -> None:
        if verify_store(self.path).problems:
            raise RuntimeError("the store should be sound")


def commit_times(
    stores: list[Store],
    sizes: tuple[int, ...],
    firsts: list[int],
    turns: int,
) -> list[dict[str, Any]]:
    """Median milliseconds of a commit with about so many shards committed before."""
    found: dict[str, list[Times]] = {label(n): [] for n in sizes}
    for turn in range(turns):
        for store, first, times in zip(stores, firsts, found.values(), strict=True):
            shard = first + turn
            times.append(timed(partial(store.commit, range(shard, shard + 1))))
    return medians("commit", found=found, scale=1000, unit="ms")


def reading_times(stores: list[Store], labels: list[str], repeats: int) -> list[dict[str, Any]]:
    """Median seconds."""
    rows = []
    for case in stores[0].cases():
        found = {
            name: [timed(store.cases()[case]) for _ in range(repeats)]
            for store, name in zip(stores, labels, strict=True)
        }
        rows += medians(case, found=found, scale=1, unit="s")
    return rows


def medians(
    case: str,
    found: dict[str, list[Times]],
    scale: float,
    unit: str,
) -> list[dict[str, Any]]:
    """One row of CPU time and one of wall time."""
    cpu = {
        name: scale * statistics.median(cpu for cpu, _ in times) for name, times in found.items()
    }
    wall = {
        name: scale * statistics.median(wall for _, wall in times) for name, times in found.items()
    }
    return [{"case": f"{case}, CPU {unit}", **cpu}, {"case": f"{case}, wall {unit}", **wall}]


def table_bytes(path: Path, n: int) -> float:
    """What reading a pair table leaves in Python's memory, for each of n images with a caption."""
    keys = [f"images/{i:012d}.jpg" for i in range(n)]
    captions = [f"{i:060d}" for i in range(n)]
    some = ["train"] * n
    none = [""] * n
    create_store(
        LocalFiles(path),
        pairs=PairColumns(
            keys=keys,
            splits=some,
            labels=none,
            captions=captions,
            languages=none,
            image_rows=list(range(n)),
            digest="t",
            origin="",
        ),
        root="",
        version="0",
    )
    tracemalloc.start()
    pairs = FeatureStore.open(path).pairs
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(pairs.keys)


def timed(case: Callable[[], object]) -> Times:
    cpu = time.process_time()
    wall = time.perf_counter()
    case()
    return time.process_time() - cpu, time.perf_counter() - wall


def goals_of(table: list[dict[str, Any]], sizes: tuple[int, ...]) -> list[Goal]:
    of = {row["case"]: row for row in table}
    first, before, last = (label(sizes[place]) for place in (0, -2, -1))
    commit = of["commit, CPU ms"]
    verify = of["verify, CPU s"]
    per_shard = verify[last] / sizes[-1] / (verify[before] / sizes[-2])
    return [
        Goal(
            name=f"CPU of a commit, {last} / {first}",
            value=commit[last] / commit[first],
            target=1.3,
            better="lower",
        ),
        *(
            Goal(
                name=f"{last}: {case}, CPU s",
                value=of[f"{case}, CPU s"][last],
                target=2.0,
                better="lower",
            )
            for case in (RESUME, OPEN, INFO)
        ),
        Goal(
            name=f"CPU of verify for each shard, {last} / {before}",
            value=per_shard,
            target=1.3,
            better="lower",
        ),
    ]


if __name__ == "__main__":
    main()
