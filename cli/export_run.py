"""`apecache export-run`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .option_groups import Json, MovedImage, MovedText
from .runs import moved_encoders
from .terminal import choice, ending, show_json

DTYPES = ("float32", "float16", "int8")
HUB = "Hugging Face hub"


def export_run(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="sentence-transformers, open_clip, transformers, onnx (encoders with heads), "
            "onnx-heads or safetensors (heads alone).",
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Weights of onnx: float32, float16 or int8."),
    ] = "float32",
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="Leave the image side of sentence-transformers out.",
        ),
    ] = False,
    license_name: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="License of the heads, for the model card: apache-2.0, mit, ….",
            rich_help_panel=HUB,
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSON of apecache evaluate --json, for the model card. Repeatable.",
            rich_help_panel=HUB,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Also upload the folder to this repository. Needs HF_TOKEN.",
            rich_help_panel=HUB,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Make a new repository private.", rich_help_panel=HUB),
    ] = False,
    image: MovedImage = None,
    text: MovedText = None,
    json: Json = False,
) -> None:
    """Export a run for other programs, with a model card.

    The folder is opened by the other library and compared with the run before it gets its name.

    Example: apecache export-run run model --to sentence-transformers

    Example: apecache export-run run model --to onnx --dtype int8
    """
    with ending():
        from apecache.export.export_run import FORMATS, ExportRunSpec
        from apecache.export.export_run import export_run as export

        choice("--to", to, FORMATS)
        choice("--dtype", dtype, DTYPES)
        if push_to_hub is not None:
            from apecache.export.hub import require_repository

            require_repository(push_to_hub)
        moved_image, moved_text = moved_encoders(run, image, text)
        spec = ExportRunSpec(
            to=to,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            text_only=text_only,
            license_name=license_name,
            evaluations=tuple(evaluation or ()),
        )
        report = export(run, out, spec=spec, image=moved_image, text=moved_text)
        url = None
        if push_to_hub is not None:
            from apecache.export.hub import push_to_hub as push

            url = push(out, push_to_hub, private=private)
        difference = None if report.difference is None else asdict(report.difference)
        if json:
            value = {
                "run": str(run),
                "out": str(out),
                "format": to,
                "wrote": list(report.files),
                "bytes": report.n_bytes,
                "difference": difference,
                "url": url,
            }
            show_json(value)
        else:
            typer.echo(f"{out}: {', '.join(report.files)}; {report.n_bytes / 1e6:.1f} MB")
            if report.difference is not None:
                typer.echo(f"largest difference to the run: {_shown(difference)}")
            if url is not None:
                typer.echo(f"uploaded to {url}")


def _shown(difference: dict[str, float | None] | None) -> str:
    """Return the differences of both sides as text."""
    sides = (difference or {}).items()
    return ", ".join(f"{side} {value:.1e}" for side, value in sides if value is not None)
