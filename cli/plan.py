"""`apecache plan`."""

from functools import partial
from typing import Annotated, Any

import typer

from .extract import encoder_specs
from .terminal import Json, ending, show_json, show_table


def plan(
    recipe: Annotated[str, typer.Option(help="A recipe by name (lit, lilt-i, freeze/Vuf-Tuu, ape) or a file.toml.")],
    image: Annotated[str, typer.Option(help="Image encoder, as for extract; its weights are not read.")],
    text: Annotated[str, typer.Option(help="Text encoder, as for extract; its weights are not read.")],
    rows: Annotated[int, typer.Option(min=1, help="How many images.")],
    captions: Annotated[int, typer.Option(min=1, help="Captions of each image.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption, special ones and padding included.")] = 32,
    resolution: Annotated[int | None, typer.Option(min=16, help="Image side in pixels.")] = None,
    slice_size: Annotated[
        int | None, typer.Option("--slice", min=1, help="Pairs in memory at once. Default: the whole batch.")
    ] = None,
    device: Annotated[str, typer.Option(help="here (measured, a second), or one of the table: H100, A100, …")] = "here",
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the device's rate that is reached.")
    ] = 1.0,
    price: Annotated[float | None, typer.Option(min=0, help="Of one hour of the device, in any currency.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a recipe trains, where each tower can be cut and why, and what that costs, before anything runs.

    Rates of devices in the table are the vendor's peaks, so the seconds are the least that is possible.

    Example: apecache plan --recipe lit --image timm:vit_base_patch16_224 --text hf:bert-base-uncased --rows 100000
    --device H100
    """
    with ending():
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        towers = loaded.towers
        specs = (
            *encoder_specs([image], "image", [str(towers.image_pooling)], "float32", resolution=resolution),
            *encoder_specs([text], "text", [str(towers.text_pooling)], "float32", max_tokens=tokens),
        )
        from apecache.encoders.load import shape_tower
        from apecache.recipes.devices import find_device
        from apecache.recipes.plan import PlanSpec
        from apecache.recipes.plan import plan as run

        settings = PlanSpec(rows, captions, tokens, slice_size, utilisation, price)
        shapes = [partial(shape_tower, spec) for spec in specs]
        found = run(loaded, shapes[0], shapes[1], settings, find_device(device))
        if json:
            show_json(found)
        else:
            _show(found, rows)


def _show(plan: Any, rows: int) -> None:
    sides = (plan.image, plan.text)
    title = f"{plan.recipe}: {plan.n_trained:,} of {plan.n_parameters:,} parameters train"
    parts = [(side.side, part, f"{n:,}", f"{of:,}") for side in sides for part, n, of in side.parts]
    show_table(title, ("tower", "part", "trained", "of"), [*parts, ("both", "temperature", _temperature(plan), "1")])
    for side in sides:
        place = {None: "no cut", "pooled": "cut after the pooling"}.get(side.cut, f"cut after {side.cut} blocks")
        typer.echo(f"{side.side}: {place}: {side.reason}")
    columns = ("", "cache", "once", "each step", "in all", "peak memory", "seconds", "cost")
    costs = (("as planned", plan.planned), ("without the cache", plan.without_cache), ("all trained (CLIP)", plan.full))
    lines = [
        (name, _cache(plan) if name == "as planned" else "none", *_flops(cost), _bytes(cost.peak_bytes), *_time(cost))
        for name, cost in costs
    ]
    device = f"{plan.device.name}, {plan.device.flops / 1e12:.3g} TFLOP/s ({plan.device.source})"
    steps = f"{rows:,} images, {plan.n_steps:,} steps of {plan.batch_size:,} pairs"
    show_table(f"{plan.path}: {steps} on {device}", columns, lines)


def _temperature(plan: Any) -> str:
    return str(plan.n_trained - plan.image.n_trained - plan.text.n_trained)


def _cache(plan: Any) -> str:
    return _bytes(plan.image.cache_bytes + plan.text.cache_bytes)


def _flops(cost: Any) -> tuple[str, ...]:
    return tuple(f"{flops / 1e12:.4g} TFLOP" for flops in (cost.once_flops, cost.step_flops, cost.total_flops))


def _time(cost: Any) -> tuple[str, str]:
    return f"{cost.seconds:,.1f}", "no --price" if cost.money is None else f"{cost.money:,.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
