"""A training step on cached features against its matrix products alone, and loading a batch against
the loops of today.

    python -m benchmarks.speed.fit
    python -m benchmarks.speed.fit --quick       # few rows, small batches, no goals to speak of

Two heads of four layers, 768 and 384 wide features to 1,024 to 512; batches of 1,024 of 40,000
pairs, float16, one thread. `products`: the products of forward and backward pass and of the logits,
nothing else. Loops of today read row by row: a TensorDataset in a DataLoader, a data set of dicts
over NumPy arrays (FuseMix), of lists of tensors (SAIL), an HDF5 file (as h5py lays it out, and
compressed with gzip), and Zarr arrays as zarr lays them out. Each gives batches like those that
apecache gives.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from apecache.recipes.recipe import Recipe, parse_recipe
from apecache.train.batches import Batch, FeaturePairs, batches
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import take_step
from apecache.train.model import build_model
from benchmarks.record import Goal, print_goals, print_table, write_result

IMAGE_DIM = 768
TEXT_DIM = 384
WIDTH = 1024
OUT_DIM = 512
LAYERS = 4
PER_ITEM_ROUNDS = 3
Loader = Callable[[int], Iterable[Any]]
"""At most so many batches of an epoch."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print_table(rows)
    print_goals(goals(rows))
    if options.json or not options.quick:
        write_result("speed-fit", goals=goals(rows), rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A step on cached features, and loading a batch, against others."
    )
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.rows = 2048
        options.batch = 256
        options.repeats = 5
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of all cases, interleaved, medians."""
    pairs = make_pairs(options.rows)
    loaders = make_loaders(pairs, options.batch, folder)
    cases: dict[str, Callable[[], float]] = {
        "products": timed(products(options.batch), 1),
        "step": timed(step(pairs, options.batch), 1),
        **{
            f"load: {name}": timed_loading(
                loader,
                pairs=pairs,
                options=options,
                per_item="per item" in name,
            )
            for name, loader in loaders.items()
        },
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for repeat in range(options.repeats + 1):
        for name, case in cases.items():
            if "per item" in name and repeat > PER_ITEM_ROUNDS:
                continue
            begin = time.perf_counter()
            cpu = case()
            if repeat:  # the first round warms up
                seconds[name].append((cpu, time.perf_counter() - begin))
    return [row(name, times) for name, times in seconds.items()]


def row(name: str, times: list[tuple[float, float]]) -> dict[str, Any]:
    cpu = 1000 * statistics.median(cpu for cpu, _ in times)
    return {"case": name, "cpu ms per batch": round(cpu, 4), "rounds": len(times)}


def timed(run: Callable[[], object], batches_in_it: int) -> Callable[[], float]:
    """CPU seconds per batch."""

    def case() -> float:
        begin = time.process_time()
        run()
        return (time.process_time() - begin) / batches_in_it

    return case


def timed_loading(
    loader: Loader,
    pairs: FeaturePairs,
    options: argparse.Namespace,
    per_item: bool,
) -> Callable[[], float]:
    """A whole epoch, so that drawing its order counts with its share; of files that are read item
    by item, which takes seconds a batch, one batch."""
    count = 1 if per_item else len(pairs) // options.batch

    def run() -> None:
        given = sum(1 for _ in loader(count))
        assert given == count, (given, count)

    return timed(run, count)


# --- the step -------------------------------------------------------------------------------------


def make_pairs(rows: int) -> FeaturePairs:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(rows, dim, generator=generator).half() for dim in (IMAGE_DIM, TEXT_DIM)
    )
    return FeaturePairs(image=image, text=text, first_text=torch.arange(rows + 1))


def make_recipe(batch: int) -> Recipe:
    head = {"kind": "mlp", "depth": LAYERS - 1, "width": WIDTH, "residual": False, "dim": OUT_DIM}
    schedule = {"epochs": 1000, "batch_size": batch}
    return parse_recipe(
        {"name": "benchmark", "image": head, "text": head, "schedule": schedule},
        "benchmark",
    )


def step(pairs: FeaturePairs, batch: int) -> Callable[[], object]:
    """A step of the trainer on a batch that is there: both heads, loss, backward pass, AdamW."""
    recipe = make_recipe(batch)
    training = HeadFit(build_model(recipe, pairs, 0), recipe, 0)
    plan = StepCount.of(recipe, pairs)
    drawn = next(batches(pairs, batch, torch.Generator().manual_seed(1)))
    training.model.train()
    return lambda: take_step(training, iter([drawn]), plan)


def products(batch: int) -> Callable[[], object]:
    """Of every layer y = x W, and in the backward pass dW = x' dy and (but for the first) dx = dy
    W'; of the logits the product and both of its gradients."""
    jobs: list[tuple[Tensor, Tensor]] = []
    for dim in (IMAGE_DIM, TEXT_DIM):
        widths = [dim, *[WIDTH] * (LAYERS - 1), OUT_DIM]
        for number, (before, after) in enumerate(pairwise(widths)):
            x = torch.randn(batch, before)
            weight = torch.randn(after, before)
            dy = torch.randn(batch, after)
            jobs += [(x, weight.T), (dy.T, x)] + ([(dy, weight)] if number else [])
    image = torch.randn(batch, OUT_DIM)
    text = torch.randn(batch, OUT_DIM)
    dlogits = torch.randn(batch, batch)
    jobs += [(image, text.T), (dlogits, text), (dlogits.T, image)]
    outs = [torch.empty(a.shape[0], b.shape[1]) for a, b in jobs]

    def run() -> None:
        for (a, b), out in zip(jobs, outs, strict=True):
            torch.mm(a, b, out=out)

    return run


# --- loading --------------------------------------------------------------------------------------


class DictRows(Dataset[dict[str, Any]]):
    """FuseMix's way: a dict of both sides for every row of NumPy arrays."""

    def __init__(self, image: Any, text: Any) -> None:
        self.image = image
        self.text = text

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": self.image[row], "text": self.text[row], "row": row}


class ListRows(Dataset[tuple[Tensor, Tensor]]):
    """SAIL's way: lists of one tensor for every row."""

    def __init__(self, pairs: FeaturePairs) -> None:
        self.image = list(pairs.image.clone().unbind())
        self.text = list(pairs.text.clone().unbind())

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.image[row], self.text[row]


def make_loaders(pairs: FeaturePairs, batch: int, folder: Path) -> dict[str, Loader]:
    arrays = pairs.image.numpy(), pairs.text.numpy()
    return {
        "apecache": ours(pairs, batch),
        "TensorDataset": loop_of(TensorDataset(pairs.image, pairs.text), batch),
        "dict of arrays": loop_of(DictRows(*arrays), batch),
        "list of tensors": loop_of(ListRows(pairs), batch),
        "zarr per item": loop_of(DictRows(*write_zarr(arrays, folder)), batch),
        "HDF5 per item": loop_of(DictRows(*write_hdf5(arrays, folder, None)), batch),
        "HDF5 per item, gzip": loop_of(DictRows(*write_hdf5(arrays, folder, "gzip")), batch),
    }


def ours(pairs: FeaturePairs, batch: int) -> Loader:
    generator = torch.Generator().manual_seed(2)

    def load(count: int) -> Iterator[Batch]:
        return (
            found for found, _ in zip(batches(pairs, batch, generator), range(count), strict=False)
        )

    return load


def loop_of(rows: Dataset[Any], batch: int) -> Loader:
    loader: DataLoader[Any] = DataLoader(rows, batch, shuffle=True, drop_last=True)
    return lambda count: (found for _, found in zip(range(count), loader, strict=False))


def write_zarr(arrays: tuple[Any, Any], folder: Path) -> list[Any]:
    found = []
    for name, values in zip(("image", "text"), arrays, strict=True):
        array = zarr.create_array(folder / name, shape=values.shape, dtype=values.dtype)
        array[:] = values
        found.append(array)
    return found


def write_hdf5(arrays: tuple[Any, Any], folder: Path, compression: str | None) -> list[Any]:
    file = h5py.File(folder / f"{compression}.h5", "w")
    named = zip(("image", "text"), arrays, strict=True)
    return [
        file.create_dataset(name, data=np.asarray(x), compression=compression) for name, x in named
    ]


# --- goals ----------------------------------------------------------------------------------------


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    found = {row["case"]: row["cpu ms per batch"] for row in rows}
    ours = found["load: apecache"]
    whole = found["step"] + found["load: apecache"]
    loops = {
        name: found[f"load: {name}"]
        for name in ("zarr per item", "HDF5 per item", "HDF5 per item, gzip")
    }
    times = {name: (found["step"] + loop) / whole for name, loop in loops.items()}
    return [
        Goal(
            name="CPU time of a step / of its matrix products",
            value=found["step"] / found["products"],
            target=1.25,
            better="lower",
        ),
        Goal(
            name="loading: % of a step with its loading",
            value=100 * ours / whole,
            target=0.5,
            better="lower",
        ),
        *(
            Goal(
                name=f"step with its loading: {name} / apecache",
                value=ratio,
                target=8 if name.startswith("zarr") else 3,
                better="higher",
            )
            for name, ratio in times.items()
        ),
    ]


if __name__ == "__main__":
    main()
