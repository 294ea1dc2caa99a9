"""Tiled losses against full logits: CPU time and memory of one forward and backward pass, side by
side in one process.

    python -m benchmarks.speed.losses
    python -m benchmarks.speed.losses --quick       # smaller batches, no goals to speak of

Memory is the peak that a pass adds to its process (one for each case; Linux), gradients of the
embeddings included.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.losses.contrastive import info_nce, sigmoid_loss
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from benchmarks.record import Goal, print_goals, print_table, write_result

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "infonce full": lambda image, text: info_nce(image, text, 14.3),
    "infonce tiled": lambda image, text: tiled_info_nce(image, text, 14.3),
    "sigmoid full": lambda image, text: sigmoid_loss(image, text=text, scale=10.0, bias=-10.0),
    "sigmoid tiled": lambda image, text: tiled_sigmoid_loss(
        image,
        text=text,
        scale=10.0,
        bias=-10.0,
    ),
}
DIM = 512


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.memory_of:
        print(added_megabytes(LOSSES[options.memory_of], options.batch))
        return
    rows = measure(options)
    print_table(rows)
    print_goals(goals(rows))
    if options.json or not options.quick:
        write_result("speed-losses", goals=goals(rows), rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="CPU time and memory of the tiled losses against full logits."
    )
    parser.add_argument("--batch", type=int, default=6144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.batch = 1536
        options.repeats = 3
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cases interleaved; medians."""
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    inputs = embeddings(options.batch)
    for repeat in range(options.repeats + 1):
        for name, loss in LOSSES.items():
            begin = time.process_time()
            loss(*inputs).backward()
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - begin)
    rows = []
    for name, times in seconds.items():
        memory = megabytes_in_a_process(name, options.batch)
        rows.append(
            {
                "loss": name,
                "batch": options.batch,
                "cpu s": round(statistics.median(times), 3),
                "MB": memory,
            }
        )
    return rows


def embeddings(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(batch, DIM, generator=generator), dim=-1) for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_()


def megabytes_in_a_process(name: str, batch: int) -> float:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.losses",
        "--memory-of",
        name,
        "--batch",
        str(batch),
    ]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def added_megabytes(loss: Callable[[Tensor, Tensor], Tensor], batch: int) -> float:
    inputs = embeddings(batch)
    loss(*embeddings(64)).backward()
    before = status_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    loss(*inputs).backward()
    return round(status_megabytes("VmHWM") - before, 1)


def status_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    found = {row["loss"]: row for row in rows}
    pairs = [
        (found[f"{kind} tiled"], found[f"{kind} full"], kind) for kind in ("infonce", "sigmoid")
    ]
    times = [
        Goal(
            name=f"{kind}: CPU time tiled / full",
            value=t["cpu s"] / f["cpu s"],
            target=1.0,
            better="lower",
        )
        for t, f, kind in pairs
    ]
    memory = [
        Goal(
            name=f"{kind}: memory tiled / full",
            value=t["MB"] / f["MB"],
            target=0.2,
            better="lower",
        )
        for t, f, kind in pairs
    ]
    return [*times, *memory]


if __name__ == "__main__":
    main()
