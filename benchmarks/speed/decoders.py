"""Compare ways to decode pictures beside the model: throughput, a crashing and a hanging decoder.

    python -m benchmarks.speed.decoders [--quick] [--json FILE]

Two processes read, decode and resize the same photographs to float32 [3, 224, 224], and the parent
takes them in order. Compared are `apecache.data.processes` (forked workers around shared memory),
pebble's ProcessPool, torch's DataLoader, and SPDL's pipeline over a ProcessPoolExecutor. A way
passes a fault if the process that asked for the pictures gets all but the faulty one.

Each measurement is a process of its own, cases are interleaved, and medians of the CPU time of all
processes decide. Imports are not counted. pebble and spdl are compared where they are installed.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apecache.data.decoding import PrefetchSpec, preprocess_ahead
from apecache.data.images import LoadedImage, load_image
from apecache.data.media import FolderMedia
from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.speed.inputs import write_photographs

N_WORKERS = 2
AHEAD = 64
SIDE = 224
HANG_SECONDS = 5.0
CASE_SECONDS = 180.0
FAULTS = ("crash", "hang")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Read and preprocess one photograph; one of them may kill or stop the process."""

    folder: Path
    fault: str = ""
    faulty_key: str = ""

    def load(self, key: str) -> LoadedImage[Image.Image]:
        """Read and decode; the faulty file does what its fault says."""
        if key == self.faulty_key and self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if key == self.faulty_key and self.fault == "hang":
            time.sleep(3600)
        return load_image(key, FolderMedia(root=self.folder))

    def preprocess(self, loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        """Return one tensor, float32 [3, 224, 224] between 0 and 1."""
        resized = loaded.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        values = np.asarray(resized, np.float32) / 255
        return [torch.from_numpy(values).permute(2, 0, 1).contiguous()]

    def decode(self, key: str) -> Tensor:
        """Return the tensor of one photograph."""
        return self.preprocess(self.load(key))[0]

    def decode_array(self, key: str) -> np.ndarray:
        """Return the photograph as an array, which is pickled by its bytes."""
        return self.decode(key).numpy()


class Photographs(Dataset[Tensor]):
    """Give the photographs to torch's DataLoader."""

    def __init__(self, decoder: Decoder, keys: Sequence[str]) -> None:
        self.decoder = decoder
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        return self.decoder.decode(self.keys[index])


def by_apecache(decoder: Decoder, keys: Sequence[str]) -> Iterator[float]:
    """Decode with the project's own workers."""
    context = preprocess_ahead(
        keys,
        load=decoder.load,
        preprocess=decoder.preprocess,
        shapes=[(3, SIDE, SIDE)],
        ahead=PrefetchSpec(workers=N_WORKERS, images=AHEAD, hang_seconds=HANG_SECONDS),
    )
    with context as results:
        for result in results:
            if result.value is not None:
                yield float(result.value[0].sum())


def by_pebble(decoder: Decoder, keys: Sequence[str]) -> Iterator[float]:
    """Decode with pebble's pool, which ends a worker after a time limit and replaces dead ones."""
    from pebble import ProcessExpired, ProcessPool

    with ProcessPool(max_workers=N_WORKERS, context=get_context("fork")) as pool:
        schedule = partial(pool.schedule, decoder.decode_array, timeout=HANG_SECONDS)
        waiting = [schedule(args=[key]) for key in keys[:AHEAD]]
        for position in range(len(keys)):
            if position + AHEAD < len(keys):
                waiting.append(schedule(args=[keys[position + AHEAD]]))
            try:
                values = waiting[position].result()
            except (TimeoutError, ProcessExpired):
                continue
            yield float(torch.from_numpy(values).sum())


def by_torch(decoder: Decoder, keys: Sequence[str]) -> Iterator[float]:
    """Decode with torch's DataLoader; its workers share tensors through files in memory."""
    # A time limit for a batch is all that it has against a hanging worker.
    loader = DataLoader(
        Photographs(decoder, keys),
        batch_size=None,
        num_workers=N_WORKERS,
        prefetch_factor=AHEAD // N_WORKERS,
        multiprocessing_context="fork",
        timeout=HANG_SECONDS,
    )
    for pixels in loader:
        yield float(pixels.sum())


def by_spdl(decoder: Decoder, keys: Sequence[str]) -> Iterator[float]:
    """Decode with SPDL's pipeline over processes of the standard library."""
    from spdl.pipeline import PipelineBuilder

    with ProcessPoolExecutor(N_WORKERS, mp_context=get_context("fork")) as executor:
        stage = PipelineBuilder().add_source(keys)
        stage = stage.pipe(
            decoder.decode_array,
            concurrency=N_WORKERS,
            executor=executor,
            output_order="input",
        )
        pipeline = stage.add_sink(AHEAD).build(num_threads=N_WORKERS)
        with pipeline.auto_stop():
            for values in pipeline:
                yield float(torch.from_numpy(values).sum())


WAYS: dict[str, tuple[str, Callable[[Decoder, Sequence[str]], Iterator[float]]]] = {
    "apecache": ("apecache", by_apecache),
    "pebble": ("pebble", by_pebble),
    "torch DataLoader": ("torch", by_torch),
    "SPDL": ("spdl", by_spdl),
}
"""Module to look for, and how to decode, by the name of the way."""


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description="Ways to decode pictures beside the model.")
    parser.add_argument("--quick", action="store_true", help="few photographs, one repetition")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "FOLDER", "FAULT"), help="internal")
    options = parser.parse_args()
    if options.case:
        way, folder, fault = options.case
        print(json.dumps(measure_here(way, Path(folder), fault)))
        return
    n_photos = 48 if options.quick else 384
    n_repetitions = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        write_photographs(folder, longer_side=500, count=n_photos)
        rows = compare(folder, n_photos, n_repetitions)
    print_table(rows)
    goals = goals_of(rows)
    print_goals(goals)
    write_result("speed-decoders", goals=goals, rows=rows, path=options.json)


def measure_here(way: str, folder: Path, fault: str) -> dict[str, float]:
    """Decode all photographs of a folder in this process and its workers.

    Args:
        way: One of WAYS.
        folder: The photographs.
        fault: What the middle one does: crash, hang, or `none`.

    Returns:
        Number of pictures that came, and CPU and wall seconds.
    """
    keys = sorted(path.name for path in folder.iterdir())
    decoder = Decoder(folder=folder, fault=fault, faulty_key=keys[len(keys) // 2])
    torch.set_num_threads(1)
    begin = time.perf_counter()
    cpu_begin = cpu_seconds()
    n_pictures = sum(1 for _ in WAYS[way][1](decoder, keys))
    return {
        "pictures": n_pictures,
        "cpu_s": cpu_seconds() - cpu_begin,
        "wall_s": time.perf_counter() - begin,
    }


def cpu_seconds() -> float:
    """Return user and system time of this process and of all children that have ended."""
    seconds = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        seconds += usage.ru_utime + usage.ru_stime
    return seconds


def compare(folder: Path, n_photos: int, n_repetitions: int) -> list[dict[str, object]]:
    """Run all ways in turn, and each of them once with each fault."""
    ways = [way for way, (module, _) in WAYS.items() if find_spec(module) is not None]
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(n_repetitions):
        for way in ways:
            outcome = run_case(way, folder, "none")
            if outcome is None or outcome["pictures"] != n_photos:
                raise SystemExit(f"{way} gave not all pictures: {outcome}")
            measured[way].append(outcome)
    rows: list[dict[str, object]] = []
    for way in ways:
        row: dict[str, object] = {"way": way}
        for unit in ("cpu", "wall"):
            seconds = median(outcome[f"{unit}_s"] for outcome in measured[way])
            row[f"{unit}_ms_a_picture"] = round(1000 * seconds / n_photos, 3)
        for fault in FAULTS:
            outcome = run_case(way, folder, fault)
            n_missing = n_photos - int(outcome["pictures"]) if outcome else n_photos
            row[fault] = "passes" if n_missing == 1 else f"loses {n_missing} of {n_photos}"
        row["runs"] = n_repetitions
        rows.append(row)
    return rows


def run_case(way: str, folder: Path, fault: str) -> dict[str, float] | None:
    """Measure one case in a process of its own; None if it failed or did not end."""
    command = [sys.executable, "-m", "benchmarks.speed.decoders"]
    command += ["--case", way, str(folder), fault]
    # A session of its own, so that workers that hang can be ended with it.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=CASE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        return None
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def goals_of(rows: Sequence[dict[str, object]]) -> list[Goal]:
    """Return the goals: no picture but the faulty one is lost, at less CPU time than others."""
    by_way = {str(row["way"]): row for row in rows}
    own = by_way["apecache"]
    goals = [
        Goal(
            name=f"faults passed of {len(FAULTS)}",
            value=sum(own[fault] == "passes" for fault in FAULTS),
            target=len(FAULTS),
            better="higher",
        )
    ]
    for way, row in by_way.items():
        if row is not own and all(row[fault] == "passes" for fault in FAULTS):
            ratio = float(str(row["cpu_ms_a_picture"])) / float(str(own["cpu_ms_a_picture"]))
            goals.append(
                Goal(
                    name=f"CPU time of {way}, which passes both, to ours",
                    value=round(ratio, 3),
                    target=1.15,
                    better="higher",
                )
            )
    return goals


if __name__ == "__main__":
    main()
