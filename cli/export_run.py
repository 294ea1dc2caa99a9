"""`apecache export-run`."""

from pathlib import Path
from typing import Annotated

import typer

from .option_groups import Json, MovedText
from .runs import moved_encoders
from .terminal import ending, show_json


def export_run(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write both heads as ONNX files.")] = False,
    safetensors: Annotated[
        bool,
        typer.Option(
            "--safetensors",
            help="Write both heads as tensors, with a JSON description.",
        ),
    ] = False,
    sentence_transformers: Annotated[
        bool,
        typer.Option(
            "--sentence-transformers",
            help="Write the text encoder and its head as one model.",
        ),
    ] = False,
    text: MovedText = None,
    json: Json = False,
) -> None:
    """Export the heads of a run for other programs.

    Give exactly one of --onnx, --safetensors and --sentence-transformers.

    Example: apecache export-run run heads --onnx
    """
    with ending():
        from apecache.errors import OptionError, require_new
        from apecache.runs.heads import load_heads
        from apecache.storage.replace import undone_on_error

        if onnx + safetensors + sentence_transformers != 1:
            raise OptionError(
                "expected exactly one of --onnx, --safetensors and --sentence-transformers"
            )
        require_new(out, "folder")
        heads = load_heads(run)
        # Half a folder would be refused as an existing one by the next call.
        with undone_on_error(out):
            if onnx:
                from apecache.export.onnx import export_onnx

                names = export_onnx(heads, out)
            elif safetensors:
                from apecache.export.weights import export_safetensors

                names = export_safetensors(heads, out)
            else:
                from apecache.export.sentence_transformers import export_sentence_transformers

                names = export_sentence_transformers(heads, out, moved_encoders(run, None, text)[1])
        if json:
            show_json({"run": str(run), "out": str(out), "wrote": names})
        else:
            typer.echo(f"{out}: {', '.join(names)}")
