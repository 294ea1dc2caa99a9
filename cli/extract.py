"""`apecache extract` and `apecache info`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import Device, Json, ending, progress, show_json, show_table, warn


def extract(
    pairs: Annotated[
        Path, typer.Argument(help="TSV, CSV or JSONL with columns image, caption; split, lang, label if any.")
    ],
    store: Annotated[Path, typer.Option(help="The feature store to make or to go on with.")],
    image: Annotated[
        str | None, typer.Option(help="Image encoder: timm:NAME, hf:ID (@REV), timm:/folder, hf:/folder.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text encoder: hf:ID (@REV) or hf:/folder.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the image paths. Default: the table's own folder.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Name of the column that holds the split. Default: split.")] = None,
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
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run the frozen encoders once over a table of images and captions, into a feature store.

    One image is encoded once however many captions it has. Killed or interrupted, the same command goes on; run again
    when all is done, it says so and does nothing.

    Example: apecache extract pairs.tsv --store store --image timm:vit_small_patch14_dinov2.lvd142m
    --text hf:sentence-transformers/all-MiniLM-L6-v2
    """
    with ending():
        choice("--storage", storage, ("float16", "float32"))
        specs: list[Any] = []
        from apecache.data.tables import TableSpec, read_pairs

        required = ("image", *(("caption",) if text else ()))
        source = read_pairs(pairs, TableSpec(split=split, require=required))
        for name, modality, pooling in ((image, "image", image_pooling), (text, "text", text_pooling)):
            specs.append(encoder_spec(name, modality, pooling, resolution, max_tokens, dtype))
        from apecache.extraction import ExtractSpec
        from apecache.extraction import extract as run

        options: dict[str, Any] = {"image": specs[0], "text": specs[1], "storage_dtype": storage, "max_bad": max_bad}
        options |= {"image_batch": image_batch, "text_batch": text_batch, "shard_rows": shard_rows}
        options |= {"device": device, "add": add, **({"workers": workers} if workers else {})}
        spec = ExtractSpec(**options)
        with progress() as update:
            report = run(source, root or pairs.parent, store, spec, update)
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
        if array.n_truncated:
            warn(f"{array.n_truncated} captions were longer than the encoder takes and were cut")
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


def info(
    store: Annotated[Path, typer.Argument(help="A feature store.")],
    json: Json = False,
) -> None:
    """Show what is in a store: pairs and splits, features, by which encoder, how complete.

    Example: apecache info store
    """
    with ending():
        from apecache.store.reader import FeatureStore

        opened = FeatureStore.open(store)
        pairs, arrays = opened.pairs, [describe(array) for array in opened.arrays()]
        if json:
            counts = {"n_images": len(pairs.keys), "n_texts": len(pairs.captions), "splits": pairs.split_counts()}
            show_json({"store": str(store), "origin": opened.source["origin"], **counts, "arrays": arrays})
            return
        splits = ", ".join(f"{name or '(none)'} {count:,}" for name, count in pairs.split_counts().items())
        typer.echo(f"{store}: {len(pairs.keys):,} images, {len(pairs.captions):,} captions; images by split: {splits}")
        columns = ("modality", "features", "encoder", "rows", "dim", "dtype", "done", "unreadable", "MB")
        rows = [
            (
                a["modality"],
                a["name"],
                a["encoder"],
                a["rows"],
                a["dim"],
                a["dtype"],
                f"{a['done']:.0%}",
                a["quarantined"],
                a["mb"],
            )
            for a in arrays
        ]
        show_table("features", columns, rows)


def describe(array: Any) -> dict[str, Any]:
    record = array.record
    reasons: dict[str, int] = {}
    for row in array.quarantined() if array.n_quarantined else ():
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return {
        "modality": record.modality,
        "name": record.name,
        "encoder": str(record.spec),
        "rows": array.rows,
        "dim": array.dim,
        "dtype": str(array.dtype),
        "done": array.share_done,
        "complete": array.complete,
        "quarantined": array.n_quarantined,
        "reasons": reasons,
        "mb": array.rows * array.dim * array.dtype.itemsize / 1e6,
        "fingerprint": record.fingerprint.digest,
        "layout": vars(record.layout),
        "environment": record.environment,
    }
