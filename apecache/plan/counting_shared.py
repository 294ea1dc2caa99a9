"""Counting a shared encoder: both towers cut off, the layers above them, and what a teacher
adds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from apecache.encoders.tower import Tower
from apecache.errors import RecipeError
from apecache.models.dual_encoder import EncoderModel, Teacher, build_shared
from apecache.models.shared_encoder import SharedSide
from apecache.plan.counting import Counted, Parts, PlanSpec, SidePlan, example, measure
from apecache.recipes.recipe import Recipe

FLOAT_BYTES = 4
CHANGES = (
    "the tower trains from its embeddings on, so nothing can be cached: every activation changes "
    "with every step"
)
WHOLE = "a shared encoder runs its towers from the inputs, whatever of them is frozen"


@dataclass(frozen=True, kw_only=True)
class Taught:
    """`dim`: width of what a teacher gives; `flops` of one image by it, 0 where it is not known.
    `student_dim` and `bank` (features that each student is compared with beside the batch's; None:
    none are compared)."""

    dim: int
    flops: int = 0
    student_dim: int = 0
    bank: int | None = None

    def loss_flops(self, batch: int, students: int) -> int:
        """Forward and backward, of `students` outputs for each image: the projection, and the
        comparison, through which no gradient goes to the teacher."""
        compared = 0 if self.bank is None else 2 * 2 * batch * (batch + self.bank) * self.dim
        return students * (3 * 2 * batch * self.student_dim * self.dim + compared)

    def peak_bytes(self, batch: int, students: int) -> int:
        if self.bank is None:
            return FLOAT_BYTES * students * batch * self.dim
        return FLOAT_BYTES * (self.bank * self.dim + 3 * students * batch * (batch + self.bank))


def count_teacher(tower: Tower, spec: PlanSpec, n_classes: int | None = None) -> Taught:
    """Of a teacher's tower on the meta device, run forward once for each image; `n_classes`: of its
    classifier, where classes are taught."""
    with torch.no_grad():
        flops, _, _ = measure(lambda: tower(*example(tower, spec)))
    return Taught(dim=n_classes or tower.dim, flops=flops)


def count_shared(
    recipe: Recipe,
    towers: Sequence[Tower],
    spec: PlanSpec,
    teacher: Taught | None,
) -> tuple[tuple[SidePlan, SidePlan], tuple[Counted, Counted], Parts, int, Taught | None]:
    """Sides, what they do, common parts, the width of all that is contrasted, and the teacher;
    towers are on the meta device.

    Raises:
        RecipeError: as `build_sides` does; or classes are taught and no teacher is given.
    """
    assert recipe.shared is not None
    taught = _taught(recipe, towers[0].dim, teacher)
    model = build_meta_shared(recipe, towers, taught)
    assert isinstance(model.image, SharedSide)
    assert isinstance(model.text, SharedSide)
    (first, one), (second, two) = (_count(side, spec) for side in (model.image, model.text))
    common = _common_parts(model)
    return (
        (first, second),
        (one, two),
        common,
        (recipe.shared.expansion + 1) * towers[0].dim,
        taught,
    )


def count_shared_trained(recipe: Recipe, towers: Sequence[Tower]) -> int:
    """Parameters that `count_shared` says train, without a teacher and without counting operations.
    Raises as it."""
    model = build_meta_shared(recipe, towers, _taught(recipe, towers[0].dim, None))
    sides = [part for tower in towers for part in _parts(tower)]
    return sum(trained for _, trained, _ in (*sides, *_common_parts(model)))


def build_meta_shared(
    recipe: Recipe,
    towers: Sequence[Tower],
    taught: Taught | None,
) -> EncoderModel:
    """Build a shared encoder around towers on the meta device. Raises RecipeError as `build_sides`
    does."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wide = None if taught is None else Teacher(dim=taught.dim)
        return build_shared(towers, recipe=recipe, device=torch.device("meta"), teacher=wide)


def _common_parts(model: EncoderModel) -> Parts:
    assert isinstance(model.image, SharedSide)
    assert model.shared is not None
    about: list[tuple[str, nn.Module | None]] = [
        ("shared block", model.image.layers),
        ("temperatures", nn.ModuleList([model.temperature, model.shared.inner])),
        ("distillation", model.shared.distillation),
    ]
    return tuple((name, *_numbers(module)) for name, module in about if module is not None)


def _taught(recipe: Recipe, dim: int, teacher: Taught | None) -> Taught | None:
    spec = recipe.distillation
    if spec is None:
        return None
    if spec.kind == "classes" and teacher is None:
        raise RecipeError(
            f"recipe {recipe.name}: how many classes it learns of depends on the teacher; "
            "give --teacher"
        )
    found = teacher or Taught(dim=dim)
    return replace(found, student_dim=dim, bank=spec.bank if spec.kind == "contrastive" else None)


def _count(side: SharedSide, spec: PlanSpec) -> tuple[SidePlan, Counted]:
    tower = side.tower
    inputs, mask = example(tower, spec)
    live, whole, saved = measure(lambda: side.outputs(inputs, mask), backward=True)
    bottom = any(tower.parameter(part).requires_grad for part in tower.parts() if part.depth == -1)
    plan = SidePlan(
        side=tower.modality,
        parts=_parts(tower),
        cut=None,
        reason=CHANGES if bottom else WHOLE,
        cache_bytes=0,
        below_flops=0,
        live_flops=live,
        saved_bytes=saved,
    )
    return plan, Counted(
        whole_flops=whole,
        uncached_flops=live,
        uncached_saved=saved,
        head_flops=0,
        head_saved=0,
        out_dim=side.dim,
    )


def _parts(tower: Tower) -> Parts:
    """What is run: the final norm lies above."""
    run = [part for part in tower.parts() if part.depth < tower.n_blocks]
    found = []
    for place in dict.fromkeys(part.place for part in run):
        mine = [part for part in run if part.place == place]
        trained = sum(part.count for part in mine if tower.parameter(part).requires_grad)
        found.append((str(place), trained, sum(part.count for part in mine)))
    return tuple(found)


def _numbers(module: nn.Module) -> tuple[int, int]:
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
