"""Plan a recipe for two encoders that are named, with or without their weights."""

from dataclasses import replace
from functools import partial

from apecache.arguments import AnyPath, as_path, require_type
from apecache.encoders.load import count_classes, shape_tower
from apecache.encoders.spec import EncoderSpec
from apecache.errors import OptionError
from apecache.plan.counting import PlanSpec
from apecache.plan.counting_shared import TeacherSizes, count_teacher
from apecache.plan.devices import find_device
from apecache.plan.plan import Plan, plan
from apecache.plan.step_timer import StepTimer
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.recipes.sections import DistillationSpec


def plan_recipe(
    recipe: Recipe | AnyPath,
    image: EncoderSpec,
    text: EncoderSpec,
    spec: PlanSpec,
    device: str = "here",
    teacher: EncoderSpec | None = None,
    sample: AnyPath | None = None,
) -> Plan:
    """Compute what a recipe trains, where each tower is cut, and what that costs.

    Args:
        recipe: A Recipe, or the name of one. Its poolings hold for the encoders.
        image: The image encoder; its weights are not needed.
        text: The text encoder, as `image`.
        spec: Size of the data, and how the device works on it.
        device: `here` times single steps on this machine, with random weights. `H100`, `A100`, …:
            operations over the vendor's peak rate, a lower bound.
        teacher: Image encoder of the teacher, for a recipe that distills.
        sample: Folder of sample images for the timing; None: JPEG files of 500 x 375 pixels.

    Raises:
        RecipeError: Rules, adapters or widths do not fit the towers.
        EncoderError: An encoder cannot be described.
        OptionError: Settings that make no sense.
    """
    recipe = as_recipe(recipe)
    require_type(image, EncoderSpec, "image")
    require_type(text, EncoderSpec, "text")
    target = find_device(device)
    image = replace(image, pooling=recipe.towers.image_pooling)
    text = replace(text, pooling=recipe.towers.text_pooling)
    sample_folder = None if sample is None else as_path(sample, "sample")
    if sample_folder is not None and device != "here":
        raise OptionError(f"--sample is for --device here, not for --device {device}; leave it out")
    # A teacher without a recipe that distills costs nothing.
    teacher_sizes = None
    if teacher is not None and recipe.distillation:
        teacher_sizes = partial(_teacher_sizes, recipe.distillation, teacher, spec)
    clock = None
    # Only this machine can time steps; a device of the table has a rate alone.
    if target.name == "here":
        clock = StepTimer(
            recipe=recipe,
            image=image,
            text=text,
            spec=spec,
            teacher=teacher_sizes,
            sample=sample_folder,
        )
    return plan(
        recipe,
        image=partial(shape_tower, image, is_frozen=recipe.towers.is_frozen("image")),
        text=partial(shape_tower, text, is_frozen=recipe.towers.is_frozen("text")),
        spec=spec,
        device=target,
        teacher=teacher_sizes,
        clock=clock,
    )


def _teacher_sizes(
    distillation: DistillationSpec,
    teacher: EncoderSpec,
    settings: PlanSpec,
) -> TeacherSizes:
    """Count what a teacher adds to a recipe."""
    # Distilled classes go through the teacher's classifier, which is counted as well.
    n_classes = count_classes(teacher) if distillation.kind == "classes" else None
    return count_teacher(shape_tower(teacher, is_frozen=True), settings, n_classes)
