"""`apecache plan`."""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .extract import encoder_specs
from .terminal import Json, ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.plan.counting import PlanSpec, SidePlan
    from apecache.plan.counting_shared import TeacherSizes
    from apecache.plan.devices import Device
    from apecache.plan.plan import Cost, Plan
    from apecache.recipes.recipe import Recipe
    from apecache.recipes.sections import DistillationSpec

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_count(text: str) -> int:
    """Parse `400M`, `5B`, `1.5k` or plain digits.

    Raises:
        BadParameter: Anything else, a fraction, or less than one.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kKmMbBgG]?)", str(text))
    count: float = 0
    if match:
        digits = re.sub("[_,]", "", match[1])
        unit = UNITS[match[2].upper()]
        # Rounded, because 1.1 * 1000 is not 1100 in floating point.
        count = round(float(digits) * unit, 6)
    if count < 1 or count != int(count):
        raise typer.BadParameter(
            f"{text!r} is no count; expected a whole number like 20000, 400M or 5B"
        )
    return int(count)


UNCOUNTED_TEACHER = (
    "the teacher is not counted: its features are taken to be as wide as the student, and its "
    "operations are left out; give --teacher"
)


def plan(
    recipe: Annotated[
        list[str],
        typer.Option(
            help="A recipe by name (lit, lilt-i, freeze/Vuf-Tuu, ape) or a file.toml; or several."
        ),
    ],
    image: Annotated[
        str, typer.Option(help="Image encoder, as for extract; its weights are not read.")
    ],
    text: Annotated[
        str, typer.Option(help="Text encoder, as for extract; its weights are not read.")
    ],
    rows: Annotated[
        int,
        typer.Option(parser=parse_count, metavar="COUNT", help="How many images: 20000, 400M, 5B."),
    ],
    captions: Annotated[int, typer.Option(min=1, help="Captions of each image.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a caption, special ones and padding included.")
    ] = 32,
    resolution: Annotated[int | None, typer.Option(min=16, help="Image side in pixels.")] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            help="here: a folder of images like those to train on. Default: JPEGs of 500 x 375."
        ),
    ] = None,
    slice_size: Annotated[
        int | None,
        typer.Option("--slice", min=1, help="Pairs in memory at once. Default: the whole batch."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="here (steps are run and timed), or of the table: H100, A100, …")
    ] = "here",
    utilization: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the device's rate that is reached.")
    ] = 1.0,
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            "--price-per-hour",
            min=0,
            help="Of one hour of one device, in any currency.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Of a recipe that distils: its image encoder, run once for each image."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override: section.key=value. May be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a recipe trains, where each tower can be cut and why, and what that costs, before
    anything runs. Several recipes are compared in one table.

    Here, a step of each plan is run with random weights and made-up inputs, and timed; batches that
    take long are extrapolated from smaller ones. Rates of devices in the table are the vendor's
    peaks, so their seconds are the least that is possible.

    Example: apecache plan --recipe lit --image timm:vit_base_patch16_224 --text
    hf:bert-base-uncased --rows 100000 --device H100
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.plan.counting import PlanSpec
        from apecache.plan.devices import find_device
        from apecache.recipes.recipe import load_recipe

        settings = PlanSpec(
            rows=rows,
            captions=captions,
            tokens=tokens,
            slice_size=slice_size,
            utilization=utilization,
            price=price,
        )
        loaded = [load_recipe(name, set_ or ()) for name in recipe]
        if sample is not None and device != "here":
            raise OptionError(f"--sample is for --device here, not {device}; leave it out")
        plan_device = find_device(device)
        plans = []
        for loaded_recipe in loaded:
            recipe_plan = _plan(
                loaded_recipe,
                image=image,
                text=text,
                teacher=teacher,
                resolution=resolution,
                settings=settings,
                device=plan_device,
                sample=sample,
            )
            plans.append(recipe_plan)
        if len(plans) > 1 and json:
            show_json({"plans": [asdict(recipe_plan) for recipe_plan in plans]})
        elif len(plans) > 1:
            _compare(plans, rows)
        elif json:
            show_json(plans[0])
        else:
            _show(plans[0], rows)


def _plan(
    recipe: "Recipe",
    image: str,
    text: str,
    teacher: str | None,
    resolution: int | None,
    settings: "PlanSpec",
    device: "Device",
    sample: Path | None,
) -> "Plan":
    """Return the plan of a recipe."""
    from apecache.encoders.load import shape_tower
    from apecache.plan.plan import plan as run

    cuts = recipe.towers
    tokens = settings.tokens
    specs = (
        *encoder_specs(
            [image],
            modality="image",
            cuts=[str(cuts.image_pooling)],
            dtype="float32",
            resolution=resolution,
        ),
        *encoder_specs(
            [text],
            modality="text",
            cuts=[str(cuts.text_pooling)],
            dtype="float32",
            max_tokens=tokens,
        ),
    )
    shapes = [partial(shape_tower, spec, is_frozen=cuts.is_frozen(spec.modality)) for spec in specs]
    taught = None
    if teacher and recipe.distillation:
        taught = partial(_taught, recipe.distillation, teacher, settings)
    clock = None
    # Only this machine can time steps; a device of the table has a rate alone.
    if device.name == "here":
        from apecache.plan.step_timer import StepTimer

        clock = StepTimer(
            recipe=recipe,
            image=specs[0],
            text=specs[1],
            spec=settings,
            teacher=taught,
            sample=sample,
        )
    return run(
        recipe,
        image=shapes[0],
        text=shapes[1],
        spec=settings,
        device=device,
        teacher=taught,
        clock=clock,
    )


def _taught(distillation: "DistillationSpec", teacher: str, settings: "PlanSpec") -> "TeacherSizes":
    """Count what a teacher adds to a recipe."""
    from apecache.encoders.load import count_classes, shape_tower
    from apecache.plan.counting_shared import count_teacher

    (spec,) = encoder_specs([teacher], modality="image", cuts=None, dtype="float32")
    n_classes = count_classes(spec) if distillation.kind == "classes" else None
    return count_teacher(shape_tower(spec, is_frozen=True), settings, n_classes)


def _compare(plans: "list[Plan]", rows: int) -> None:
    """Show several recipes in one table, a row for each."""
    columns = (
        "recipe",
        "trained",
        "of",
        "cut",
        "cache",
        "steps",
        "in all",
        "peak memory",
        "seconds",
        "cost",
    )
    lines = []
    for plan in plans:
        seconds, money = _time(plan.planned)
        lines.append(
            (
                plan.recipe,
                f"{plan.n_trained:,}",
                f"{plan.n_parameters:,}",
                _cuts(plan),
                _bytes(plan.cache_bytes),
                f"{plan.n_steps:,}",
                f"{plan.planned.total_flops / 1e12:.4g} TFLOP",
                _bytes(plan.planned.peak_bytes),
                seconds,
                money,
            )
        )
    show_table(f"{counted(rows, 'image')} on {_device(plans[0])}", columns, lines)
    uncounted = [plan.recipe for plan in plans if not plan.teacher_is_counted]
    if uncounted:
        typer.echo(f"{', '.join(uncounted)}: {UNCOUNTED_TEACHER}")


def _cuts(plan: "Plan") -> str:
    return ", ".join(
        "none" if side.cut is None else str(side.cut) for side in (plan.image, plan.text)
    )


def _cut_text(side: "SidePlan") -> str:
    """Say in words where a tower is cut."""
    if side.cut is None:
        return "no cut"
    if side.cut == "pooled":
        return "cut after all blocks" if side.tokens else "cut after the pooling"
    return f"cut after {side.cut} blocks"


def _show(plan: "Plan", rows: int) -> None:
    """Show one recipe: what trains, where the towers are cut and why, and the costs."""
    sides = (plan.image, plan.text)
    title = f"{plan.recipe}: {plan.n_trained:,} of {plan.n_parameters:,} parameters train"
    towers = (
        (plan.image.side, plan.image.parts),
        (plan.text.side, plan.text.parts),
        ("both", plan.common),
    )
    part_rows = []
    for tower, tower_parts in towers:
        for name, n_trained, n_parameters in tower_parts:
            part_rows.append((tower, name, f"{n_trained:,}", f"{n_parameters:,}"))
    show_table(title, ("tower", "part", "trained", "of"), part_rows)
    for side in sides:
        typer.echo(f"{side.side}: {_cut_text(side)}: {side.reason}")
    columns = ("", "cache", "once", "each step", "in all", "peak memory", "seconds", "cost")
    costs = (
        ("as planned", plan.planned),
        ("without the cache", plan.without_cache),
        ("all trained (CLIP)", plan.full),
    )
    lines = []
    for name, cost in costs:
        cache = _bytes(plan.cache_bytes) if name == "as planned" else "none"
        memory = _bytes(cost.peak_bytes)
        lines.append((name, cache, *_flops(cost), memory, *_time(cost)))
    if plan.teacher_bytes:
        typer.echo(
            f"teacher: {_bytes(plan.teacher_bytes)} of features, computed once and read from "
            "the cache"
        )
    if not plan.teacher_is_counted:
        typer.echo(UNCOUNTED_TEACHER)
    steps = (
        f"{counted(rows, 'image')}, {counted(plan.n_steps, 'step')} of {plan.batch_size:,} pairs"
    )
    show_table(f"{plan.path}: {steps} on {_device(plan)}", columns, lines)


def _device(plan: "Plan") -> str:
    return f"{plan.device.name}, {plan.device.flops / 1e12:.3g} TFLOP/s ({plan.device.source})"


def _flops(cost: "Cost") -> tuple[str, ...]:
    """Return operations: once, of each step and in all."""
    return tuple(
        f"{flops / 1e12:.4g} TFLOP"
        for flops in (cost.once_flops, cost.step_flops, cost.total_flops)
    )


def _time(cost: "Cost") -> tuple[str, str]:
    """Return seconds and money."""
    money = "no --price" if cost.money is None else f"{cost.money:,.2f}"
    return f"{cost.seconds:,.1f}", money


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
