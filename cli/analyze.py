"""`apecache analyze`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import Device, Json, takes_groups
from .runs import MovedEncoders
from .terminal import ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.evaluate.analysis import ShiftReport


@takes_groups
def analyze(
    run: Annotated[Path, typer.Argument(help="A finished run of fit-encoder.")],
    encoders: MovedEncoders,
    layernorm_shift: Annotated[
        bool,
        typer.Option(
            "--layernorm-shift",
            help="Measure how far each norm has moved from its pretrained weights.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the charts. Default: the run folder."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure what training has changed in the encoders.

    Shows a table and writes a chart for each tower.

    Example: apecache analyze run --layernorm-shift
    """
    with ending():
        from apecache.errors import OptionError

        if not layernorm_shift:
            raise OptionError("no analysis was chosen: give --layernorm-shift")
        from apecache.evaluate.analysis import layernorm_shift as measure
        from apecache.evaluate.analysis import write_charts
        from apecache.runs.load import load_run

        moved = encoders.recorded_in(run)
        reports = measure(load_run(run, device, *moved), device, *moved)
        charts = write_charts(reports, out or run)
        if json:
            sides = [asdict(report) for report in reports]
            show_json({"sides": sides, "charts": [str(path) for path in charts]})
            return
        for report in reports:
            _show(report)
        typer.echo("charts: " + ", ".join(str(path) for path in charts))


def _show(report: "ShiftReport") -> None:
    """Show one tower: a row for each norm."""
    rows: list[tuple[object, ...]] = []
    for norm in report.norms:
        rows.append((norm.norm, norm.depth, norm.l1_weight, norm.l1_bias))
    rows.append(("correlation with depth", "", report.correlation_weight, report.correlation_bias))
    show_table(
        f"{report.side} tower: L1 change of every norm",
        ("norm", "block", "weight", "bias"),
        rows,
    )
