"""Export a run in one format: write, compare with the run, name the folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from apecache.arguments import AnyPath, as_path, require_spec
from apecache.encoders.spec import EncoderSpec
from apecache.errors import OptionError, nearest, require_new
from apecache.export.card import exported_card
from apecache.export.check import (
    HALF_TOLERANCE,
    INT8_TOLERANCE,
    TOLERANCE,
    ExportDifference,
    compare_exported,
)
from apecache.export.onnx_graph import GraphDtype
from apecache.runs.heads import load_heads
from apecache.runs.model_card import CARD
from apecache.storage.replace import new_folder, replace_text

ExportFormat = Literal[
    "sentence-transformers",
    "open_clip",
    "transformers",
    "onnx",
    "onnx-heads",
    "safetensors",
]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
HEAD_FORMATS = ("onnx-heads", "safetensors")
"""Formats that hold heads alone, so no encoder is opened."""
GRAPH_TOLERANCES: dict[GraphDtype, float] = {
    "float32": TOLERANCE,
    "float16": HALF_TOLERANCE,
    "int8": INT8_TOLERANCE,
}


@dataclass(frozen=True, kw_only=True)
class ExportRunSpec:
    """Set the format of an export and what goes on its card."""

    to: ExportFormat
    dtype: GraphDtype = "float32"
    """Of the weights; `onnx` only."""
    text_only: bool = False
    """Leave the image side out; `sentence-transformers` only."""
    license_name: str | None = None
    """License of the heads, as the hub names licenses."""
    evaluations: tuple[Path, ...] = ()
    """JSON files of `apecache evaluate --json`, for the card."""


@dataclass(frozen=True, kw_only=True)
class ExportRunReport:
    """Say what was written and how near it is to the run."""

    out: Path
    files: tuple[str, ...]
    """Names in the folder, sorted."""
    n_bytes: int
    difference: ExportDifference | None
    """Largest differences to the run's embeddings; None for heads alone."""


def export_run(
    run: AnyPath,
    out: AnyPath,
    spec: ExportRunSpec,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> ExportRunReport:
    """Write a run into a new folder for other programs.

    What other libraries open is opened by them and compared with the run before the folder gets
    its name.

    Args:
        run: folder of the run.
        out: folder, which must not exist or be empty.
        spec: format and card.
        image: image encoder at its new place, if it has moved.
        text: text encoder at its new place, if it has moved.

    Raises:
        OptionError: an unknown format, or an option that it does not have.
        RunError: not a finished run, or the format cannot hold its heads or encoders.
        EncoderError: an encoder cannot be loaded.
        MismatchError: it is not the one that the run was trained on.
        MissingExtraError: the library of the format is not installed.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    require_spec(spec, ExportRunSpec, "spec")
    _require_spec(spec)
    # Before the encoders are loaded: a folder that exists is an early error.
    require_new(out, "folder", remedy="give the name of a new folder")
    # An empty folder is replaced: its absolute name stays.
    final = out.absolute()
    with new_folder(final) as scratch:
        if spec.to in HEAD_FORMATS:
            difference = None
            _write_heads(run, scratch, spec)
        else:
            difference = _write_model(run, scratch, final, spec, image, text)
    paths = [path for path in final.rglob("*") if path.is_file()]
    return ExportRunReport(
        out=out,
        files=tuple(sorted(path.name for path in final.iterdir())),
        n_bytes=sum(path.stat().st_size for path in paths),
        difference=difference,
    )


def _require_spec(spec: ExportRunSpec) -> None:
    if spec.to not in FORMATS:
        raise OptionError(
            f"--to {spec.to}: expected one of {', '.join(FORMATS)}{nearest(spec.to, FORMATS)}"
        )
    if spec.dtype != "float32" and spec.to != "onnx":
        raise OptionError(f"--dtype has no effect on --to {spec.to}: leave it out")
    if spec.text_only and spec.to != "sentence-transformers":
        raise OptionError(f"--text-only has no effect on --to {spec.to}: leave it out")


def _write_heads(run: Path, scratch: Path, spec: ExportRunSpec) -> None:
    heads = load_heads(run)
    if spec.to == "safetensors":
        from apecache.export.weights import export_safetensors

        export_safetensors(heads, scratch)
    else:
        from apecache.export.onnx import export_onnx

        export_onnx(heads, scratch)
    card = exported_card(run, heads, spec.to, spec.license_name, spec.evaluations)
    replace_text(scratch / CARD, card)


def _write_model(
    run: Path,
    scratch: Path,
    final: Path,
    spec: ExportRunSpec,
    image: EncoderSpec | None,
    text: EncoderSpec | None,
) -> ExportDifference:
    """Write encoders and heads, and compare what the other library makes of them."""
    from apecache.export.quiet import quiet_libraries
    from apecache.export.whole_model import open_whole_model

    with quiet_libraries():
        model = open_whole_model(run, image=image, text=text)
        tolerance = TOLERANCE
        match spec.to:
            case "sentence-transformers":
                from apecache.export.sentence_transformers import (
                    open_sentence_transformers,
                    write_sentence_transformers,
                )

                write_sentence_transformers(model, scratch, spec.text_only)
                exported = open_sentence_transformers(scratch, spec.text_only)
            case "open_clip":
                from apecache.export.open_clip import open_open_clip, write_open_clip

                write_open_clip(model, scratch, scratch)
                exported = open_open_clip(scratch)
            case "transformers":
                from apecache.export.transformers import open_transformers, write_transformers

                write_transformers(model, scratch)
                exported = open_transformers(scratch)
            case _:
                from apecache.export.onnx_model import open_onnx_model, write_onnx_model

                write_onnx_model(model, scratch, spec.dtype)
                exported = open_onnx_model(scratch, model)
                tolerance = GRAPH_TOLERANCES[spec.dtype]
        # Before the folder gets its name: an export that differs is not left behind.
        difference = compare_exported(exported, model, tolerance)
    if spec.to == "open_clip":
        # open_clip's config names its own folder, which was a temporary one until here.
        from apecache.export.open_clip import retarget

        retarget(scratch, scratch, final)
    card = exported_card(run, model.run, spec.to, spec.license_name, spec.evaluations)
    replace_text(scratch / CARD, card)
    return difference
