"""A population of small heads against the same heads one after another: CPU seconds of a member's step.

    python -m benchmarks.speed.sweep
    python -m benchmarks.speed.sweep --quick       # fewer repeats, members of 1 and 4

Both go through the trainers as a user's fit does: batches drawn and gathered, standardised, the step, AdamW with a rate
and decay of each member's own; without evaluation. One head each side, linear 1280 and 384 -> 512, batch 512. On one
thread and on as many as torch takes: a thread that waits for the next product costs CPU time as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from apecache.heads.stacked import Streams
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs
from apecache.train.initial import initial_model
from apecache.train.loop import Plan, Training, draw_epoch, take_steps
from apecache.train.population import Population
from benchmarks.record import Goal, print_goals, print_table, write_result

IMAGE_DIM, TEXT_DIM, DIM, BATCH, STEPS = 1280, 384, 512, 512, 6


def main() -> None:
    options = parse_arguments()
    rows = [measure(count, threads, options.repeats) for threads in options.threads for count in options.members]
    print_table(rows)
    print_goals(goals(rows))
    if options.json or not options.quick:
        write_result("speed-sweep", goals(rows), rows, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A population of small heads against solo fits.")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.members, options.repeats = [1, 4], 2
    return options


def measure(count: int, threads: int, repeats: int) -> dict[str, Any]:
    """Cases interleaved; medians."""
    torch.set_num_threads(threads)
    train = features(BATCH * STEPS)
    plan = Plan(STEPS * (repeats + 1), STEPS, 1)
    solo, stacked = [members(count, train) for _ in range(2)]
    population = Population(stacked, Streams.seeded(list(range(count)), torch.device("cpu")), plan)
    cases: dict[str, Callable[[], object]] = {
        "solo": lambda: [take_steps(member, draw_epoch(member, train, plan), plan) for member in solo],
        "stacked": lambda: population.take_steps(train),
    }
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            begin = time.process_time(), time.perf_counter()
            case()
            if repeat:  # the first round warms up
                cpu[name].append(time.process_time() - begin[0])
                wall[name].append(time.perf_counter() - begin[1])
        for member in (*solo, *stacked):
            member.in_epoch, member.losses = 0, []
    milliseconds = {name: 1000 * statistics.median(times) / (STEPS * count) for name, times in cpu.items()}
    return {
        "members": count,
        "threads": threads,
        "solo cpu ms": round(milliseconds["solo"], 2),
        "stacked cpu ms": round(milliseconds["stacked"], 2),
        "ratio": round(milliseconds["solo"] / milliseconds["stacked"], 3),
        "wall ratio": round(statistics.median(wall["solo"]) / statistics.median(wall["stacked"]), 3),
    }


def members(count: int, train: FeaturePairs) -> list[Training]:
    made = []
    for seed in range(count):
        values = {
            "optimiser": {"lr": 1e-3 * (1 + seed), "weight_decay": 0.01 * seed},
            "schedule": {"batch_size": BATCH},
        }
        side = {"kind": "linear", "dim": DIM}
        recipe = Recipe.model_validate({"name": "linear", "image": side, "text": side, **values})
        made.append(Training(initial_model(recipe, train, train, seed)[0], recipe, seed))
    return made


def features(n_images: int) -> FeaturePairs:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n_images, dim, generator=generator) for dim in (IMAGE_DIM, TEXT_DIM))
    return FeaturePairs(image, text, torch.arange(n_images + 1))


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    large = [row for row in rows if row["members"] >= 16]
    names = [f"CPU solo / stacked of {row['members']} members, threads {row['threads']}" for row in large]
    return [Goal(name, row["ratio"], 1.15, "higher") for name, row in zip(names, large, strict=True)]


if __name__ == "__main__":
    main()
