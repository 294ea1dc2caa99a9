"""Count a shared encoder: both towers without their tops, the layers above, what a teacher adds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from apecache.device import kept_generators
from apecache.encoders.tower import Tower
from apecache.errors import RecipeError
from apecache.models.dual_encoder import EncoderModel, Teacher, build_shared
from apecache.models.shared_encoder import SharedSide
from apecache.plan.counting import ItemCosts, Parts, PlanSpec, SidePlan, example, measure
from apecache.recipes.recipe import Recipe

FLOAT_BYTES = 4
CHANGES = (
    "the tower trains from its embeddings on, so nothing can be cached: every activation changes "
    "with every step"
)
WHOLE = "a shared encoder runs its towers from the inputs, whatever of them is frozen"


@dataclass(frozen=True, kw_only=True)
class TeacherSizes:
    """Hold the sizes of a teacher that an image-text model distils from."""

    dim: int
    """Width of what the teacher gives."""
    flops: int = 0
    """Of the teacher on one image; 0: not known."""
    student_dim: int = 0
    bank: int | None = None
    """Features in the bank that each student is compared with, beside those of the batch; None:
    nothing is compared."""

    def loss_flops(self, batch: int, students: int) -> int:
        """Count the operations of the distillation loss on a batch, forward and backward.

        They are the projection of a student to the teacher's width, and the comparison.

        Args:
            batch: images.
            students: outputs for each image.
        """
        projection = 3 * 2 * batch * self.student_dim * self.dim
        comparison = 0
        if self.bank is not None:
            # Twice, not three times: the teacher's features need no gradient.
            comparison = 2 * 2 * batch * (batch + self.bank) * self.dim
        return students * (projection + comparison)

    def peak_bytes(self, batch: int, students: int) -> int:
        """Estimate the bytes of the loss: projected students, or the bank and three logits."""
        if self.bank is None:
            return FLOAT_BYTES * students * batch * self.dim
        bank_size = self.bank * self.dim
        logits_size = students * batch * (batch + self.bank)
        return FLOAT_BYTES * (bank_size + 3 * logits_size)


def count_teacher(tower: Tower, spec: PlanSpec, n_classes: int | None = None) -> TeacherSizes:
    """Count a teacher that is run forward once for each image.

    Args:
        tower: on the meta device.
        n_classes: of its classifier, where classes are taught; None: its features are.
    """
    inputs, mask = example(tower, spec)
    with torch.no_grad():
        flops, _, _ = measure(lambda: tower(inputs, mask))
    return TeacherSizes(dim=n_classes or tower.dim, flops=flops)


def count_shared(
    recipe: Recipe,
    towers: Sequence[Tower],
    spec: PlanSpec,
    teacher: TeacherSizes | None,
) -> tuple[tuple[SidePlan, SidePlan], tuple[ItemCosts, ItemCosts], Parts, int, TeacherSizes | None]:
    """Count a recipe with a shared encoder.

    Args:
        towers: of image and text, on the meta device.
        teacher: None: it is taken to be as wide as the towers.

    Returns:
        The sides; their counts; the common parts; the width of all embeddings that are contrasted,
        summed; and the teacher with the sizes of the student, None without distillation.

    Raises:
        RecipeError: as `build_sides` does; or classes are taught and no teacher is given.
    """
    assert recipe.shared is not None
    taught = _taught(recipe, towers[0].dim, teacher)
    model = build_meta_shared(recipe, towers, taught)
    assert isinstance(model.image, SharedSide)
    assert isinstance(model.text, SharedSide)
    image_side, image_counted = _count(model.image, spec)
    text_side, text_counted = _count(model.text, spec)
    common = _common_parts(model)
    # The final embedding is contrasted, and so is the wider one within the shared block.
    loss_dim = (recipe.shared.expansion + 1) * towers[0].dim
    return (image_side, text_side), (image_counted, text_counted), common, loss_dim, taught


def count_shared_trained(recipe: Recipe, towers: Sequence[Tower]) -> int:
    """Count the trained parameters of `count_shared` without counting operations.

    No teacher is given. Errors are those of `count_shared`.
    """
    model = build_meta_shared(recipe, towers, _taught(recipe, towers[0].dim, None))
    all_parts = list(_common_parts(model))
    for tower in towers:
        all_parts += _parts(tower)
    return sum(trained for _, trained, _ in all_parts)


def build_meta_shared(
    recipe: Recipe,
    towers: Sequence[Tower],
    taught: TeacherSizes | None,
) -> EncoderModel:
    """Build a shared encoder around towers on the meta device.

    Raises:
        RecipeError: as `build_sides` does.
    """
    # Initialization may draw random numbers: a plan must not move the caller's random state.
    with kept_generators(), torch.device("meta"):
        teacher = None if taught is None else Teacher(dim=taught.dim)
        return build_shared(towers, recipe=recipe, device=torch.device("meta"), teacher=teacher)


def _common_parts(model: EncoderModel) -> Parts:
    assert isinstance(model.image, SharedSide)
    assert model.shared is not None
    named_modules: list[tuple[str, nn.Module | None]] = [
        ("shared block", model.image.layers),
        ("temperatures", nn.ModuleList([model.temperature, model.shared.inner])),
        ("distillation", model.shared.distillation),
    ]
    common_parts = []
    for name, module in named_modules:
        if module is not None:
            n_trained, n_parameters = _numbers(module)
            common_parts.append((name, n_trained, n_parameters))
    return tuple(common_parts)


def _taught(recipe: Recipe, dim: int, teacher: TeacherSizes | None) -> TeacherSizes | None:
    spec = recipe.distillation
    if spec is None:
        return None
    if spec.kind == "classes" and teacher is None:
        raise RecipeError(
            f"recipe {recipe.name}: how many classes it learns of depends on the teacher; "
            "give --teacher"
        )
    sized_teacher = teacher or TeacherSizes(dim=dim)
    bank = spec.bank if spec.kind == "contrastive" else None
    return replace(sized_teacher, student_dim=dim, bank=bank)


def _count(side: SharedSide, spec: PlanSpec) -> tuple[SidePlan, ItemCosts]:
    tower = side.tower
    inputs, mask = example(tower, spec)
    live_flops, whole_flops, saved_bytes = measure(
        lambda: side.outputs(inputs, mask),
        backward=True,
    )
    # A depth of -1 is that of the embeddings, below the first block.
    embeddings = [tower_part for tower_part in tower.parts() if tower_part.depth == -1]
    embeddings_train = any(tower.parameter(tower_part).requires_grad for tower_part in embeddings)
    plan = SidePlan(
        side=tower.modality,
        parts=_parts(tower),
        cut=None,
        reason=CHANGES if embeddings_train else WHOLE,
        cache_bytes=0,
        below_flops=0,
        live_flops=live_flops,
        saved_bytes=saved_bytes,
    )
    return plan, ItemCosts(
        whole_flops=whole_flops,
        uncached_flops=live_flops,
        uncached_saved=saved_bytes,
        head_flops=0,
        head_saved=0,
        out_dim=side.dim,
    )


def _parts(tower: Tower) -> Parts:
    """Return (part, trained, all) of the parts that are run."""
    n_trained: Counter[str] = Counter()
    n_parameters: Counter[str] = Counter()
    for tower_part in tower.parts():
        # Above the last block lies the final norm, which a shared encoder does not run.
        if tower_part.depth < tower.n_blocks:
            name = str(tower_part.section)
            trains = tower.parameter(tower_part).requires_grad
            n_trained[name] += tower_part.count if trains else 0
            n_parameters[name] += tower_part.count
    return tuple((name, n_trained[name], count) for name, count in n_parameters.items())


def _numbers(module: nn.Module) -> tuple[int, int]:
    """Return (trained, all) parameters of a module."""
    n_trained = 0
    n_parameters = 0
    for parameter in module.parameters():
        n_parameters += parameter.numel()
        if parameter.requires_grad:
            n_trained += parameter.numel()
    return n_trained, n_parameters
