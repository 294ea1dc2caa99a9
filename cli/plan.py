"""`apecache plan`."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .encoders import encoder_specs
from .option_groups import ADVANCED, COSTS, Json, OptionGroup, Settings, takes_groups
from .terminal import ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.encoders.spec import EncoderSpec
    from apecache.plan.counting import PlanSpec, SidePlan
    from apecache.plan.devices import Device
    from apecache.plan.plan import Cost, Plan
    from apecache.recipes.recipe import Recipe

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
        raise typer.BadParameter(f"expected a whole number like 20000, 400M or 5B, found {text!r}")
    return int(count)


UNCOUNTED_TEACHER = (
    "the teacher is not counted: its operations are left out, and its features are assumed to be "
    "as wide as the student's; give --teacher ENCODER"
)

DATA = "Data"


@dataclass(frozen=True, kw_only=True)
class DataOptions(OptionGroup):
    """Hold the size of the data that is planned for."""

    rows: Annotated[
        int,
        typer.Option(
            parser=parse_count,
            metavar="COUNT",
            help="Number of images, e.g. 20000, 400M or 5B.",
        ),
    ]
    captions: Annotated[
        int, typer.Option(min=1, help="Captions per image.", rich_help_panel=DATA)
    ] = 1
    tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens per caption, including special tokens and padding.",
            rich_help_panel=DATA,
        ),
    ] = 32
    resolution: Annotated[
        int | None,
        typer.Option(
            min=16,
            metavar="PIXELS",
            help="Side of the input image. Default: the encoder's.",
            rich_help_panel=DATA,
        ),
    ] = None
    sample: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of sample images for the timing, with --device here. Default: JPEG files "
            "of 500 x 375 pixels.",
            rich_help_panel=DATA,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MachineOptions(OptionGroup):
    """Hold the machine that is planned for."""

    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="here: run and time single steps. H100, A100, …: compute with the vendor's "
            "peak rate.",
        ),
    ] = "here"
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            "--price-per-hour",
            min=0,
            metavar="PRICE",
            help="Price of one hour of one device, in any currency.",
            rich_help_panel=COSTS,
        ),
    ] = None
    utilization: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            metavar="SHARE",
            help="Share of the device's peak rate that training reaches.",
            rich_help_panel=COSTS,
        ),
    ] = 1.0
    slice_size: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=1,
            help="Pairs in memory at once. Default: the whole batch.",
            rich_help_panel=ADVANCED,
        ),
    ] = None


@takes_groups
def plan(
    recipe: Annotated[
        list[str],
        typer.Option(
            metavar="RECIPE",
            help="Name of a recipe (lit, lilt-i, freeze/Vuf-Tuu, ape, …), or a TOML file. Repeat "
            "it to compare recipes.",
        ),
    ],
    data: DataOptions,
    machine: MachineOptions,
    image: Annotated[
        str | None,
        typer.Option(metavar="ENCODER", help="Image encoder. Its weights are not needed."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="ENCODER", help="Text encoder. Its weights are not needed."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Image-text model (CLIP, SigLIP, …) as both encoders.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Image encoder of the teacher, for a recipe that distills.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    set_: Settings = None,
    json: Json = False,
) -> None:
    """Compute what a recipe trains and what it costs, before anything runs.

    Shows how deep each tower can be cached and why, then operations, memory, time and money. With
    --device here, one step of each plan is timed with random weights and synthetic inputs. Slow
    batches are extrapolated from smaller ones. For other devices, the time is a lower bound.

    Example: apecache plan --recipe lit --image timm:vit_base_patch16_224 --text
    hf:bert-base-uncased --rows 100000 --device H100
    """
    with ending():
        from apecache.plan.devices import find_device
        from apecache.recipes.recipe import load_recipe

        # Options and recipes are checked before encoders are opened, which takes seconds.
        spec = _plan_spec(data, machine)
        loaded = [load_recipe(name, set_ or ()) for name in recipe]
        device = find_device(machine.device)
        encoders = PlanEncoders(
            image=_chosen(model, image, "--image"),
            text=_chosen(model, text, "--text"),
            teacher=teacher,
        )
        # One plan after another: a timed plan needs the whole device.
        plans = []
        for loaded_recipe in loaded:
            plans.append(_plan(loaded_recipe, encoders, data=data, spec=spec, device=device))
        _show_plans(plans, data.rows, json)


def _chosen(model: str | None, side: str | None, option: str) -> str:
    """Return the encoder of one side.

    Raises:
        OptionError: Neither `--model` nor the side's own option is given.
    """
    from apecache.errors import OptionError

    # The side's own option goes before --model.
    name = side or model
    if name is None:
        raise OptionError(f"no encoder: give {option}, or --model for both sides")
    return name


def _plan_spec(data: DataOptions, machine: MachineOptions) -> "PlanSpec":
    from apecache.plan.counting import PlanSpec

    return PlanSpec(
        rows=data.rows,
        captions=data.captions,
        tokens=data.tokens,
        slice_size=machine.slice_size,
        utilization=machine.utilization,
        price=machine.price,
    )


def _show_plans(plans: "list[Plan]", rows: int, json: bool) -> None:
    """Show one plan in full, or several in one table."""
    if len(plans) > 1 and json:
        show_json({"plans": [asdict(plan) for plan in plans]})
    elif len(plans) > 1:
        _compare(plans, rows)
    elif json:
        show_json(plans[0])
    else:
        _show(plans[0], rows)


@dataclass(frozen=True, kw_only=True)
class PlanEncoders:
    """Hold the names of the encoders of a plan."""

    image: str
    text: str
    teacher: str | None

    def specs(self, recipe: "Recipe", data: DataOptions) -> "tuple[EncoderSpec, EncoderSpec]":
        """Return the image and the text encoder, pooled as the recipe says."""
        (image,) = encoder_specs(
            [self.image],
            modality="image",
            cuts=[str(recipe.towers.image_pooling)],
            dtype="float32",
            resolution=data.resolution,
        )
        (text,) = encoder_specs(
            [self.text],
            modality="text",
            cuts=[str(recipe.towers.text_pooling)],
            dtype="float32",
            max_tokens=data.tokens,
        )
        return image, text


def _plan(
    recipe: "Recipe",
    encoders: PlanEncoders,
    data: DataOptions,
    spec: "PlanSpec",
    device: "Device",
) -> "Plan":
    """Return the plan of a recipe."""
    from apecache.plan.plan_recipe import plan_recipe

    image, text = encoders.specs(recipe, data)
    teacher = None
    if encoders.teacher:
        (teacher,) = encoder_specs([encoders.teacher], modality="image", cuts=None, dtype="float32")
    return plan_recipe(
        recipe,
        image=image,
        text=text,
        spec=spec,
        device=device.name,
        teacher=teacher,
        sample=data.sample,
    )


def _compare(plans: "list[Plan]", rows: int) -> None:
    """Show several recipes in one table, a row for each."""
    columns = (
        "recipe",
        "trained",
        "parameters",
        "cut",
        "cache",
        "steps",
        "total",
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
    # The reasons do not fit into a cell of the table.
    for plan in plans:
        for line in _memory_lines(plan):
            typer.echo(line)
    uncounted = [plan.recipe for plan in plans if not plan.teacher_is_counted]
    if uncounted:
        typer.echo(f"{', '.join(uncounted)}: {UNCOUNTED_TEACHER}")


def _cuts(plan: "Plan") -> str:
    return ", ".join(
        "none" if side.cut is None else str(side.cut) for side in (plan.image, plan.text)
    )


def _cut_text(side: "SidePlan") -> str:
    """Describe where a tower is cut."""
    if side.cut is None:
        return "no cut"
    if side.cut == "pooled":
        return "cut after all blocks" if side.tokens else "cut after the pooling"
    return f"cut after {side.cut} blocks"


def _show(plan: "Plan", rows: int) -> None:
    """Show what trains, where the towers are cut and why, and the costs."""
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
    show_table(title, ("tower", "part", "trained", "parameters"), part_rows)
    for side in sides:
        typer.echo(f"{side.side}: {_cut_text(side)}: {side.reason}")
    columns = ("", "cache", "once", "each step", "total", "peak memory", "seconds", "cost")
    costs = (
        ("as planned", plan.planned),
        ("without the cache", plan.without_cache),
        ("all trained (CLIP)", plan.full),
    )
    lines = []
    for name, cost in costs:
        # The other two ways of training run the towers anew, and read no cache.
        cache = _bytes(plan.cache_bytes) if name == "as planned" else "none"
        memory = _bytes(cost.peak_bytes)
        lines.append((name, cache, *_flops(cost), memory, *_time(cost)))
    for line in _memory_lines(plan):
        typer.echo(line)
    if plan.teacher_bytes:
        typer.echo(
            f"teacher: {_bytes(plan.teacher_bytes)} of features, computed once, then read from "
            "the cache"
        )
    if not plan.teacher_is_counted:
        typer.echo(UNCOUNTED_TEACHER)
    steps = (
        f"{counted(rows, 'image')}, {counted(plan.n_steps, 'step')} of {plan.batch_size:,} pairs"
    )
    by_epoch = plan.steps_by_epoch
    # With one caption for each image both ways of counting agree.
    if by_epoch["images"] != by_epoch["pairs"]:
        typer.echo(
            f"steps: {by_epoch['pairs']:,} if an epoch counts pairs, {by_epoch['images']:,} if it "
            f"counts images; this recipe takes {plan.n_steps:,} (schedule.epoch)"
        )
    show_table(f"{plan.path}: {steps} on {_device(plan)}", columns, lines)


def _memory_lines(plan: "Plan") -> list[str]:
    """Say where the planned training does not fit into the device, and what would."""
    if plan.fitting_slice is None or plan.device.memory_bytes is None:
        return []
    problem = (
        f"{plan.recipe}: the peak memory of {_bytes(plan.planned.peak_bytes)} is beyond the "
        f"{_bytes(plan.device.memory_bytes)} of {plan.device.name}"
    )
    # fit-head has no --slice: its batches are features, which are small beside the towers.
    if plan.path == "fit-head":
        return [f"{problem}; lower schedule.batch_size"]
    if plan.fitting_slice:
        return [f"{problem}; --slice {plan.fitting_slice} fits"]
    return [f"{problem}, and no --slice fits; choose a larger device"]


def _device(plan: "Plan") -> str:
    return f"{plan.device.name}, {plan.device.flops / 1e12:.3g} TFLOP/s ({plan.device.source})"


def _flops(cost: "Cost") -> tuple[str, ...]:
    """Return operations: once, per step and in total."""
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
