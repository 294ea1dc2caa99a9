"""`apecache export-embeddings`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from apecache.errors import counted

from .labeled import show_left_out
from .option_groups import Device, Json, View, takes_groups
from .runs import MovedEncoders, opener
from .terminal import choice, ending, show_json

FORMATS = ("parquet", "clip-retrieval", "lance")


@takes_groups
def export_embeddings(
    run: Annotated[str, typer.Argument(help="A finished run: a folder, s3://…, gs://… or az://….")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    encoders: MovedEncoders,
    store: Annotated[str, typer.Option("--store", metavar="STORE", help="Store of the features.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="parquet, clip-retrieval or lance."),
    ] = "parquet",
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SPLIT", help="Only this split. Default: all."),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            "--root",
            metavar="FOLDER",
            help="Folder of the images, for runs whose image tower was trained.",
        ),
    ] = None,
    view: View = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Export embeddings with keys, captions, splits and labels, for vector databases.

    Example: apecache export-embeddings run vectors --store store
    """
    with ending():
        from apecache.export.embeddings import export_embeddings as export
        from apecache.runs.load import load_run
        from apecache.runs.remote import fetched_run
        from apecache.store.reader import FeatureStore

        choice("--to", to, FORMATS)
        with fetched_run(run) as folder:
            moved_image, moved_text = encoders.recorded_in(folder)
            loaded = load_run(folder, device=device, image=moved_image, text=moved_text)
            report = export(
                loaded,
                store=FeatureStore.open(store, view),
                out=out,
                to=to,  # type: ignore[arg-type]
                split=split,
                open_image=opener(root),
            )
        value = {**asdict(report), "run": run, "store": store, "out": str(out)}
        if json:
            show_json(value)
            return
        typer.echo(
            f"{out}: {counted(report.n_images, 'image')}, {counted(report.n_texts, 'text')}, "
            f"{report.dim} dimensions: {', '.join(report.files)}"
        )
        show_left_out(value["left_out"])
