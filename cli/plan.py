"""`apecache plan`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .extract import encoder_specs
from .terminal import Json, ending, show_json, show_table


def plan(
    recipe: Annotated[
        list[str], typer.Option(help="A recipe by name (lit, lilt-i, freeze/Vuf-Tuu, ape) or a file.toml; or several.")
    ],
    image: Annotated[str, typer.Option(help="Image encoder, as for extract; its weights are not read.")],
    text: Annotated[str, typer.Option(help="Text encoder, as for extract; its weights are not read.")],
    rows: Annotated[int, typer.Option(min=1, help="How many images.")],
    captions: Annotated[int, typer.Option(min=1, help="Captions of each image.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption, special ones and padding included.")] = 32,
    resolution: Annotated[int | None, typer.Option(min=16, help="Image side in pixels.")] = None,
    sample: Annotated[
        Path | None, typer.Option(help="here: a folder of images like those to train on. Default: JPEGs of 500 x 375.")
    ] = None,
    slice_size: Annotated[
        int | None, typer.Option("--slice", min=1, help="Pairs in memory at once. Default: the whole batch.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="here (steps are run and timed), or of the table: H100, A100, …")
    ] = "here",
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the device's rate that is reached.")
    ] = 1.0,
    price: Annotated[float | None, typer.Option(min=0, help="Of one hour of the device, in any currency.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Of a recipe that distils: its image encoder, run once for each image.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a recipe trains, where each tower can be cut and why, and what that costs, before anything runs. Several
    recipes are compared in one table.

    Here, a step of each plan is run with random weights and made-up inputs, and timed; batches that take long are
    extrapolated from smaller ones. Rates of devices in the table are the vendor's peaks, so their seconds are the least
    that is possible.

    Example: apecache plan --recipe lit --image timm:vit_base_patch16_224 --text hf:bert-base-uncased --rows 100000
    --device H100
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.recipes.counting import PlanSpec
        from apecache.recipes.devices import find_device
        from apecache.recipes.recipe import load_recipe

        settings = PlanSpec(rows, captions, tokens, slice_size, utilisation, price)
        loaded = [load_recipe(name, set_ or ()) for name in recipe]
        if sample is not None and device != "here":
            raise OptionError(f"--sample is for --device here, not {device}; leave it out")
        where = find_device(device)
        found = [_plan(one, image, text, teacher, resolution, settings, where, sample) for one in loaded]
        if len(found) > 1:
            show_json({"plans": [asdict(one) for one in found]}) if json else _compare(found, rows)
        elif json:
            show_json(found[0])
        else:
            _show(found[0], rows)


def _plan(
    recipe: Any,
    image: str,
    text: str,
    teacher: str | None,
    resolution: int | None,
    settings: Any,
    device: Any,
    sample: Path | None,
) -> Any:
    from apecache.encoders.load import shape_tower
    from apecache.recipes.plan import plan as run

    cuts, tokens = recipe.towers, settings.tokens
    specs = (
        *encoder_specs([image], "image", [str(cuts.image_pooling)], "float32", resolution=resolution),
        *encoder_specs([text], "text", [str(cuts.text_pooling)], "float32", max_tokens=tokens),
    )
    shapes = [partial(shape_tower, spec) for spec in specs]
    taught = partial(_taught, recipe, teacher, settings) if teacher and recipe.distillation else None
    clock = None
    if device.name == "here":
        from apecache.train.step_clock import StepClock

        clock = StepClock(recipe, specs[0], specs[1], settings, taught, sample)
    return run(recipe, shapes[0], shapes[1], settings, device, taught, clock)


def _taught(recipe: Any, teacher: str, settings: Any) -> Any:
    from apecache.encoders.load import count_classes, shape_tower
    from apecache.recipes.counting_shared import count_teacher

    (spec,) = encoder_specs([teacher], "image", None, "float32")
    n_classes = count_classes(spec) if recipe.distillation.kind == "classes" else None
    return count_teacher(shape_tower(spec), settings, n_classes)


def _compare(plans: list[Any], rows: int) -> None:
    columns = ("recipe", "trained", "of", "cut", "cache", "steps", "in all", "peak memory", "seconds", "cost")
    lines = []
    for p in plans:
        counts = (f"{p.n_trained:,}", f"{p.n_parameters:,}", _cuts(p), _bytes(p.cache_bytes), f"{p.n_steps:,}")
        flops = f"{p.planned.total_flops / 1e12:.4g} TFLOP"
        lines.append((p.recipe, *counts, flops, _bytes(p.planned.peak_bytes), *_time(p.planned)))
    show_table(f"{rows:,} images on {_device(plans[0])}", columns, lines)


def _cuts(plan: Any) -> str:
    return ", ".join("none" if side.cut is None else str(side.cut) for side in (plan.image, plan.text))


def _show(plan: Any, rows: int) -> None:
    sides = (plan.image, plan.text)
    title = f"{plan.recipe}: {plan.n_trained:,} of {plan.n_parameters:,} parameters train"
    parts = [(side.side, part, f"{n:,}", f"{of:,}") for side in sides for part, n, of in side.parts]
    parts += [("both", part, f"{n:,}", f"{of:,}") for part, n, of in plan.common]
    show_table(title, ("tower", "part", "trained", "of"), parts)
    for side in sides:
        place = {None: "no cut", "pooled": "cut after the pooling"}.get(side.cut, f"cut after {side.cut} blocks")
        typer.echo(f"{side.side}: {place}: {side.reason}")
    columns = ("", "cache", "once", "each step", "in all", "peak memory", "seconds", "cost")
    costs = (("as planned", plan.planned), ("without the cache", plan.without_cache), ("all trained (CLIP)", plan.full))
    lines = [
        (
            name,
            _bytes(plan.cache_bytes) if name == "as planned" else "none",
            *_flops(cost),
            _bytes(cost.peak_bytes),
            *_time(cost),
        )
        for name, cost in costs
    ]
    if plan.teacher_bytes:
        typer.echo(f"teacher: {_bytes(plan.teacher_bytes)} of features, computed once and read from the cache")
    steps = f"{rows:,} images, {plan.n_steps:,} steps of {plan.batch_size:,} pairs"
    show_table(f"{plan.path}: {steps} on {_device(plan)}", columns, lines)


def _device(plan: Any) -> str:
    return f"{plan.device.name}, {plan.device.flops / 1e12:.3g} TFLOP/s ({plan.device.source})"


def _flops(cost: Any) -> tuple[str, ...]:
    return tuple(f"{flops / 1e12:.4g} TFLOP" for flops in (cost.once_flops, cost.step_flops, cost.total_flops))


def _time(cost: Any) -> tuple[str, str]:
    return f"{cost.seconds:,.1f}", "no --price" if cost.money is None else f"{cost.money:,.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
