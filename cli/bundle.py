"""`apecache bundle`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .option_groups import Json, takes_groups
from .runs import MovedEncoders
from .terminal import ending, show_json


@takes_groups
def bundle(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    encoders: MovedEncoders,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="INDEX", help="An index of the run, to add."),
    ] = None,
    json: Json = False,
) -> None:
    """Copy a run, its encoders and an index into one folder, for another machine.

    Encoders that are folders or hub repositories are copied. Check that their licenses allow it.

    Example: apecache bundle run model --index index
    """
    with ending():
        from apecache.runs.bundle import write_bundle

        moved_image, moved_text = encoders.recorded_in(run)
        report = write_bundle(run, out, index=index, image=moved_image, text=moved_text)
        if json:
            show_json({**asdict(report), "out": str(out), "run": str(run)})
            return
        sides = ", ".join(f"{side} {name}" for side, name in report.encoders.items())
        typer.echo(f"{out}: {report.n_bytes / 1e6:.1f} MB; encoders: {sides}")
