"""`apecache plan`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .cluster_sheet import parse_count, show_cluster
from .extract import encoder_specs
from .terminal import Json, ending, show_json, show_table


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
    utilisation: Annotated[
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
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A sheet for so many nodes: hours, money, bytes, objects, assumptions.",
        ),
    ] = None,
    devices_per_node: Annotated[
        int | None, typer.Option(min=1, help="With --nodes: devices of each. Default: 1.")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="With --nodes: share of all devices' rates that training reaches. Default: 1.",
        ),
    ] = None,
    rate_images: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --nodes: images a second that a device was measured to encode.",
        ),
    ] = None,
    rate_texts: Annotated[
        float | None, typer.Option(min=0.001, help="With --nodes: captions a second, likewise.")
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="With --nodes: cached augmentations of each image.")
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --nodes: rows of a shard at most. Default: as extract, 4096.",
        ),
    ] = None,
    image_kb: Annotated[
        float | None,
        typer.Option("--image-kb", min=0.001, help="With --nodes: kB of an image file on average."),
    ] = None,
    decode_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --nodes: images a second that a node was measured to read and decode.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a recipe trains, where each tower can be cut and why, and what that costs, before
    anything runs. Several recipes are compared in one table.

    Here, a step of each plan is run with random weights and made-up inputs, and timed; batches that
    take long are extrapolated from smaller ones. Rates of devices in the table are the vendor's
    peaks, so their seconds are the least that is possible.

    With --nodes: what extraction of such a table and training from the cache would take on a
    cluster, computed from these rates, or from those that you measured, with every assumption.

    Example: apecache plan --recipe lit --image timm:vit_base_patch16_224 --text
    hf:bert-base-uncased --rows 100000 --device H100

    Example: apecache plan --recipe projection --image timm:vit_base_patch16_224 --text
    hf:bert-base-uncased --rows 400M --device H100 --utilisation 0.4 --nodes 8 --devices-per-node 8
    --price-per-hour 2.5
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.plan.cluster_plan import ClusterSpec, plan_cluster
        from apecache.plan.counting import PlanSpec
        from apecache.plan.devices import find_device
        from apecache.recipes.recipe import load_recipe

        settings = PlanSpec(
            rows=rows,
            captions=captions,
            tokens=tokens,
            slice_size=slice_size,
            utilisation=utilisation,
            price=price,
        )
        loaded = [load_recipe(name, set_ or ()) for name in recipe]
        if sample is not None and device != "here":
            raise OptionError(f"--sample is for --device here, not {device}; leave it out")
        image_bytes = None if image_kb is None else round(1000 * image_kb)
        given = _given(
            nodes is not None,
            devices=devices_per_node,
            efficiency=efficiency,
            image_rate=rate_images,
            text_rate=rate_texts,
            views=views,
            shard_rows=shard_rows,
            image_bytes=image_bytes,
            decode_rate=decode_rate,
        )
        where = find_device(device)
        found = [
            _plan(
                one,
                image=image,
                text=text,
                teacher=teacher,
                resolution=resolution,
                settings=settings,
                device=where,
                sample=sample,
            )
            for one in loaded
        ]
        plans = [one for one, _ in found]
        if nodes is not None:
            cluster = ClusterSpec(nodes=nodes, **given)
            _show_clusters(
                [
                    plan_cluster(one, spec=settings, cluster=cluster, clock=clock)
                    for one, clock in found
                ],
                json,
            )
        elif len(plans) > 1:
            show_json({"plans": [asdict(one) for one in plans]}) if json else _compare(plans, rows)
        elif json:
            show_json(plans[0])
        else:
            _show(plans[0], rows)


def _plan(
    recipe: Any,
    image: str,
    text: str,
    teacher: str | None,
    resolution: int | None,
    settings: Any,
    device: Any,
    sample: Path | None,
) -> tuple[Any, Any]:
    """The plan, and the clock of its seconds, if they are timed."""
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
    shapes = [partial(shape_tower, spec) for spec in specs]
    taught = (
        partial(_taught, recipe, teacher, settings) if teacher and recipe.distillation else None
    )
    clock = None
    if device.name == "here":
        from apecache.plan.step_clock import StepClock

        clock = StepClock(
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
    ), clock


def _taught(recipe: Any, teacher: str, settings: Any) -> Any:
    from apecache.encoders.load import count_classes, shape_tower
    from apecache.plan.counting_shared import count_teacher

    (spec,) = encoder_specs([teacher], modality="image", cuts=None, dtype="float32")
    n_classes = count_classes(spec) if recipe.distillation.kind == "classes" else None
    return count_teacher(shape_tower(spec), settings, n_classes)


def _given(with_nodes: bool, **options: Any) -> dict[str, Any]:
    """Settings of a cluster that were given. Raises OptionError for any without --nodes."""
    from apecache.errors import OptionError

    given = {name: value for name, value in options.items() if value is not None}
    if given and not with_nodes:
        raise OptionError(
            f"{', '.join(given)}: settings of a cluster; add --nodes N, or leave them out"
        )
    return given


def _show_clusters(sheets: list[Any], json: bool) -> None:
    if json:
        show_json({"sheets": [asdict(sheet) for sheet in sheets]} if len(sheets) > 1 else sheets[0])
        return
    for sheet in sheets:
        show_cluster(sheet)


def _compare(plans: list[Any], rows: int) -> None:
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
    for p in plans:
        counts = (
            f"{p.n_trained:,}",
            f"{p.n_parameters:,}",
            _cuts(p),
            _bytes(p.cache_bytes),
            f"{p.n_steps:,}",
        )
        flops = f"{p.planned.total_flops / 1e12:.4g} TFLOP"
        lines.append((p.recipe, *counts, flops, _bytes(p.planned.peak_bytes), *_time(p.planned)))
    show_table(f"{rows:,} images on {_device(plans[0])}", columns, lines)


def _cuts(plan: Any) -> str:
    return ", ".join(
        "none" if side.cut is None else str(side.cut) for side in (plan.image, plan.text)
    )


def _show(plan: Any, rows: int) -> None:
    sides = (plan.image, plan.text)
    title = f"{plan.recipe}: {plan.n_trained:,} of {plan.n_parameters:,} parameters train"
    parts = [(side.side, part, f"{n:,}", f"{of:,}") for side in sides for part, n, of in side.parts]
    parts += [("both", part, f"{n:,}", f"{of:,}") for part, n, of in plan.common]
    show_table(title, ("tower", "part", "trained", "of"), parts)
    for side in sides:
        pooled = "cut after all blocks" if side.tokens else "cut after the pooling"
        place = {None: "no cut", "pooled": pooled}.get(side.cut, f"cut after {side.cut} blocks")
        typer.echo(f"{side.side}: {place}: {side.reason}")
    columns = ("", "cache", "once", "each step", "in all", "peak memory", "seconds", "cost")
    costs = (
        ("as planned", plan.planned),
        ("without the cache", plan.without_cache),
        ("all trained (CLIP)", plan.full),
    )
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
        typer.echo(
            f"teacher: {_bytes(plan.teacher_bytes)} of features, computed once and read from "
            "the cache"
        )
    steps = f"{rows:,} images, {plan.n_steps:,} steps of {plan.batch_size:,} pairs"
    show_table(f"{plan.path}: {steps} on {_device(plan)}", columns, lines)


def _device(plan: Any) -> str:
    return f"{plan.device.name}, {plan.device.flops / 1e12:.3g} TFLOP/s ({plan.device.source})"


def _flops(cost: Any) -> tuple[str, ...]:
    return tuple(
        f"{flops / 1e12:.4g} TFLOP"
        for flops in (cost.once_flops, cost.step_flops, cost.total_flops)
    )


def _time(cost: Any) -> tuple[str, str]:
    return f"{cost.seconds:,.1f}", "no --price" if cost.money is None else f"{cost.money:,.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
