"""The sheet of `apecache plan --nodes`, and counts as people write them."""

import re
from typing import Any

import typer

from .terminal import show_table

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_count(text: str) -> int:
    """`400M`, `5B`, `1.5k` or plain digits. Raises BadParameter for anything else, and for less
    than one."""
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kKmMbBgG]?)", str(text))
    count = round(float(re.sub("[_,]", "", found[1])) * UNITS[found[2].upper()], 6) if found else 0
    if count < 1 or count != int(count):
        raise typer.BadParameter(
            f"{text!r} is no count; expected a whole number like 20000, 400M or 5B"
        )
    return int(count)


def show_cluster(plan: Any) -> None:
    """Two tables, where the features are in training, and the assumptions, one in a line."""
    cluster = f"{plan.nodes:,} x {plan.devices_per_node:,} {plan.device}"
    columns = (
        "features",
        "rows",
        "bytes a row",
        "data",
        "records",
        "rows a shard",
        "shards",
        "objects",
        "device hours",
    )
    lines = [
        (
            *(
                array.name,
                f"{array.rows:,}",
                f"{array.row_bytes:,}",
                size(array.n_bytes),
                size(array.record_bytes),
            ),
            *(f"{array.shard_rows:,}", f"{array.n_shards:,}", f"{array.n_objects:,}"),
            hours(array.device_seconds / 3600),
        )
        for array in plan.arrays
    ]
    show_table(
        f"{plan.recipe}: cache of {plan.rows:,} images, {plan.captions:,} captions each",
        columns,
        lines,
    )
    stages = [
        (
            "extract",
            plan.extraction,
            size(plan.source_bytes),
            size(plan.write_bytes),
            plan.n_writes,
        ),
        (plan.path, plan.training, size(plan.read_bytes), "heads", plan.n_reads),
    ]
    header = (
        "stage",
        "devices",
        "device hours",
        "hours",
        "cost",
        "reads",
        "writes",
        "objects read or written",
    )
    rows = [
        (name, f"{stage.n_devices:,}", *_costs(stage), read, written, f"{count:,}")
        for name, stage, read, written, count in stages
    ]
    show_table(
        f"{plan.recipe} on {cluster}: {plan.n_steps:,} steps of {plan.batch_size:,} images",
        header,
        rows,
    )
    typer.echo(f"in training: {plan.residence}")
    typer.echo("assumed:\n" + "\n".join(f"  - {assumption}" for assumption in plan.assumptions))


def _costs(stage: Any) -> tuple[str, str, str]:
    money = "no price" if stage.money is None else f"{stage.money:,.2f}"
    return hours(stage.device_hours), hours(stage.hours), money


def hours(count: float) -> str:
    return f"{count:,.0f}" if count >= 1000 else f"{count:.4g}"


def size(count: int | None) -> str:
    if count is None:
        return "not given"
    unit, name = next(
        (u, n)
        for u, n in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (1, "B"))
        if count >= u or u == 1
    )
    return f"{count / unit:,.4g} {name}"
