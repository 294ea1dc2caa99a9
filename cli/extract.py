"""`apecache extract`."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .encoders import EncoderOptions, both_sides, view_spec
from .engine import ray_spec, results_only
from .memory import keep_freed_memory
from .option_groups import (
    ADVANCED,
    COSTS,
    SEVERAL_MACHINES,
    STORE_PANEL,
    Device,
    Json,
    MaxBad,
    OptionGroup,
    Ray,
    SingleWriter,
    Source,
    takes_groups,
)
from .source_options import SplitSourceOptions
from .terminal import choice, ending, printable, progress, show_json, show_table, warn

PRECISIONS = ("auto", "float32", "tf32", "float16", "bfloat16")

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apecache.cluster.pool import RaySpec
    from apecache.data.pairs import PairSource
    from apecache.data.spec import Role
    from apecache.extraction.estimate import ExtractPlan
    from apecache.extraction.report import ExtractReport
    from apecache.extraction.spec import ExtractSpec


@dataclass(frozen=True, kw_only=True)
class WriteOptions(OptionGroup):
    """Hold what the store gets, and how the work is done."""

    storage: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the stored features: float16, float32 or int8. int8 keeps a scale for "
            "each vector.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = "float16"
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME",
            help="Keep a further column of the table in the store, e.g. for split --by, delete "
            "--where and index --column; those that are named replace those of the newest view. "
            "Default: those of the newest view. Repeatable.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Add these features to a store that has features of another encoder.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = False
    recheck: Annotated[
        bool,
        typer.Option(
            "--recheck",
            help="Hash all images again. Default: only those whose size or time has changed.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = False
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Try rows again that could not be encoded before.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = False
    reuse: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Take features from another store where file or caption, and encoder, are equal.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Encode share I of N. Run the other shares as separate jobs, e.g. with Slurm.",
            rich_help_panel=SEVERAL_MACHINES,
        ),
    ] = None
    image_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per batch; part of the store's record. Default: 32, on CUDA 256.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    text_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Captions per batch at most; part of the store's record. Default: 64, on CUDA "
            "as many as --text-batch-tokens allows.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    text_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per batch of captions at most, padding included; part of the store's "
            "record. Default: no limit, on CUDA 16384 unless --text-batch is given.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows per commit. Default: about one minute of work.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Decoding processes; 0 decodes in threads. Default: one per core, and threads on "
            "two cores or fewer.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Run encoders with torch.compile; part of the store's record. Default: only "
            "image encoders, for long runs, if a measurement shows a gain.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Where JPEG files are decoded: cpu, or cuda, whose pixels differ; part of the "
            "store's record. cuda needs --resize torchvision. Default: cpu.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    max_bad: MaxBad = 0.01
    single_writer: SingleWriter = False


@takes_groups
def extract(
    pairs: Source,
    store: Annotated[
        str,
        typer.Option(
            metavar="STORE",
            help="Feature store to create or to resume: a folder, s3://…, gs://… or az://….",
        ),
    ],
    encoders: EncoderOptions,
    source_options: SplitSourceOptions,
    write: WriteOptions,
    ray: Ray = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show rows, bytes and time. Write nothing."),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="PRICE",
            help="Price of one hour of this machine, in any currency, for --dry-run.",
            rich_help_panel=COSTS,
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Encode images and captions once and store their features.

    Only what the store lacks is encoded: the source may be sorted, edited, cut or extended between
    two runs. Each image is encoded once, however many captions it has. Interrupt at any time; run
    the same command to resume.

    Example: apecache extract pairs.tsv --store store --image timm:vit_small_patch14_dinov2.lvd142m
    --text hf:sentence-transformers/all-MiniLM-L6-v2

    Example: apecache extract pairs.tsv --store store --model open_clip:ViT-B-32/laion2b_s34b_b79k
    """
    with ending():
        # Options and the source are checked before the imports of torch, which take seconds.
        choice("--precision", encoders.precision, PRECISIONS)
        choice("--storage", write.storage, ("float16", "float32", "int8"))
        if write.decode is not None:
            choice("--decode", write.decode, ("cpu", "cuda"))
        from apecache.data.sources import open_pairs

        cluster = ray_spec(ray)
        require_part(write.part)
        columns = tuple(write.column or ())
        source = open_pairs(pairs, replace(source_options.spec(*roles(encoders)), columns=columns))
        spec = extract_spec(encoders, write, device)
        if dry_run:
            show_plan(source, store=store, spec=spec, price_per_hour=price_per_hour, json=json)
            return
        # The bar is on standard error, so that --json leaves one object on standard output.
        with progress() as update, results_only(cluster):
            report = run_on(cluster)(source, store, spec, update)
        show_extracted(report, source, json)


def roles(encoders: EncoderOptions) -> "list[Role]":
    """Return what the source must have for these encoders."""
    required: list[Role] = []
    # A source without captions is enough for an image encoder, and the reverse.
    if both_sides(encoders.model, encoders.image):
        required.append("image")
    if both_sides(encoders.model, encoders.text):
        required.append("caption")
    return required


def require_part(part: str | None) -> None:
    """Check the value of `--part` before anything is loaded.

    Raises:
        OptionError: It is not I/N.
    """
    from apecache.extraction.shard_range import parse_part

    if part:
        parse_part(part)


def extract_spec(encoders: EncoderOptions, write: WriteOptions, device: str) -> "ExtractSpec":
    """Return the settings of an extraction."""
    images = encoders.images()
    texts = encoders.texts()
    views = None if encoders.views is None else view_spec(encoders.views)
    from apecache.extraction.run import ExtractSpec
    from apecache.extraction.shard_range import WHOLE, parse_part

    # Before the first batch, whose activations would otherwise be cleared page by page.
    keep_freed_memory()
    # `choice` has checked it; the type of the field is a Literal, which an option is not.
    storage_dtype: Any = write.storage
    decode: Any = write.decode
    precision: Any = None if encoders.precision == "auto" else encoders.precision
    return ExtractSpec(
        image=images,
        text=texts,
        image_batch=write.image_batch,
        text_batch=write.text_batch,
        text_batch_tokens=write.text_batch_tokens,
        decode=decode,
        shard_rows=write.shard_rows,
        storage_dtype=storage_dtype,
        workers=write.workers,
        max_bad=write.max_bad,
        device=device,
        add=write.add,
        recheck=write.recheck,
        retry=write.retry,
        reuse=write.reuse,
        single_writer=write.single_writer,
        views=views,
        compiled=write.compiled,
        precision=precision,
        part=parse_part(write.part) if write.part else WHOLE,
    )


def run_on(cluster: "RaySpec | None") -> "Callable[..., ExtractReport]":
    """Return `extract` for this machine, or for a Ray cluster."""
    # Ray is imported where it is asked for only.
    if cluster is None:
        from apecache.extraction.run import extract

        return extract
    # Only here: the cluster needs Ray, which is an extra.
    from apecache.cluster.extract import extract_on_ray

    return partial(extract_on_ray, cluster=cluster)


def show_plan(
    source: "PairSource",
    store: str,
    spec: "ExtractSpec",
    price_per_hour: float | None,
    json: bool,
) -> None:
    """Show the size and the time of an extraction; write nothing."""
    from apecache.extraction.estimate import plan_extraction

    plan = plan_extraction(source, store=store, spec=spec, price_per_hour=price_per_hour)
    if json:
        sums = {"n_bytes": plan.n_bytes, "seconds": plan.seconds, "fits": plan.fits}
        show_json(
            {
                **vars(plan),
                "arrays": [vars(array) for array in plan.arrays],
                **sums,
                "columns": described_columns(source, tuple(source.columns)),
                "skipped": dict(source.skipped),
            }
        )
        return
    show_fields(source, tuple(source.columns))
    show_plan_table(plan)


def described_columns(source: "PairSource", further: "Sequence[str]") -> dict[str, object]:
    """Return the JSON form of the columns of a source: of each role, further ones, and the rest."""
    unused = [name for name in source.fields.unused if name not in further]
    return {**source.fields.taken, "further": list(further), "unused": unused}


def show_fields(source: "PairSource", further: "Sequence[str]") -> None:
    """Show which column of the source has which role, and what was left out of it.

    Args:
        source: The source.
        further: Its columns that the view holds without a role.
    """
    unused = tuple(name for name in source.fields.unused if name not in further)
    typer.echo(printable(str(replace(source.fields, unused=unused))))
    if further:
        typer.echo(printable(f"further columns: {', '.join(further)}"))
    if source.skipped:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in source.skipped.items())
        typer.echo(printable(f"skipped: {skipped}"))


def show_plan_table(plan: "ExtractPlan") -> None:
    """Show the arrays of a planned extraction, then its time, price and space."""
    columns = ("modality", "features", "rows", "shape", "to encode", "MB")
    rows: list[tuple[object, ...]] = []
    for array in plan.arrays:
        shape = " x ".join(map(str, array.row_shape))
        megabytes = array.n_bytes / 1e6
        rows.append((array.modality, array.name, array.rows, shape, array.n_pending, megabytes))
    show_table(str(plan.store), columns, rows)
    duration = (
        f"about {plan.seconds:,.0f} s (images {plan.image_seconds:,.0f}, texts "
        f"{plan.text_seconds:,.0f})"
    )
    money = "" if plan.price is None else f", price {plan.price:,.2f}"
    free = "" if plan.free_bytes is None else f" of {plan.free_bytes / 1e6:,.1f} MB free"
    typer.echo(f"{duration}{money}; {plan.n_bytes / 1e6:,.1f} MB{free}; nothing written")
    if not plan.fits:
        warn("the disk has too little free space for these features")


def show_extracted(report: "ExtractReport", source: "PairSource", json: bool) -> None:
    """Show what an extraction did, which column has which role, and what was left out."""
    for array in report.arrays:
        for example in array.examples:
            warn(f"{array.modality} {example}")
        # Without further rows the examples above have named them all.
        if array.n_quarantined > len(array.examples):
            warn(
                f"{counted(array.n_quarantined, f'unreadable {array.modality} row')} in total; "
                "apecache info shows the reasons"
            )
        if array.n_truncated:
            warn(f"{counted(array.n_truncated, 'caption')} cut to the token limit of the encoder")
    if report.duplicates:
        warn(f"{counted(report.duplicates, 'image')} identical to an earlier image")
    if json:
        arrays = [vars(array) for array in report.arrays]
        show_json(
            {
                **vars(report),
                "arrays": arrays,
                "measured": [measured.to_json() for measured in report.measured],
                "nothing_to_do": report.nothing_to_do,
                "columns": described_columns(source, report.further_columns),
                "skipped": dict(source.skipped),
            }
        )
        return
    show_fields(source, report.further_columns)
    for measured in report.measured:
        typer.echo(
            f"{measured.model}: {measured.model.dtype}, worst 1 - cosine to float32 "
            f"{measured.error:.1e} on {counted(measured.n_rows, 'row')}"
        )
    if report.nothing_to_do:
        typer.echo(f"nothing to do: {standing(report)}")
    else:
        columns = ("modality", "features", "rows", "dim", "encoded now", "unreadable", "rows/s")
        rows: list[tuple[object, ...]] = []
        for array in report.arrays:
            rows.append(
                (
                    array.modality,
                    array.name,
                    array.rows,
                    array.dim,
                    array.n_encoded,
                    array.n_quarantined,
                    # An array that was complete took no time.
                    array.n_encoded / max(array.seconds, 1e-9),
                )
            )
        show_table(str(report.store), columns, rows)
        # One part of several is complete while the store is not.
        progress_of_store = "" if report.part.whole else f"; {standing(report)}"
        typer.echo(summary(report) + progress_of_store)


def standing(report: "ExtractReport") -> str:
    """Say how much of the store is complete."""
    if report.complete:
        return f"{report.store} is complete"
    return f"part {report.part} is complete; {report.share_done:.0%} of {report.store} is done"


def summary(report: "ExtractReport") -> str:
    """Sum up a run in one line. Arrays that are filled in one pass share its seconds."""
    rows = sum(a.n_encoded for a in report.arrays)
    size = sum(a.n_bytes for a in report.arrays)
    bad = sum(a.n_quarantined for a in report.arrays)
    return (
        f"{counted(rows, 'row')} encoded in {report.seconds:.1f} s, {size / 1e6:,.1f} MB; "
        f"{bad:,} unreadable"
    )
