"""The planner: what a recipe trains, where each tower can be cut, and what that costs, before
anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from apecache.encoders.tower import Cut, Tower
from apecache.errors import OptionError
from apecache.heads.head import Head
from apecache.models.adapters import insert_adapters
from apecache.models.freezing import Match, freeze_towers
from apecache.plan.counting import STORED_BYTES, Counted, Parts, PlanSpec, SidePlan, count_side
from apecache.plan.counting_shared import Taught, count_shared
from apecache.plan.devices import Device
from apecache.recipes.recipe import Recipe, build_meta_heads
from apecache.recipes.sections import TowersSpec

Cuts = tuple[Cut | None, Cut | None]
"""Of image and text."""
FLOAT_BYTES = 4
"""Of a parameter, a gradient or an activation."""
STATE_BYTES = {"adamw": 8, "adam": 8, "lion": 4, "sgd": 4}
"""Of what an optimiser keeps for each number that it trains."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a whole training: what is done once, for the cache, and in each step. `seconds` are
    without loading and without evaluation on dev; `money` None without a price."""

    once_flops: int
    step_flops: int
    total_flops: int
    peak_bytes: int
    once_seconds: float
    step_seconds: float
    seconds: float
    money: float | None


class Clock(Protocol):
    """Times on this machine what a plan would run. Decoding, optimisers, small batches, short
    texts, and what a step costs whatever is in it do not go by operations; so a rate times
    operations is no prediction of these."""

    def once(self, cuts: Cuts) -> float:
        """Seconds of what lies below the cuts (None: nothing does), of one image with its
        captions."""

    def step(self, cuts: Cuts) -> float:
        """Seconds of a training step that begins at the cuts (None: at the inputs)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`planned` against the same `without_cache`, and against training everything (`full`: CLIP, of
    the whole towers). `common`: parts that belong to neither side. `teacher_bytes`: of the cached
    features of a teacher."""

    recipe: str
    path: str
    device: Device
    n_steps: int
    batch_size: int
    image: SidePlan
    text: SidePlan
    common: Parts
    n_trained: int
    n_parameters: int
    teacher_bytes: int
    planned: Cost
    without_cache: Cost
    full: Cost

    @property
    def cache_bytes(self) -> int:
        return self.image.cache_bytes + self.text.cache_bytes + self.teacher_bytes


@dataclass(frozen=True, kw_only=True)
class Model:
    """A recipe's towers and heads as counted, which costs are computed from. `loss_dim`: width of
    all that is contrasted; `taught`: of a teacher."""

    sides: tuple[SidePlan, SidePlan]
    counted: tuple[Counted, Counted]
    common: Parts
    loss_dim: int
    taught: Taught | None = None

    @property
    def n_trained(self) -> int:
        return sum(side.n_trained for side in self.sides) + sum(
            trained for _, trained, _ in self.common
        )


def plan(
    recipe: Recipe,
    image: Callable[[], Tower],
    text: Callable[[], Tower],
    spec: PlanSpec,
    device: Device,
    teacher: Callable[[], Taught] | None = None,
    clock: Clock | None = None,
) -> Plan:
    """`image`, `text` make fresh towers on the meta device (`encoders.load.shape_tower`);
    `teacher`: of a recipe that distils (None: it is as wide as the student, and its own cost is
    left out). Seconds are operations over the device's rate, or with a `clock` what it measures.

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers. OptionError: settings that
            make no sense.
    """
    model = count_model(recipe, image=image, text=text, spec=spec, teacher=teacher)
    everything = TowersSpec(freezing="Vuu-Tuu", checkpointing=recipe.towers.checkpointing)
    full = _tower_model(everything, recipe=recipe, image=image(), text=text(), spec=spec)
    n_steps, batch, _ = steps_of(recipe, spec)
    costs = (
        cost_of(recipe, model=model, spec=spec, device=device, cached=True),
        cost_of(recipe, model=model, spec=spec, device=device, cached=False),
        cost_of(recipe, model=full, spec=spec, device=device, cached=False),
    )
    if clock is not None and n_steps:
        costs = _clocked(clock, recipe=recipe, model=model, spec=spec, costs=costs)
    image_value, text_value = model.sides
    planned, without_cache, full_value = costs
    return Plan(
        recipe=recipe.name,
        path=_path(recipe, model.sides),
        device=device,
        n_steps=n_steps,
        batch_size=batch,
        image=image_value,
        text=text_value,
        common=model.common,
        n_trained=model.n_trained,
        n_parameters=sum(side.n_parameters for side in model.sides)
        + sum(count for _, _, count in model.common),
        teacher_bytes=0 if model.taught is None else model.taught.dim * spec.rows * STORED_BYTES,
        planned=planned,
        without_cache=without_cache,
        full=full_value,
    )


def count_model(
    recipe: Recipe,
    image: Callable[[], Tower],
    text: Callable[[], Tower],
    spec: PlanSpec,
    teacher: Callable[[], Taught] | None = None,
) -> Model:
    """What `plan` counts of the recipe itself, whatever its schedule. Arguments and errors as
    there."""
    _check(spec)
    if recipe.shared is None:
        return _tower_model(recipe.towers, recipe=recipe, image=image(), text=text(), spec=spec)
    towers = (image(), text())
    taught = teacher() if teacher else None
    sides, counted, common, loss_dim, taught_value = count_shared(
        recipe, towers=towers, spec=spec, teacher=taught
    )
    return Model(
        sides=sides,
        counted=counted,
        common=common,
        loss_dim=loss_dim,
        taught=taught_value,
    )


def _check(spec: PlanSpec) -> None:
    positive = (spec.rows, spec.captions, spec.tokens, spec.utilisation, spec.slice_size or 1)
    if min(positive) <= 0 or spec.utilisation > 1 or (spec.price or 0) < 0:
        raise OptionError(
            f"{spec}: rows, captions, tokens and slices are at least 1, utilisation lies in (0, 1]"
        )


def _path(recipe: Recipe, sides: Sequence[SidePlan]) -> str:
    cached = all(side.cut == "pooled" for side in sides)
    return "fit-head" if cached and recipe.trains_heads_alone else "fit-encoder"


def steps_of(recipe: Recipe, spec: PlanSpec) -> tuple[int, int, int]:
    """(steps, images in a batch, batches in a step): as both trainers go through the images."""
    schedule = recipe.schedule
    batch = min(schedule.batch_size, spec.rows)
    count = max(1, spec.rows // batch)
    accumulate = min(schedule.accumulate, count)
    return schedule.steps or schedule.epochs * (count // accumulate), batch, accumulate


def _tower_model(
    towers: TowersSpec,
    recipe: Recipe,
    image: Tower,
    text: Tower,
    spec: PlanSpec,
) -> Model:
    pairs, matches = match_towers(towers, recipe=recipe, image=image, text=text)
    (first, one), (second, two) = (
        count_side(tower, head=head, matches=matches, spec=spec) for tower, head in pairs
    )
    return Model(
        sides=(first, second),
        counted=(one, two),
        common=scalars(recipe),
        loss_dim=one.out_dim,
    )


def match_towers(
    towers: TowersSpec,
    recipe: Recipe,
    image: Tower,
    text: Tower,
) -> tuple[list[tuple[Tower, Head]], tuple[Match, ...]]:
    """Build the recipe's heads on towers of the meta device and say of every parameter whether it
    trains.

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers.
    """
    for tower in (image, text):
        adapter = towers.adapter(tower.modality)
        if adapter:
            insert_adapters(tower, adapter)
        tower.checkpointing = towers.checkpointing
    heads = build_meta_heads(recipe, image.output_dim, text.output_dim)
    pairs = list(zip((image, text), heads, strict=True))
    matches = freeze_towers(pairs, towers)
    if recipe.has_steps:
        return pairs, matches
    for head in heads:
        head.requires_grad_(False)
    return pairs, tuple(replace(match, train=False) for match in matches)


def scalars(recipe: Recipe) -> Parts:
    """The temperature, and the sigmoid loss's bias."""
    names = ("temperature", "bias") if recipe.loss.kind == "sigmoid" else ("temperature",)
    trains = recipe.loss.learnable and recipe.has_steps
    return tuple((name, int(trains), 1) for name in names)


# --- costs ----------------------------------------------------------------------------------------


def cost_of(recipe: Recipe, model: Model, spec: PlanSpec, device: Device, cached: bool) -> Cost:
    """Of a whole training with the recipe's schedule, with or without the cache; seconds at the
    device's rate."""
    n_steps, batch, accumulate = steps_of(recipe, spec)
    captions = recipe.loss.captions
    once = (
        sum(_once(side, spec) for side in model.sides) + _teacher_flops(model, spec.rows)
        if cached
        else 0
    )
    slices = spec.slice_size is not None and spec.slice_size < batch
    parts = zip(model.sides, model.counted, (1, captions), strict=True)
    pairs = batch * sum(
        _item(side, count=count, cached=cached, slices=slices) * each for side, count, each in parts
    )
    loss = 3 * 2 * batch * batch * captions * model.loss_dim
    if model.taught is not None:
        loss += model.taught.loss_flops(batch, 1 + captions)
    step = accumulate * (pairs + loss + (0 if cached else _teacher_flops(model, batch)))
    total = once + n_steps * step
    peak = _peak(
        recipe,
        model=model,
        n_live=min(batch, spec.slice_size or batch),
        batch=batch,
        cached=cached,
    )
    rate = device.flops
    return _priced(
        Cost(
            once_flops=once,
            step_flops=step,
            total_flops=total,
            peak_bytes=peak,
            once_seconds=once / rate,
            step_seconds=step / rate,
            seconds=0.0,
            money=None,
        ),
        n_steps,
        spec,
    )


def _priced(cost: Cost, n_steps: int, spec: PlanSpec) -> Cost:
    """With the sum of its seconds, at the utilisation, and what they cost."""
    once = cost.once_seconds / spec.utilisation
    step = cost.step_seconds / spec.utilisation
    seconds = once + n_steps * step
    money = None if spec.price is None else seconds / 3600 * spec.price
    return replace(cost, once_seconds=once, step_seconds=step, seconds=seconds, money=money)


def _clocked(
    clock: Clock,
    recipe: Recipe,
    model: Model,
    spec: PlanSpec,
    costs: tuple[Cost, Cost, Cost],
) -> tuple[Cost, Cost, Cost]:
    """The same with measured seconds. A teacher, and training everything, which may not fit here,
    are taken at the rate that the step without the cache has reached."""
    n_steps, batch, accumulate = steps_of(recipe, spec)
    planned, whole, full = costs
    cuts = model.sides[0].cut, model.sides[1].cut
    step = clock.step((None, None))
    teacher = _teacher_flops(model, accumulate * batch)
    rate = (whole.step_flops - teacher) / step
    cut_step = step if cuts == (None, None) else clock.step(cuts)
    once = spec.rows * clock.once(cuts) + _teacher_flops(model, spec.rows) / rate
    seconds = (
        (planned, once, cut_step),
        (whole, 0.0, step + teacher / rate),
        (full, 0.0, full.step_flops / rate),
    )
    first, second, third = (
        _priced(replace(cost, once_seconds=below, step_seconds=each), n_steps, spec)
        for cost, below, each in seconds
    )
    return first, second, third


def _once(side: SidePlan, spec: PlanSpec) -> int:
    return side.below_flops * spec.rows * (1 if side.side == "image" else spec.captions)


def _teacher_flops(model: Model, images: int) -> int:
    return 0 if model.taught is None else model.taught.flops * images


def _item(side: SidePlan, count: Counted, cached: bool, slices: bool) -> int:
    """Of one image or text in a step. Slices are run forward twice: once for the embeddings of the
    whole batch, once for their gradients (heads, which are small beside towers, are left out)."""
    once = (side.live_flops if cached else count.uncached_flops) + count.head_flops
    if not slices or side.cut == "pooled":
        return once
    return once + count.whole_flops - (side.below_flops if cached else 0)


def _peak(recipe: Recipe, model: Model, n_live: int, batch: int, cached: bool) -> int:
    """Parameters that are loaded; gradients, the optimiser's state, the best weights so far and
    their average of what trains; activations of `n_live` images with their captions; three matrices
    of logits; and a teacher's bank. float32, without the allocator's fragmentation and the
    library's work space."""
    captions = recipe.loss.captions
    each = STATE_BYTES[recipe.optimiser.kind] + FLOAT_BYTES * (2 + (recipe.optimiser.ema > 0))
    total = 3 * FLOAT_BYTES * batch * batch * captions + each * model.n_trained
    total += FLOAT_BYTES * sum(count for _, _, count in model.common)
    if model.taught is not None:
        total += model.taught.peak_bytes(batch, 1 + captions)
    for side, count, items in zip(
        model.sides,
        model.counted,
        (n_live, n_live * captions),
        strict=True,
    ):
        head = sum(number for part, _, number in side.parts if part == "head")
        total += FLOAT_BYTES * (head if cached and side.cut == "pooled" else side.n_parameters)
        total += items * (count.head_saved + (side.saved_bytes if cached else count.uncached_saved))
    return total
