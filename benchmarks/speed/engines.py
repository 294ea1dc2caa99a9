"""The Ray engine beside the local one, on the same cores.

    python -m benchmarks.speed.engines [--quick] [--json FILE] [--encoder timm:FOLDER] [--images N] [--actors N]

Both encode the same images into a new store, one after another in turn. An actor computes with one
thread, and so does the local engine beside one actor; beside N actors it computes with N threads
and decodes with as many. Two figures of the Ray engine: from the command's beginning, with the
seconds that cluster and actors take to start, and while it encodes. Stores of the same thread count
must be equal byte for byte.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apecache.cluster.extract import extract_on_ray
from apecache.cluster.pool import RaySpec
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.encoders.packaged import write_packaged_encoders
from apecache.encoders.spec import parse_encoder
from apecache.extraction.run import ExtractReport, ExtractSpec, extract
from benchmarks.record import Goal, print_goals, print_table, write_result

DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "images"
SHARD_ROWS = 64
MOST_OVERHEAD = 1.1


def drawings(count: int) -> PairSource:
    """So many images: the drawings of the demo, by several names where there are not enough."""
    names = sorted(str(path.relative_to(DRAWINGS)) for path in DRAWINGS.rglob("*.jpg"))
    keys = [
        f"{'./' * (number // len(names))}{names[number % len(names)]}" for number in range(count)
    ]
    return PairSource(
        tuple(Pair(key=key, captions=(), languages=()) for key in keys),
        media=FolderMedia(root=DRAWINGS),
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def timed(run: Any) -> tuple[float, float]:
    """Seconds from the beginning, and of encoding alone."""
    begin = time.perf_counter()
    report: ExtractReport = run()
    return time.perf_counter() - begin, max(array.seconds for array in report.arrays)


def measure(encoder: str, images: int, actors: int, repeats: int) -> list[dict[str, Any]]:
    source = drawings(images)
    spec = ExtractSpec(
        parse_encoder(encoder, "image"),
        shard_rows=SHARD_ROWS,
        device="cpu",
        workers=0,
    )
    seconds: dict[str, list[tuple[float, float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):  # the first round warms up
            torch.set_num_threads(actors)
            here = Path(folder) / f"here-{turn}"
            there = Path(folder) / f"there-{turn}"
            found = {
                "local": timed(lambda here=here: extract(source, here, spec)),
                "ray": timed(
                    lambda there=there: extract_on_ray(
                        source,
                        there,
                        spec,
                        cluster=RaySpec(address="local", actors=actors),
                    )
                ),
            }
            if actors == 1 and tree(here) != tree(there):
                raise SystemExit("the two engines wrote other bytes")
            for engine in seconds if turn else ():
                seconds[engine].append(found[engine])
    return [
        _row(engine, actors=actors, images=images, found=found) for engine, found in seconds.items()
    ]


def _row(engine: str, actors: int, images: int, found: list[tuple[float, float]]) -> dict[str, Any]:
    whole, encoding = (statistics.median(part) for part in zip(*found, strict=True))
    start = {"start s": whole - encoding, "encoding s": encoding, "images/s": images / encoding}
    return {"engine": engine, "actors or threads": actors, "images": images, **start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer images; for a look, not for reporting",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--encoder", help="default: the packaged efficientnet-lite0")
    parser.add_argument("--images", type=int)
    parser.add_argument("--actors", type=int, help="default: 1, and the cores of this machine")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = [options.actors] if options.actors else sorted({1, cores})
    images = options.images or (128 if options.quick else 1024)
    repeats = 1 if options.quick else 3
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        encoder = options.encoder or f"timm:{write_packaged_encoders(Path(folder))[0]}"
        for count in counts:
            rows += measure(encoder, images=images, actors=count, repeats=repeats)
    print_table(rows)
    goals = [
        Goal(name=f"Ray / local, encoding, {ray['actors or threads']} of {cores} cores",
             value=ray["encoding s"] / local["encoding s"], target=MOST_OVERHEAD, better="lower")
        for local, ray in zip(rows[::2], rows[1::2], strict=True)
    ]  # fmt: skip
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-engines", goals=goals, rows=rows, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
