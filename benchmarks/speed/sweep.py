"""A population of small heads against the other ways to train as many: CPU and wall seconds.

    python -m benchmarks.speed.sweep
    python -m benchmarks.speed.sweep --quick       # one member and four, one batch size, fewer repeats

Heads 384 -> 512 -> 256 on both sides, a rate and a decay of each member's own. `steps`:
milliseconds of a member's step (batches drawn and gathered, standardized, the step, AdamW), one
after another through the trainer of fit-head, as a population, by torch.func.vmap with AdamW
written over stacked weights, and the matrix products alone, which bound what any way can gain.
`whole`: the whole sweep, a process for each trial that loads the features and runs a plain loop, a
joblib pool of two processes, fit-head's trainer one after another, and a population. One thread;
cases interleaved; medians. Measured on a CPU only.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.recipes.recipe import Recipe
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import Population, train_together
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import draw_epoch, run_training, take_steps
from benchmarks.record import Goal, print_goals, print_table, write_result

IN_DIM = 384
WIDTH = 512
DIM = 256
STEPS = 6
EPOCHS = 4
CPU = torch.device("cpu")
Case = Callable[[], float]
"""Runs a way once; returns its CPU seconds."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.trial:
        plain_loop(*(int(number) for number in options.trial[1:]), Path(options.trial[0]))
        return
    sizes = [(members, batch) for batch in options.batches for members in options.members]
    steps = [step_row(*size, options.repeats) for size in sizes]
    print_table(steps)
    whole = [whole_row(options.trials, options.batches[-1], options.repeats)]
    print_table(whole)
    reached = goals(steps)
    print_goals(reached)
    if options.json or not options.quick:
        write_result("speed-sweep", goals=reached, rows=[*steps, *whole], path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A population of small heads against other ways to train as many."
    )
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1024, 256])
    parser.add_argument("--trials", type=int, default=16, help="of the whole sweep")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trial", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.members = [1, 4]
        options.batches = [64]
        options.trials = 4
        options.repeats = 2
    return options


def medians(cases: Mapping[str, Case], repeats: int) -> dict[str, tuple[float, float]]:
    """CPU and wall seconds of each; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, case in cases.items():
            begin = time.perf_counter()
            cpu = case()
            times[name].append((cpu, time.perf_counter() - begin))
    return {
        n: (statistics.median(c for c, _ in t[1:]), statistics.median(w for _, w in t[1:]))
        for n, t in times.items()
    }


def timed(action: Callable[[], object]) -> Case:
    def run() -> float:
        begin = time.process_time()
        action()
        return time.process_time() - begin

    return run


def step_row(count: int, batch: int, repeats: int) -> dict[str, Any]:
    train = features(batch * STEPS)
    plan = StepCount(n_steps=STEPS * (repeats + 1), per_epoch=STEPS, accumulate=1)
    solo, stacked = [[training(seed, batch, train) for seed in range(count)] for _ in range(2)]
    population = Population(stacked, MemberGenerators.seeded(list(range(count)), CPU), plan)

    def one_after_another() -> None:
        for member in solo:
            take_steps(member, draw_epoch(member, train, plan), plan)
            member.in_epoch = 0
            member.losses = []

    def together() -> None:
        population.take_steps(train)
        for member in stacked:
            member.in_epoch = 0
            member.losses = []

    vmapped = Vmapped([training(seed, batch, train) for seed in range(count)], train, batch)
    cases = {
        "solo": timed(one_after_another),
        "population": timed(together),
        "vmap": timed(vmapped.epoch),
        "products": timed(lambda: products(count, batch)),
    }
    found = {
        name: 1000 * cpu / (STEPS * count) for name, (cpu, _) in medians(cases, repeats).items()
    }
    return {
        "what": "steps",
        "members": count,
        "batch": batch,
        **{f"{name} cpu ms": round(value, 2) for name, value in found.items()},
        "solo / population": round(found["solo"] / found["population"], 3),
        "vmap / population": round(found["vmap"] / found["population"], 3),
        "solo / products": round(found["solo"] / found["products"], 3),
    }


def whole_row(count: int, batch: int, repeats: int) -> dict[str, Any]:
    train = features(batch * STEPS)
    dev = features(256)
    plan = StepCount(n_steps=STEPS * EPOCHS, per_epoch=STEPS, accumulate=1)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "features.npz"
        np.savez(path, image=train.image.numpy(), text=train.text.numpy())
        cases = {
            "processes": lambda: sum(process(path, seed, batch) for seed in range(count)),
            "joblib": lambda: pooled(count, batch=batch, train=train, dev=dev, plan=plan),
            "solo": lambda: sum(
                fit(seed, batch=batch, train=train, dev=dev, plan=plan) for seed in range(count)
            ),
            "population": timed(
                lambda: fit_together(count, batch=batch, train=train, dev=dev, plan=plan)
            ),
        }
        found = medians(cases, max(1, repeats // 2))
    row: dict[str, Any] = {
        "what": "whole",
        "members": count,
        "batch": batch,
        "steps of a trial": plan.n_steps,
    }
    for name, (cpu, wall) in found.items():
        row |= {f"{name} cpu s": round(cpu, 2), f"{name} wall s": round(wall, 2)}
    for place, unit in enumerate(("cpu", "wall")):
        row[f"processes / population {unit}"] = round(
            found["processes"][place] / found["population"][place],
            2,
        )
    return row


def training(seed: int, batch: int, train: FeaturePairs) -> HeadFit:
    side = {"kind": "mlp", "width": WIDTH, "dim": DIM, "depth": 1, "residual": False}
    optimizer = {"lr": 1e-3 * (1 + seed / 8), "weight_decay": 0.01 * seed}
    schedule = {"batch_size": batch, "epochs": EPOCHS, "evaluate_every": EPOCHS}
    described = {
        "name": "mlp",
        "image": side,
        "text": side,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    recipe = Recipe.model_validate(described)
    return HeadFit(initial_model(recipe, train=train, dev=train, seed=seed)[0], recipe, seed)


def features(n_images: int) -> FeaturePairs:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n_images, IN_DIM, generator=generator).half() for _ in range(2))
    return FeaturePairs(image=image, text=text, first_text=torch.arange(n_images + 1))


def products(count: int, batch: int) -> None:
    """The matrix products of the steps of one epoch, operands in the caches: forward, both
    gradients, logits."""
    shapes = [(IN_DIM, WIDTH, False), (WIDTH, DIM, True)] * 2
    operands = [
        (torch.ones(batch, i), torch.ones(o, i), torch.ones(batch, o), wanted)
        for i, o, wanted in shapes
    ]
    image = torch.ones(batch, DIM)
    text = torch.ones(batch, DIM)
    logits = torch.ones(batch, batch)
    for _ in range(STEPS * count):
        for x, weight, y, wanted in operands:
            torch.mm(x, weight.T)
            torch.mm(y.T, x)
            if wanted:
                torch.mm(y, weight)
        torch.mm(image, text.T, out=logits)
        torch.mm(logits, text)
        torch.mm(logits.T, image)


class Vmapped:
    """The same heads by torch.func, gradients of all members at once, AdamW with rates and decays
    as tensors."""

    def __init__(self, members: list[HeadFit], train: FeaturePairs, batch: int) -> None:
        self.model = members[0].model
        self.train = train
        self.batch = batch
        self.weights, self.buffers = torch.func.stack_module_state(
            [member.model for member in members]
        )
        self.weights = {name: value.detach() for name, value in self.weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.rates = torch.tensor([member.recipe.optimizer.lr for member in members])
        self.decays = torch.tensor([member.recipe.optimizer.weight_decay for member in members])
        self.generator = torch.Generator().manual_seed(0)
        self.step = 0
        self.gradients = torch.func.vmap(torch.func.grad(self._loss))

    def _loss(self, weights: Any, buffers: Any, image: Tensor, text: Tensor) -> Tensor:
        def embed(side: str, x: Tensor) -> Tensor:
            values = {**weights, **buffers}
            own = {
                name.removeprefix(f"{side}."): v
                for name, v in values.items()
                if name.startswith(f"{side}.")
            }
            embedded: Tensor = torch.func.functional_call(getattr(self.model, side), own, (x,))
            return embedded

        logits = (
            weights["temperature.log_scale"].exp() * embed("image", image) @ embed("text", text).T
        )
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def epoch(self) -> None:
        orders = [torch.randperm(len(self.train), generator=self.generator) for _ in self.rates]
        for rows in torch.stack(orders).split(self.batch, 1):
            found = self.gradients(
                self.weights,
                self.buffers,
                self.train.image[rows],
                self.train.text[rows],
            )
            self._update(found)

    def _update(self, gradients: Mapping[str, Tensor]) -> None:
        self.step += 1
        for name, weight in self.weights.items():
            rate, decay = (
                values.view(-1, *[1] * (weight.ndim - 1)) for values in (self.rates, self.decays)
            )
            self.first[name].lerp_(gradients[name], 0.1)
            self.second[name].lerp_(gradients[name].square(), 0.001)
            if weight.ndim > 2:
                weight.mul_(1 - rate * decay)
            scale = (self.second[name] / (1 - 0.999**self.step)).sqrt_().add_(1e-8)
            weight.sub_(rate * (self.first[name] / (1 - 0.9**self.step)).div_(scale))


def fit(seed: int, batch: int, train: FeaturePairs, dev: FeaturePairs, plan: StepCount) -> float:
    """CPU seconds of a fit, in whichever process."""
    torch.set_num_threads(1)

    def run() -> None:
        with seeded(seed + 1, CPU):
            run_training(
                training(seed, batch, train),
                train=train,
                dev=dev,
                plan=plan,
                log=lambda _: None,
                save=lambda _: None,
            )

    return timed(run)()


def fit_together(
    count: int,
    batch: int,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
) -> None:
    members = [training(seed, batch, train) for seed in range(count)]
    train_together(
        members,
        streams=MemberGenerators.seeded(list(range(1, count + 1)), CPU),
        train=train,
        dev=dev,
        plan=plan,
        n_epochs=EPOCHS,
    )


def pooled(
    count: int,
    batch: int,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
) -> float:
    from joblib import Parallel, delayed

    jobs = (delayed(fit)(seed, batch, train, dev, plan) for seed in range(count))
    return float(sum(Parallel(n_jobs=2)(jobs)))


def process(path: Path, seed: int, batch: int) -> float:
    """CPU seconds of a process that trains one head."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    module = "benchmarks.speed.sweep"
    subprocess.run(
        [sys.executable, "-m", module, "--trial", str(path), str(seed), str(batch)],
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def plain_loop(seed: int, batch: int, path: Path) -> None:
    """What a script of a page does: load, standardize, loop, AdamW."""
    torch.manual_seed(seed)
    stored = np.load(path)
    sides = [torch.from_numpy(stored[name]).float() for name in ("image", "text")]
    image, text = ((x - x.mean(0)) / x.std(0) for x in sides)
    heads = [
        nn.Sequential(
            nn.Linear(IN_DIM, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, DIM),
        )
        for _ in sides
    ]
    log_scale = nn.Parameter(torch.tensor(2.66))
    parameters = [log_scale, *heads[0].parameters(), *heads[1].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    own = torch.arange(batch)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(image)).split(batch):
            pair = [
                F.normalize(head(x[rows]), dim=-1)
                for head, x in zip(heads, (image, text), strict=True)
            ]
            logits = log_scale.exp() * pair[0] @ pair[1].T
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """From sixteen members on a gain, with fewer never a loss."""
    found = []
    for row in rows:
        name = f"CPU solo / population, {row['members']} members, batch {row['batch']}"
        found.append(
            Goal(
                name=name,
                value=row["solo / population"],
                target=1.15 if row["members"] >= 16 else 1.0,
                better="higher",
            )
        )
    return found


if __name__ == "__main__":
    main()
