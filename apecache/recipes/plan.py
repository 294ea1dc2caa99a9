"""The planner: what a recipe trains, where each tower can be cut, and what that costs, before anything runs.

Operations are counted by running the towers, with the very parameters switched on that the recipe trains, on the meta
device, which computes shapes only. A multiplication and an addition are two operations, as in torch's own counter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apecache.encoders.towers import Cut, Tower
from apecache.errors import OptionError, RecipeError
from apecache.fingerprint import Modality
from apecache.heads.build import build_heads
from apecache.heads.head import Head
from apecache.recipes.adapters import insert_adapters
from apecache.recipes.devices import Device
from apecache.recipes.freezing import Match, find_cut, freeze_towers
from apecache.recipes.recipe import Recipe
from apecache.recipes.towers import TowersSpec

STORED_BYTES, FLOAT_BYTES, ADAM_BYTES = 2, 4, 8
"""Of one number: in the store (float16), as parameter, gradient or activation, and as AdamW's two moments."""


@dataclass(frozen=True)
class PlanSpec:
    """`rows`: images, each with `captions` captions of `tokens` tokens (special ones and padding included).

    `slice_size`: how many pairs are in memory at once (None: the whole batch). `utilisation`: share of the device's
    rate that is reached. `price`: of an hour of the device, in any currency; None: no costs are given.
    """

    rows: int
    captions: int = 1
    tokens: int = 32
    slice_size: int | None = None
    utilisation: float = 1.0
    price: float | None = None


@dataclass(frozen=True)
class SidePlan:
    """One tower. `parts`: (part, trained, all) parameters. `cut` None: from the inputs. FLOPs are of one image or text:
    `below_flops` of what the cache saves, `live_flops` of forward and backward above the cut in a training step.
    `saved_bytes`: float32 activations of one item that wait for the backward pass."""

    side: Modality
    parts: tuple[tuple[str, int, int], ...]
    cut: Cut | None
    reason: str
    cache_bytes: int
    below_flops: int
    live_flops: int
    saved_bytes: int

    @property
    def n_trained(self) -> int:
        return sum(trained for _, trained, _ in self.parts)

    @property
    def n_parameters(self) -> int:
        return sum(count for _, _, count in self.parts)


@dataclass(frozen=True)
class Cost:
    """Of a whole training. `seconds` at the device's rate times the utilisation; `money` None without a price."""

    once_flops: int
    step_flops: int
    total_flops: int
    peak_bytes: int
    seconds: float
    money: float | None


@dataclass(frozen=True)
class Plan:
    """`planned` against the same `without_cache`, and against training everything (`full`: CLIP)."""

    recipe: str
    path: str
    device: Device
    n_steps: int
    batch_size: int
    image: SidePlan
    text: SidePlan
    n_trained: int
    n_parameters: int
    planned: Cost
    without_cache: Cost
    full: Cost


def plan(recipe: Recipe, image: Callable[[], Tower], text: Callable[[], Tower], spec: PlanSpec, device: Device) -> Plan:
    """`image`, `text` make fresh towers on the meta device (`encoders.load.shape_tower`).

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers. OptionError: settings that make no sense.
    """
    _check(spec)
    if recipe.shared is not None:
        raise RecipeError(f"recipe {recipe.name}: the planner does not know shared encoders, only towers by themselves")
    sides, counted = _model(recipe.towers, recipe, image(), text(), spec)
    planned = _cost(recipe, sides, counted, spec, device, cached=True)
    without = _cost(recipe, sides, counted, spec, device, cached=False)
    everything = TowersSpec(freezing="Vuu-Tuu", checkpointing=recipe.towers.checkpointing)
    full_sides, full_counted = _model(everything, recipe, image(), text(), spec)
    full = _cost(recipe, full_sides, full_counted, spec, device, cached=False)
    n_steps, batch = _steps(recipe, spec)
    return Plan(
        recipe.name,
        _path(recipe, sides),
        device,
        n_steps,
        batch,
        *sides,
        sum(side.n_trained for side in sides) + recipe.loss.learnable,
        sum(side.n_parameters for side in sides) + 1,
        planned,
        without,
        full,
    )


def _check(spec: PlanSpec) -> None:
    positive = (spec.rows, spec.captions, spec.tokens, spec.utilisation, spec.slice_size or 1)
    if min(positive) <= 0 or spec.utilisation > 1 or (spec.price or 0) < 0:
        raise OptionError(f"{spec}: rows, captions, tokens and slices are at least 1, utilisation lies in (0, 1]")


def _path(recipe: Recipe, sides: Sequence[SidePlan]) -> str:
    cached = all(side.cut == "pooled" for side in sides)
    return "fit-head" if cached and recipe.trains_heads_alone else "fit-encoder"


def _steps(recipe: Recipe, spec: PlanSpec) -> tuple[int, int]:
    """(steps, pairs in each): as fit_head goes through the images."""
    batch = min(recipe.schedule.batch_size, spec.rows)
    return recipe.schedule.epochs * max(1, spec.rows // batch), batch


# --- counting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counted:
    """Of one item: the whole forward pass; forward and backward with nothing cached, and activations kept then; the
    same of the head, which no cache changes."""

    whole_flops: int
    uncached_flops: int
    uncached_saved: int
    head_flops: int
    head_saved: int
    out_dim: int


def _model(
    towers: TowersSpec, recipe: Recipe, image: Tower, text: Tower, spec: PlanSpec
) -> tuple[tuple[SidePlan, SidePlan], tuple[_Counted, _Counted]]:
    for tower in (image, text):
        adapter = towers.adapter(tower.modality)
        if adapter:
            insert_adapters(tower, adapter)
        tower.checkpointing = towers.checkpointing
    try:
        with torch.device("meta"):
            heads = build_heads(recipe.image, recipe.text, image.output_dim, text.output_dim)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    pairs = list(zip((image, text), heads, strict=True))
    matches = freeze_towers(pairs, towers)
    (first, one), (second, two) = (_count(tower, head, matches, spec) for tower, head in pairs)
    return (first, second), (one, two)


def _count(tower: Tower, head: Head, matches: Sequence[Match], spec: PlanSpec) -> tuple[SidePlan, _Counted]:
    found = find_cut(matches, tower)
    inputs, mask = _inputs(tower, spec)
    with torch.no_grad():
        whole, _ = _measure(lambda: tower(inputs, mask))
        below = found.cut if found.cut is not None else 0
        hidden = tower.run_to(below, inputs, mask)
        below_flops = 0 if found.cut is None else _measure(lambda: tower.run_to(below, inputs, mask))[0]
    uncached, uncached_saved = _measure(lambda: tower(inputs, mask), backward=True)
    if found.cut is None:
        live, saved = uncached, uncached_saved
    else:
        live, saved = _measure(lambda: tower.forward_from(below, hidden, mask), backward=True)
    features = torch.zeros(1, head.in_dim, device="meta", requires_grad=live > 0)
    head_flops, head_saved = _measure(lambda: head(features), backward=True)
    items = spec.rows * (1 if tower.modality == "image" else spec.captions)
    cache = 0 if found.cut is None else items * hidden.numel() * STORED_BYTES
    side = SidePlan(
        tower.modality, _by_part(matches, tower.modality), found.cut, found.reason, cache, below_flops, live, saved
    )
    return side, _Counted(whole, uncached, uncached_saved, head_flops, head_saved, head.out_dim)


def _inputs(tower: Tower, spec: PlanSpec) -> tuple[Tensor, Tensor | None]:
    if tower.modality == "image":
        return torch.zeros(1, 3, *tower.image_size, device="meta"), None
    ids = torch.zeros(1, spec.tokens, dtype=torch.long, device="meta")
    return ids, torch.ones_like(ids)


def _measure(run: Callable[[], Tensor], backward: bool = False) -> tuple[int, int]:
    """(operations, bytes kept for the backward pass) of a call, with its backward pass if it has one."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
        if backward and out.requires_grad:
            out.sum().backward()
    return int(counter.get_total_flops()), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _by_part(matches: Sequence[Match], side: Modality) -> tuple[tuple[str, int, int], ...]:
    """(part, trained, all), in the order in which they come."""
    mine = [match for match in matches if match.side == side]
    names = dict.fromkeys(match.part.place for match in mine)
    counts = {name: [m.part.count for m in mine if m.part.place == name] for name in names}
    trained = {name: [m.part.count for m in mine if m.part.place == name and m.train] for name in names}
    return tuple((name, sum(trained[name]), sum(counts[name])) for name in names)


# --- costs -----------------------------------------------------------------------------------------------------------


def _cost(
    recipe: Recipe,
    sides: tuple[SidePlan, SidePlan],
    counted: tuple[_Counted, _Counted],
    spec: PlanSpec,
    device: Device,
    cached: bool,
) -> Cost:
    n_steps, batch = _steps(recipe, spec)
    once = sum(_once(side, spec) for side in sides) if cached else 0
    slices = spec.slice_size is not None and spec.slice_size < batch
    pairs = list(zip(sides, counted, strict=True))
    item = sum((side.live_flops if cached else count.uncached_flops) + count.head_flops for side, count in pairs)
    again = sum(_again(side, count, cached) for side, count in pairs) if slices else 0
    loss = 3 * 2 * batch**2 * counted[0].out_dim
    step = batch * (item + again) + loss
    total = once + n_steps * step
    seconds = total / (device.flops * spec.utilisation)
    peak = _peak(sides, counted, min(batch, spec.slice_size or batch), batch, cached)
    return Cost(once, step, total, peak, seconds, None if spec.price is None else seconds / 3600 * spec.price)


def _once(side: SidePlan, spec: PlanSpec) -> int:
    return side.below_flops * spec.rows * (1 if side.side == "image" else spec.captions)


def _again(side: SidePlan, count: _Counted, cached: bool) -> int:
    """Slices are run forward twice: once for the embeddings of the whole batch, once for their gradients (heads, which
    are small beside towers, are left out)."""
    if side.cut == "pooled":
        return 0
    return count.whole_flops - (side.below_flops if cached else 0)


def _peak(sides: Sequence[SidePlan], counted: Sequence[_Counted], n_live: int, batch: int, cached: bool) -> int:
    """Parameters that are loaded, gradients, AdamW's moments, activations of `n_live` pairs, and three matrices of
    logits; float32, without the allocator's fragmentation and the library's work space."""
    total = 3 * FLOAT_BYTES * batch**2
    for side, count in zip(sides, counted, strict=True):
        head = sum(number for part, _, number in side.parts if part == "head")
        loaded = head if cached and side.cut == "pooled" else side.n_parameters
        total += FLOAT_BYTES * loaded + (FLOAT_BYTES + ADAM_BYTES) * side.n_trained
        total += n_live * (count.head_saved + (side.saved_bytes if cached else count.uncached_saved))
    return total
