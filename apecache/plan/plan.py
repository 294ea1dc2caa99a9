"""Plan a recipe before anything runs: what it trains, where each tower is cut, what that costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from apecache.arguments import require_spec
from apecache.encoders.tower import Cut, Tower
from apecache.errors import OptionError
from apecache.heads.head import Head
from apecache.models.adapters import insert_adapters
from apecache.models.freezing import FreezeDecision, freeze_towers
from apecache.plan.counting import STORED_BYTES, ItemCosts, Parts, PlanSpec, SidePlan, count_side
from apecache.plan.counting_shared import TeacherSizes, count_shared
from apecache.plan.devices import Device
from apecache.recipes.recipe import Recipe, build_meta_heads
from apecache.recipes.schedule import Epoch
from apecache.recipes.sections import TowersSpec

EPOCHS: tuple[Epoch, ...] = ("images", "pairs")
Cuts = tuple[Cut | None, Cut | None]
"""Where the image and the text tower are cut; None: not at all."""
FLOAT_BYTES = 4
"""Bytes of a parameter, a gradient or an activation (float32)."""
STATE_BYTES = {"adamw": 8, "adam": 8, "lion": 4, "sgd": 4}
"""Bytes that an optimizer keeps for each number it trains."""
# Adam keeps two float32 moments; Lion and SGD keep one momentum.


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold what a whole training costs: once, to fill the cache, and in each step."""

    once_flops: int
    """Operations that fill the cache."""
    step_flops: int
    total_flops: int
    peak_bytes: int
    """Memory of the device at its fullest moment."""
    once_seconds: float
    step_seconds: float
    seconds: float
    """Of the whole training, without loading features and without evaluation on dev."""
    money: float | None
    """None without a price."""


class PlanTimer(Protocol):
    """Time on this machine what a plan would run.

    Decoding, optimizers, small batches, short texts and the fixed cost of a step do not scale with
    the operations. A device's rate does not predict them, so they are measured.
    """

    def once(self, cuts: Cuts) -> float:
        """Return the seconds that one image with its captions takes below the cuts.

        Args:
            cuts: None for a tower of which nothing is cached.
        """

    def step(self, cuts: Cuts) -> float:
        """Return the seconds of a training step that begins at the cuts.

        Args:
            cuts: None for a tower that is run from its inputs.
        """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compare the cost of a recipe with and without the cache, and with training everything."""

    recipe: str
    path: str
    device: Device
    n_steps: int
    steps_by_epoch: dict[Epoch, int]
    """Steps if an epoch goes through all images, and if it goes through all pairs of an image and a
    caption. Equal where the recipe gives its steps itself."""
    batch_size: int
    image: SidePlan
    text: SidePlan
    common: Parts
    """Parameters that belong to neither side."""
    n_trained: int
    n_parameters: int
    teacher_bytes: int
    """Of a teacher's cached features."""
    teacher_is_counted: bool
    """False: the recipe distils and no teacher was given. Its operations are left out of all costs,
    and its features are taken to be as wide as the student."""
    planned: Cost
    without_cache: Cost
    fitting_slice: int | None
    """Largest `--slice` whose peak memory fits into the device, where that of `planned` does not; 0
    where none fits. None: `planned` fits, or the device's memory is not known."""
    full: Cost
    """Of CLIP training: both whole towers train from their inputs."""

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all cached features."""
        return self.image.cache_bytes + self.text.cache_bytes + self.teacher_bytes


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Hold the counts of a recipe's towers and heads, from which costs are computed."""

    sides: tuple[SidePlan, SidePlan]
    counted: tuple[ItemCosts, ItemCosts]
    common: Parts
    loss_dim: int
    """Width of all embeddings that the loss contrasts, summed."""
    taught: TeacherSizes | None = None
    """What a teacher adds; None without one."""

    @property
    def n_trained(self) -> int:
        """Return the number of trained parameters, common ones included."""
        in_sides = sum(side.n_trained for side in self.sides)
        in_common = sum(trained for _, trained, _ in self.common)
        return in_sides + in_common


def plan(
    recipe: Recipe,
    image: Callable[[], Tower],
    text: Callable[[], Tower],
    spec: PlanSpec,
    device: Device,
    teacher: Callable[[], TeacherSizes] | None = None,
    clock: PlanTimer | None = None,
) -> Plan:
    """Plan a recipe on a device.

    Args:
        image: makes a fresh image tower on the meta device (`encoders.load.shape_tower`).
        text: the same for the text tower.
        teacher: counts the teacher of a recipe that distils. None: the teacher is taken to be as
            wide as the student, and its own cost is left out (`Plan.teacher_is_counted`).
        clock: measures seconds. None: seconds are operations over the device's rate.

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers.
        OptionError: settings that make no sense.
    """
    model = count_model(recipe, image=image, text=text, spec=spec, teacher=teacher)
    everything = TowersSpec(freezing="Vuu-Tuu", checkpointing=recipe.towers.checkpointing)
    # Fresh towers once more: counting the recipe froze parameters and put adapters into the others.
    full_model = _tower_model(everything, recipe=recipe, image=image(), text=text(), spec=spec)
    n_steps, batch_size, _ = steps_of(recipe, spec)
    steps_by_epoch = {epoch: steps_of(with_epoch(recipe, epoch), spec)[0] for epoch in EPOCHS}
    costs = (
        cost_of(recipe, model=model, spec=spec, device=device, cached=True),
        cost_of(recipe, model=model, spec=spec, device=device, cached=False),
        cost_of(recipe, model=full_model, spec=spec, device=device, cached=False),
    )
    if clock is not None and n_steps:
        costs = _clocked(clock, recipe=recipe, model=model, spec=spec, costs=costs)
    image_side, text_side = model.sides
    planned, without_cache, full = costs
    n_parameters = sum(side.n_parameters for side in model.sides)
    n_parameters += sum(count for _, _, count in model.common)
    teacher_dim = 0 if model.taught is None else model.taught.dim
    return Plan(
        recipe=recipe.name,
        path=_path(recipe, model.sides),
        device=device,
        n_steps=n_steps,
        steps_by_epoch=steps_by_epoch,
        batch_size=batch_size,
        image=image_side,
        text=text_side,
        common=model.common,
        n_trained=model.n_trained,
        n_parameters=n_parameters,
        teacher_bytes=teacher_dim * spec.rows * STORED_BYTES,
        teacher_is_counted=model.taught is None or model.taught.flops > 0,
        planned=planned,
        fitting_slice=_fitting_slice(recipe, model=model, spec=spec, device=device),
        without_cache=without_cache,
        full=full,
    )


def count_model(
    recipe: Recipe,
    image: Callable[[], Tower],
    text: Callable[[], Tower],
    spec: PlanSpec,
    teacher: Callable[[], TeacherSizes] | None = None,
) -> ModelCosts:
    """Count the recipe itself, whatever its schedule.

    Arguments and errors are those of `plan`.
    """
    _check(spec)
    if recipe.shared is None:
        return _tower_model(recipe.towers, recipe=recipe, image=image(), text=text(), spec=spec)
    towers = (image(), text())
    taught = teacher() if teacher else None
    # The returned teacher also has the student's width and the size of its bank.
    sides, counted, common, loss_dim, complete_taught = count_shared(
        recipe,
        towers=towers,
        spec=spec,
        teacher=taught,
    )
    return ModelCosts(
        sides=sides,
        counted=counted,
        common=common,
        loss_dim=loss_dim,
        taught=complete_taught,
    )


def _check(spec: PlanSpec) -> None:
    require_spec(spec, PlanSpec, "spec")
    positive = (spec.rows, spec.captions, spec.tokens, spec.utilization, spec.slice_size or 1)
    if min(positive) <= 0 or spec.utilization > 1 or (spec.price or 0) < 0:
        raise OptionError(
            f"{spec}: rows, captions, tokens and slices are at least 1, utilization lies in (0, 1]"
        )


def _path(recipe: Recipe, sides: Sequence[SidePlan]) -> str:
    cached = all(side.cut == "pooled" for side in sides)
    return "fit-head" if cached and recipe.trains_heads_alone else "fit-encoder"


def steps_of(recipe: Recipe, spec: PlanSpec) -> tuple[int, int, int]:
    """Return (steps, images or pairs in a batch, batches in a step), as both trainers run them."""
    schedule = recipe.schedule
    n_items = spec.rows * spec.captions if schedule.epoch == "pairs" else spec.rows
    batch_size = min(schedule.batch_size, n_items)
    # Rounded down: the trainers leave out an epoch's last, incomplete batch and step.
    n_batches = max(1, n_items // batch_size)
    accumulate = min(schedule.accumulate, n_batches)
    n_steps = schedule.steps or schedule.epochs * (n_batches // accumulate)
    return n_steps, batch_size, accumulate


def with_epoch(recipe: Recipe, epoch: Epoch) -> Recipe:
    """Return the recipe with another unit of its epochs."""
    schedule = recipe.schedule.model_copy(update={"epoch": epoch})
    return recipe.model_copy(update={"schedule": schedule})


def _tower_model(
    towers: TowersSpec,
    recipe: Recipe,
    image: Tower,
    text: Tower,
    spec: PlanSpec,
) -> ModelCosts:
    pairs, matches = match_towers(towers, recipe=recipe, image=image, text=text)
    (image_side, image_counted), (text_side, text_counted) = (
        count_side(tower, head=head, matches=matches, spec=spec) for tower, head in pairs
    )
    return ModelCosts(
        sides=(image_side, text_side),
        counted=(image_counted, text_counted),
        common=scalars(recipe),
        loss_dim=image_counted.out_dim,
    )


def match_towers(
    towers: TowersSpec,
    recipe: Recipe,
    image: Tower,
    text: Tower,
) -> tuple[list[tuple[Tower, Head]], tuple[FreezeDecision, ...]]:
    """Build the recipe's heads on towers of the meta device and decide which parameters train.

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
    # Heads solved in closed form have no steps, so nothing trains whatever the rules say.
    for head in heads:
        head.requires_grad_(False)
    return pairs, tuple(replace(match, train=False) for match in matches)


def scalars(recipe: Recipe) -> Parts:
    """Return the loss's own parameters: the temperature, and the bias of the sigmoid loss."""
    names = ("temperature", "bias") if recipe.loss.kind == "sigmoid" else ("temperature",)
    trains = recipe.loss.learnable and recipe.has_steps
    return tuple((name, int(trains), 1) for name in names)


# --- costs ----------------------------------------------------------------------------------------


def cost_of(
    recipe: Recipe,
    model: ModelCosts,
    spec: PlanSpec,
    device: Device,
    cached: bool,
) -> Cost:
    """Compute the cost of a whole training with the recipe's schedule, at the device's rate.

    Args:
        cached: whether the cache holds what lies below the cuts; False: it is run in every step.
    """
    n_steps, batch_size, accumulate = steps_of(recipe, spec)
    captions = recipe.loss.captions
    once_flops = 0
    if cached:
        once_flops = sum(_once(side, spec) for side in model.sides)
        once_flops += _teacher_flops(model, spec.rows)
    slices = spec.slice_size is not None and spec.slice_size < batch_size
    pair_flops = 0
    for side, counted, n_items in zip(model.sides, model.counted, (1, captions), strict=True):
        pair_flops += n_items * _item(side, count=counted, cached=cached, slices=slices)
    # One product of image and text embeddings forward, and one for each gradient.
    loss_flops = 3 * 2 * batch_size * batch_size * captions * model.loss_dim
    if model.taught is not None:
        loss_flops += model.taught.loss_flops(batch_size, 1 + captions)
    batch_flops = batch_size * pair_flops + loss_flops
    if not cached:
        batch_flops += _teacher_flops(model, batch_size)
    step_flops = accumulate * batch_flops
    peak_bytes = _peak(
        recipe,
        model=model,
        n_live=min(batch_size, spec.slice_size or batch_size),
        batch=batch_size,
        cached=cached,
    )
    unpriced = Cost(
        once_flops=once_flops,
        step_flops=step_flops,
        total_flops=once_flops + n_steps * step_flops,
        peak_bytes=peak_bytes,
        once_seconds=once_flops / device.flops,
        step_seconds=step_flops / device.flops,
        seconds=0.0,
        money=None,
    )
    return _priced(unpriced, n_steps, spec)


def _priced(cost: Cost, n_steps: int, spec: PlanSpec) -> Cost:
    """Divide the seconds by the utilization, and fill in their sum and its price."""
    once_seconds = cost.once_seconds / spec.utilization
    step_seconds = cost.step_seconds / spec.utilization
    seconds = once_seconds + n_steps * step_seconds
    money = None if spec.price is None else seconds / 3600 * spec.price
    return replace(
        cost,
        once_seconds=once_seconds,
        step_seconds=step_seconds,
        seconds=seconds,
        money=money,
    )


def _clocked(
    clock: PlanTimer,
    recipe: Recipe,
    model: ModelCosts,
    spec: PlanSpec,
    costs: tuple[Cost, Cost, Cost],
) -> tuple[Cost, Cost, Cost]:
    """Replace the seconds of (planned, without cache, full) by measured ones.

    A teacher is not timed, and neither is training everything, which may not fit on this machine.
    Both are computed at the rate that the step without the cache reaches.
    """
    n_steps, batch_size, accumulate = steps_of(recipe, spec)
    planned, without_cache, full = costs
    cuts = model.sides[0].cut, model.sides[1].cut
    step_seconds = clock.step((None, None))
    teacher_flops = _teacher_flops(model, accumulate * batch_size)
    # The clock's step takes the teacher's outputs as given, so its operations do not count here.
    rate = (without_cache.step_flops - teacher_flops) / step_seconds
    cut_step_seconds = step_seconds if cuts == (None, None) else clock.step(cuts)
    once_seconds = spec.rows * clock.once(cuts) + _teacher_flops(model, spec.rows) / rate

    def timed(cost: Cost, below: float, above: float) -> Cost:
        measured = replace(cost, once_seconds=below, step_seconds=above)
        return _priced(measured, n_steps, spec)

    return (
        timed(planned, once_seconds, cut_step_seconds),
        timed(without_cache, 0.0, step_seconds + teacher_flops / rate),
        timed(full, 0.0, full.step_flops / rate),
    )


def _once(side: SidePlan, spec: PlanSpec) -> int:
    n_items = spec.rows * (1 if side.side == "image" else spec.captions)
    return side.below_flops * n_items


def _teacher_flops(model: ModelCosts, images: int) -> int:
    return 0 if model.taught is None else model.taught.flops * images


def _item(side: SidePlan, count: ItemCosts, cached: bool, slices: bool) -> int:
    """Count the operations of one image or text in a step.

    Slices are run forward twice: for the embeddings of the whole batch, then for their gradients.
    The second run of a head is left out, as heads are small beside towers.
    """
    tower_flops = side.live_flops if cached else count.uncached_flops
    item_flops = tower_flops + count.head_flops
    if not slices or side.cut == "pooled":
        return item_flops
    skipped_flops = side.below_flops if cached else 0
    return item_flops + count.whole_flops - skipped_flops


def _fitting_slice(
    recipe: Recipe,
    model: ModelCosts,
    spec: PlanSpec,
    device: Device,
) -> int | None:
    """Return the largest slice that fits; see `Plan.fitting_slice`."""
    _, batch_size, _ = steps_of(recipe, spec)
    memory_bytes = device.memory_bytes
    n_live = min(batch_size, spec.slice_size or batch_size)

    def peak_bytes(n_in_memory: int) -> int:
        return _peak(recipe, model=model, n_live=n_in_memory, batch=batch_size, cached=True)

    if memory_bytes is None or peak_bytes(n_live) <= memory_bytes:
        return None
    if peak_bytes(1) > memory_bytes:
        return 0
    # The peak grows linearly with the slice.
    item_bytes = max(1, peak_bytes(2) - peak_bytes(1))
    return 1 + (memory_bytes - peak_bytes(1)) // item_bytes


def _peak(recipe: Recipe, model: ModelCosts, n_live: int, batch: int, cached: bool) -> int:
    """Estimate the bytes in memory at the fullest moment of a step.

    Counted are the loaded parameters; for what trains its gradients, the optimizer's state, the
    best weights so far and their EMA; activations of `n_live` images with their captions; three
    matrices of logits; and a teacher's bank. All are float32. The allocator's fragmentation and
    the libraries' work space are not counted.
    """
    captions = recipe.loss.captions
    # Two copies: the gradient and the best weights. The EMA is a third.
    n_copies = 2 + (recipe.optimizer.ema > 0)
    trained_bytes = STATE_BYTES[recipe.optimizer.kind] + FLOAT_BYTES * n_copies
    total = 3 * FLOAT_BYTES * batch * batch * captions + trained_bytes * model.n_trained
    total += FLOAT_BYTES * sum(count for _, _, count in model.common)
    if model.taught is not None:
        total += model.taught.peak_bytes(batch, 1 + captions)
    for side, counted, n_items in zip(
        model.sides,
        model.counted,
        (n_live, n_live * captions),
        strict=True,
    ):
        # A tower whose pooled output is cached is not loaded; only its head is.
        n_loaded = side.n_parameters
        if cached and side.cut == "pooled":
            n_loaded = sum(count for name, _, count in side.parts if name == "head")
        total += FLOAT_BYTES * n_loaded
        tower_saved = side.saved_bytes if cached else counted.uncached_saved
        total += n_items * (counted.head_saved + tower_saved)
    return total
