"""The sheet of `apecache plan --nodes`, and counts as people write them."""

import re
from typing import TYPE_CHECKING

import typer

from .terminal import show_table

if TYPE_CHECKING:
    from apecache.plan.cluster_plan import ClusterPlan, Stage

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


def show_cluster(plan: "ClusterPlan") -> None:
    """Show the cache, the stages, where features are in training, and the assumptions."""
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
    lines = []
    for array in plan.arrays:
        lines.append(
            (
                array.name,
                f"{array.rows:,}",
                f"{array.row_bytes:,}",
                size(array.n_bytes),
                size(array.record_bytes),
                f"{array.shard_rows:,}",
                f"{array.n_shards:,}",
                f"{array.n_objects:,}",
                hours(array.device_seconds / 3600),
            )
        )
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
    rows = []
    for name, stage, read, written, n_objects in stages:
        costs = _costs(stage)
        rows.append((name, f"{stage.n_devices:,}", *costs, read, written, f"{n_objects:,}"))
    show_table(
        f"{plan.recipe} on {cluster}: {plan.n_steps:,} steps of {plan.batch_size:,} images",
        header,
        rows,
    )
    typer.echo(f"in training: {plan.residence}")
    assumptions = [f"  - {assumption}" for assumption in plan.assumptions]
    typer.echo("assumed:\n" + "\n".join(assumptions))


def _costs(stage: "Stage") -> tuple[str, str, str]:
    """Return device hours, hours and money."""
    money = "no price" if stage.money is None else f"{stage.money:,.2f}"
    return hours(stage.device_hours), hours(stage.hours), money


def hours(count: float) -> str:
    """Format hours."""
    return f"{count:,.0f}" if count >= 1000 else f"{count:.4g}"


def size(count: int | None) -> str:
    """Format bytes in the largest unit that they fill."""
    if count is None:
        return "not given"
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:,.4g} {name}"
    # Divided by 1 as by any unit, so that the number is formatted as a float.
    return f"{count / 1:,.4g} B"
