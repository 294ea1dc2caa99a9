"""A whole data set by the local engine and by a Ray cluster of three simulated nodes: the same
bytes, and how long.

    python -m benchmarks.reliability.engines --pairs captions.tsv --image timm:/folder --text hf:/folder
    python -m benchmarks.reliability.engines --quick       # the drawings of the demo and the packaged encoders

One thread in the local engine, one in each of two actors. Seconds are of one run each, for a look:
the overhead on the same cores is measured by benchmarks.speed.engines.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apecache.cluster.extract import extract_on_ray
from apecache.cluster.pool import RaySpec
from apecache.data.sources import open_pairs
from apecache.encoders.packaged import write_packaged_encoders
from apecache.encoders.spec import parse_encoder
from apecache.extraction.run import ExtractReport, ExtractSpec, extract
from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.reliability.injection.cluster import running_nodes

DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
ACTORS = 2


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, running_nodes() as nodes:
        work = Path(temporary)
        pairs = options.pairs
        image = options.image
        text = options.text
        if options.quick:
            image, text = (
                f"{library}:{folder}"
                for library, folder in zip(
                    ("timm", "hf"),
                    write_packaged_encoders(work),
                    strict=True,
                )
            )
        source = open_pairs(pairs)
        specs = parse_encoder(image, "image"), parse_encoder(text, "text")
        spec = ExtractSpec(*specs, device="cpu", workers=0, compiled=False, shard_rows=512)
        cluster = RaySpec(address=nodes.address, actors=ACTORS)
        rows = [
            timed("local", 1, lambda: extract(source, work / "local", spec)),
            timed(
                "ray, three nodes",
                ACTORS,
                lambda: extract_on_ray(source, work / "ray", spec, cluster=cluster),
            ),
        ]
        other = different(work / "local", work / "ray")
    print_table(rows)
    goals = [Goal(name="files that differ", value=other, target=0, better="lower")]
    print_goals(goals)
    if options.json or not options.quick:
        write_result("reliability-engines", goals=goals, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A data set by the local engine and by a Ray cluster."
    )
    parser.add_argument("--pairs", default=str(DRAWINGS), help="as apecache extract takes it")
    parser.add_argument("--image")
    parser.add_argument("--text")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.quick and not (options.image and options.text):
        parser.error("--image and --text are needed (or --quick)")
    return options


def timed(engine: str, threads: int, run: Callable[[], ExtractReport]) -> dict[str, Any]:
    begin = time.perf_counter()
    arrays = run().arrays
    seconds = round(time.perf_counter() - begin, 1)
    return {
        "engine": engine,
        "threads": threads,
        **{a.modality: a.rows for a in arrays},
        "seconds": seconds,
    }


def different(one: Path, other: Path) -> int:
    """Files that only one of two stores has, or that have other bytes."""
    names = {
        path.relative_to(folder)
        for folder in (one, other)
        for path in folder.rglob("*")
        if path.is_file()
    }
    if not names:
        raise SystemExit("there is nothing to compare")
    return sum(read(one / name) != read(other / name) for name in names)


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    main()
