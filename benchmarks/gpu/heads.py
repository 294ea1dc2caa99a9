"""Heads on the card: agreement with the CPU, steps of a fit, populations, losses."""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.device import is_accelerator, release_cached_memory
from apecache.heads.head import embed
from apecache.losses.contrastive import info_nce
from apecache.losses.tiled import tiled_info_nce
from apecache.recipes.recipe import Recipe, load_recipe, zoo_names
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import Population
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import draw_epoch, take_step
from benchmarks.gpu.clocks import (
    has_tf32,
    kernel_counts,
    matmul_precision,
    median_seconds,
    waits_per_step,
)
from benchmarks.gpu.made_up import feature_pairs
from benchmarks.gpu.parts import PartContext, reason

CPU = torch.device("cpu")
DIMS = (1024, 384)
TINY_DIMS = (96, 64)
PARITY_STEPS = 3
MEMBERS = (1, 8, 32)
FITS = ((600_000, 1024, 20), (3_000_000, 4096, 10), (12_000_000, 16_384, 10))
"""Pairs, batch size and epochs of the fits whose time is reckoned from one step."""
WITHOUT_DROPOUT = [
    f"{side}.{name}=0" for side in ("image", "text") for name in ("dropout", "input_dropout")
]


def agreement(context: PartContext) -> None:
    """Train each recipe on the CPU and on the card from the same weights and batches."""
    names = [name for name in zoo_names() if load_recipe(name).trains_heads_alone]
    for name in names[: 4 if context.tiny else None]:
        try:
            recipe = _without_chance(load_recipe(name))
            here = _embedded(recipe, CPU)
            there = _embedded(recipe, context.device)
            distances = [float((b - a).norm() / a.norm()) for a, b in zip(here, there, strict=True)]
            context.add("recipe", recipe=name, distance=max(distances))
        except (RuntimeError, ValueError) as error:
            context.add("recipe", recipe=name, failed=reason(error))


def _without_chance(recipe: Recipe) -> Recipe:
    """Return the recipe with small batches, and without dropout and augmentation."""
    settings = ["schedule.batch_size=64", "augmentation={}"]
    if recipe.schedule.epochs and recipe.image.kind != "ensemble":
        settings += WITHOUT_DROPOUT
    if recipe.image.cut == "tokens":
        settings += ["image.n_heads=2", "text.n_heads=2"]
    return load_recipe(recipe.name, settings)


def _embedded(recipe: Recipe, device: torch.device) -> list[Tensor]:
    """Return the embeddings of all pairs after a few steps, float64 on the CPU."""
    train = feature_pairs(512, TINY_DIMS, device, tokens=recipe.image.cut == "tokens")
    model, _ = initial_model(recipe, train=train, dev=train, seed=0)
    for module in model.modules():
        # Dropout draws other numbers on each device.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    training = HeadFit(model, recipe, 0)
    if training.optimizer is not None:
        plan = StepCount.of(recipe, train)
        drawn = draw_epoch(training, train, plan)
        training.model.train()
        for _ in range(PARITY_STEPS):
            take_step(training, islice(drawn, plan.accumulate), plan)
            training.step += 1
    sides = (model.image, train.image), (model.text, train.text)
    return [embed(head, features).double().cpu() for head, features in sides]


def fits(context: PartContext) -> None:
    """Time a step of `projection` at three batch sizes, beside its matrix products alone."""
    dims = TINY_DIMS if context.tiny else DIMS
    train = feature_pairs(context.size(600_000, 4000), dims, context.device)
    dev = feature_pairs(context.size(5000, 200), dims, context.device)
    for n_pairs, batch_size, n_epochs in FITS:
        batch = min(batch_size, 256) if context.tiny else batch_size
        recipe = load_recipe("projection", [f"schedule.batch_size={batch}"])
        stepper = _Stepper(recipe, train, n_steps=context.size(max(4, 65_536 // batch), 3))
        with seeded(1, context.device):
            seconds = median_seconds(stepper, context.device, repeats=3, warm=1) / stepper.n_steps
            waits = waits_per_step(stepper, context.device, stepper.n_steps)
            counts = kernel_counts(stepper, context.device, stepper.n_steps)
        context.add(
            "fit",
            pairs=n_pairs,
            batch=batch,
            step_ms=round(1000 * seconds, 4),
            products_ms=round(1000 * _products_seconds(batch, dims, context.device), 4),
            waits=waits,
            fit_seconds=round(seconds * n_epochs * (n_pairs // batch_size), 3),
            **counts,
        )
    _evaluation(context, stepper.training, dev)


class _Stepper:
    """Take some steps of a fit at each call, from one epoch to the next."""

    def __init__(self, recipe: Recipe, train: FeaturePairs, n_steps: int) -> None:
        model, _ = initial_model(recipe, train=train, dev=train, seed=0)
        self.training = HeadFit(model, recipe, 0)
        self.train = train
        self.plan = StepCount.of(recipe, train)
        self.n_steps = n_steps
        self.drawn = draw_epoch(self.training, train, self.plan)
        self.training.model.train()

    def __call__(self) -> None:
        for _ in range(self.n_steps):
            batches = list(islice(self.drawn, self.plan.accumulate))
            if not batches:
                self.drawn = draw_epoch(self.training, self.train, self.plan)
                batches = list(islice(self.drawn, self.plan.accumulate))
            take_step(self.training, iter(batches), self.plan)


def _products_seconds(batch: int, dims: tuple[int, int], device: torch.device) -> float:
    """Time the products that a step of `projection` cannot do without.

    Two linear heads and their weights' gradients, the logits, and the gradients of both sides.
    """
    out_dim = load_recipe("projection").image.dim or 512
    features = [torch.randn(batch, dim, device=device) for dim in dims]
    weights = [torch.randn(out_dim, dim, device=device) for dim in dims]
    image = torch.randn(batch, out_dim, device=device)
    text = torch.randn(batch, out_dim, device=device)

    def products() -> None:
        for x, weight in zip(features, weights, strict=True):
            y = x @ weight.T
            y.T @ x
        logits = image @ text.T
        logits @ text
        logits.T @ image

    with matmul_precision("high" if has_tf32(device) else "highest"):
        return median_seconds(products, device)


def _evaluation(context: PartContext, training: HeadFit, dev: FeaturePairs) -> None:
    seconds = median_seconds(lambda: training.evaluate(dev), context.device, repeats=3, warm=1)
    context.add("evaluation", images=len(dev), ms=round(1000 * seconds, 2))


def populations(context: PartContext) -> None:
    """Time a step of members together, beside fits alone of as many members."""
    dims = TINY_DIMS if context.tiny else DIMS
    device = context.device
    batch = context.size(1024, 64)
    train = feature_pairs(context.size(16_384, 256), dims, device)
    for name in ("projection", "gated"):
        recipe = load_recipe(name, [f"schedule.batch_size={batch}"])
        alone = _Stepper(recipe, train, n_steps=context.size(16, 2))
        alone_seconds = median_seconds(alone, device, repeats=3, warm=1) / alone.n_steps
        for n_members in (1, 4) if context.tiny else MEMBERS:
            row: dict[str, Any] = {"recipe": name, "members": n_members}
            try:
                row |= _population_row(context, recipe, train, n_members)
                row["alone / together"] = round(1000 * alone_seconds / row["member_ms"], 2)
            except (RuntimeError, ValueError) as error:
                row["failed"] = reason(error)
            context.add("population", **row)
            release_cached_memory(device)


def _population_row(
    context: PartContext,
    recipe: Recipe,
    train: FeaturePairs,
    n_members: int,
) -> dict[str, Any]:
    device = context.device
    members: list[HeadFit] = []
    for seed in range(n_members):
        model, _ = initial_model(recipe, train=train, dev=train, seed=seed)
        members.append(HeadFit(model, recipe, seed))
    per_epoch = StepCount.of(recipe, train).per_epoch
    plan = StepCount(n_steps=100 * per_epoch, per_epoch=per_epoch, accumulate=1)
    streams = MemberGenerators.seeded(list(range(n_members)), device)
    population = Population(members, streams, plan)

    def epoch() -> None:
        population.take_steps(train)
        for member in members:
            member.in_epoch = 0
            member.losses = []

    seconds = median_seconds(epoch, device, repeats=3, warm=2) / per_epoch
    row = {
        "step_ms": round(1000 * seconds, 3),
        "member_ms": round(1000 * seconds / n_members, 4),
        "waits": waits_per_step(epoch, device, per_epoch),
        **kernel_counts(epoch, device, per_epoch),
    }
    population.release()
    return row


def losses(context: PartContext) -> None:
    """Compare InfoNCE on all logits at once with tiles of several sizes."""
    for batch in (128, 256) if context.tiny else (2048, 8192, 32_768):
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"whole": info_nce}
        for tile in (64,) if context.tiny else (256, 2048, 8192):
            if tile < batch:
                ways[f"tiles of {tile}"] = _tiled(tile)
        for name, loss in ways.items():
            try:
                seconds = _loss_seconds(batch, loss, context.device)
                context.add("loss", batch=batch, way=name, ms=round(1000 * seconds, 3))
            except torch.OutOfMemoryError:
                context.add("loss", batch=batch, way=name, failed="out of memory")
            release_cached_memory(context.device)


def _tiled(tile: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda image, text, scale: tiled_info_nce(image, text, scale, tile=tile)


def _loss_seconds(
    batch: int,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
) -> float:
    """Time a loss with its gradients."""
    leaves = [F.normalize(torch.randn(batch, 512, device=device), dim=1) for _ in range(2)]
    leaves.append(torch.tensor(20.0, device=device))
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> None:
        torch.autograd.grad(loss(*leaves), leaves)

    return median_seconds(run, device, repeats=3, warm=1)


def memory(context: PartContext) -> None:
    """Encode a batch with less memory than it needs, and load features into a nearly full card."""
    from apecache.extraction.encode import encode_or_halve

    device = context.device
    if not is_accelerator(device) or device.type != "cuda":
        context.add("memory", skipped="only CUDA limits a process's memory")
        return
    width, n_rows = 1024, 32_768
    layers = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(8)]).to(device)
    batch = torch.zeros(n_rows, width)
    sizes: list[int] = []

    def encode(rows: Tensor) -> list[Tensor]:
        sizes.append(len(rows))
        with torch.no_grad():
            states = [rows.to(device)]
            for layer in layers:
                states.append(layer(states[-1]))
        return states[-1:]

    torch.cuda.reset_peak_memory_stats(device)
    encode(batch)
    needed_bytes = torch.cuda.max_memory_allocated(device)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    for share in (0.9, 0.7):
        sizes.clear()
        release_cached_memory(device)
        torch.cuda.set_per_process_memory_fraction(share * needed_bytes / total_bytes, device)
        begin = time.perf_counter()
        try:
            encode_or_halve(encode, batch, device)
            outcome = "encoded"
        except torch.OutOfMemoryError:
            outcome = "out of memory"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        seconds = round(time.perf_counter() - begin, 3)
        context.add("memory", share=share, outcome=outcome, batches=list(sizes), seconds=seconds)
