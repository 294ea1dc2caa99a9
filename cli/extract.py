"""`apecache extract`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import (
    SOURCE,
    CaptionColumn,
    ImageColumn,
    Root,
    Split,
    SplitFile,
    SplitFraction,
    SplitSeed,
    open_spec,
)
from .terminal import Device, Json, ending, progress, show_json, show_table, warn


def extract(
    pairs: Annotated[str, typer.Argument(help=SOURCE)],
    store: Annotated[Path, typer.Option(help="The feature store to make or to go on with.")],
    image: Annotated[
        str | None, typer.Option(help="Image encoder: timm:NAME, hf:ID (@REV), timm:/folder, hf:/folder.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text encoder: hf:ID (@REV) or hf:/folder.")] = None,
    root: Root = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    split: Split = None,
    split_file: SplitFile = None,
    split_fraction: SplitFraction = None,
    split_seed: SplitSeed = 0,
    image_pooling: Annotated[str, typer.Option(help="default (the encoder's own), cls or mean.")] = "default",
    text_pooling: Annotated[str, typer.Option(help="default (the encoder's own), cls or mean.")] = "default",
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Image side in pixels. Default: the encoder's own.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest caption in tokens. Default: the encoder's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Computation: float32, float16 or bfloat16.")] = "float32",
    storage: Annotated[str, typer.Option(help="Stored features: float16 or float32.")] = "float16",
    image_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per batch; recorded. Default: 32, on CUDA 256.")
    ] = None,
    text_batch: Annotated[
        int | None, typer.Option(min=1, help="Captions per batch; recorded. Default: 32, on CUDA 256.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows per commit. Default: about a minute's work.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable rows that is still a success.")
    ] = 0.01,
    add: Annotated[bool, typer.Option("--add", help="Keep these features beside those of another encoder.")] = False,
    append: Annotated[bool, typer.Option("--append", help="The table has grown at its end: encode that too.")] = False,
    recheck: Annotated[bool, typer.Option("--recheck", help="Read all inputs again and compare their hashes.")] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run the frozen encoders once over images and captions, into a feature store.

    One image is encoded once however many captions it has. Killed or interrupted, the same command goes on; run again
    when all is done, it says so and does nothing.

    Example: apecache extract pairs.tsv --store store --image timm:vit_small_patch14_dinov2.lvd142m
    --text hf:sentence-transformers/all-MiniLM-L6-v2
    """
    with ending():
        choice("--storage", storage, ("float16", "float32"))
        specs: list[Any] = []
        from apecache.data.sources import open_pairs

        required = (*(("image",) if image else ()), *(("caption",) if text else ()))
        splits = (split, split_file, split_fraction, split_seed)
        source = open_pairs(pairs, open_spec(required, image_column, caption_column, *splits, root))
        for name, modality, pooling in ((image, "image", image_pooling), (text, "text", text_pooling)):
            specs.append(encoder_spec(name, modality, pooling, resolution, max_tokens, dtype))
        from apecache.extraction import ExtractSpec
        from apecache.extraction import extract as run

        options: dict[str, Any] = {"image": specs[0], "text": specs[1], "storage_dtype": storage, "max_bad": max_bad}
        options |= {"image_batch": image_batch, "text_batch": text_batch, "shard_rows": shard_rows}
        options |= {"device": device, "add": add, "append": append, "recheck": recheck}
        options |= {"workers": workers} if workers else {}
        spec = ExtractSpec(**options)
        with progress() as update:
            report = run(source, store, spec, update)
        show_extracted(report, json)


def encoder_spec(
    name: str | None, modality: Any, pooling: str, resolution: int | None, max_tokens: int | None, dtype: str
) -> Any:
    """An EncoderSpec from command-line options, or None."""
    from dataclasses import replace

    from apecache.encoders.spec import parse_encoder

    choice(f"--{modality}-pooling", pooling, ("default", "cls", "mean"))
    choice("--dtype", dtype, ("float32", "float16", "bfloat16"))
    if name is None:
        return None
    settings: dict[str, Any] = {"pooling": pooling, "dtype": dtype}
    settings |= {"resolution": resolution} if modality == "image" else {"max_tokens": max_tokens}
    return replace(parse_encoder(name, modality), **settings)


def choice(option: str, value: str, known: tuple[str, ...]) -> None:
    from apecache.errors import OptionError, nearest

    if value not in known:
        raise OptionError(f"{option} {value}: expected one of {', '.join(known)}{nearest(value, known)}")


def show_extracted(report: Any, json: bool) -> None:
    for array in report.arrays:
        for example in array.examples:
            warn(f"{array.modality} {example}")
        if array.n_quarantined > len(array.examples):
            warn(f"{array.n_quarantined} {array.modality} rows are unreadable in all; apecache info names the reasons")
        if array.n_truncated:
            warn(f"{array.n_truncated} captions were longer than the encoder takes and were cut")
    if report.duplicates:
        warn(f"{report.duplicates} images are the same file, byte for byte, as an earlier one")
    if json:
        show_json({**vars(report), "arrays": [vars(a) for a in report.arrays], "nothing_to_do": report.nothing_to_do})
    elif report.nothing_to_do:
        typer.echo(f"nothing to do: {report.store} is complete")
    else:
        columns = ("modality", "features", "rows", "dim", "encoded now", "unreadable", "rows/s")
        rows = [
            (a.modality, a.name, a.rows, a.dim, a.n_encoded, a.n_quarantined, a.n_encoded / max(a.seconds, 1e-9))
            for a in report.arrays
        ]
        show_table(str(report.store), columns, rows)
