"""`apecache extract`."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .engine import Address, Engine, RayActors, RayCpus, RayGpus, ray_spec, results_only
from .inputs import SOURCE, SingleWriter, SourceOptions, takes_source
from .memory import keep_freed_memory
from .terminal import Device, Json, choice, ending, printable, progress, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.cluster.pool import RaySpec
    from apecache.data.augment import Views
    from apecache.data.pairs import PairSource, SourceFields
    from apecache.data.spec import Role
    from apecache.encoders.spec import EncoderSpec
    from apecache.extraction.report import ExtractReport
    from apecache.extraction.spec import ExtractSpec
    from apecache.fingerprint import Modality

CUT = (
    "default (the encoder's own), cls, mean, max, cls+mean or tokens, for texts also last; with "
    "@LAYER after so many blocks."
)


@takes_source
def extract(
    opening: SourceOptions,
    pairs: Annotated[str, typer.Argument(help=SOURCE)],
    store: Annotated[
        str,
        typer.Option(
            help="The feature store to make or to go on with: a folder, or s3://…, gs://…, az://…."
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Image encoder: timm:NAME, hf:ID, open_clip:NAME/TAG, or LIBRARY:/folder. May be "
                "repeated."
            )
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Text encoder: hf:ID, st:ID, open_clip:NAME/TAG, or LIBRARY:/folder. May be "
                "repeated."
            )
        ),
    ] = None,
    image_cut: Annotated[
        list[str] | None, typer.Option(help=f"{CUT} Repeat for several in one pass.")
    ] = None,
    text_cut: Annotated[list[str] | None, typer.Option(help="As --image-cut, for texts.")] = None,
    text_prefix: Annotated[
        str | None,
        typer.Option(help="Put before every caption. Default: what the encoder asks for."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Encode so many augmented views in place of each image."),
    ] = None,
    view_scale: Annotated[
        str, typer.Option(help="Smallest and largest crop of a view, share of the area.")
    ] = "0.2,1",
    view_seed: Annotated[int, typer.Option(help="Seed of the views.")] = 0,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Image side in pixels. Default: the encoder's own.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Longest caption in tokens. Default: the encoder's own."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Computation: float32, float16 or bfloat16.")
    ] = "float32",
    storage: Annotated[
        str,
        typer.Option(
            help="Stored features: float16, float32, or int8 with a scale for each vector."
        ),
    ] = "float16",
    image_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images per batch; recorded. Default: 32, on CUDA 256."),
    ] = None,
    text_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Captions per batch; recorded. Default: 64, on CUDA 256."),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows per commit. Default: about a minute's work.")
    ] = None,
    resize: Annotated[
        str,
        typer.Option(
            help="reference (the encoder's own) or torchvision: faster, other in the last bits."
        ),
    ] = "reference",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Decoding processes; 0 is threads. Default: one a core; on two, threads.",
        ),
    ] = None,
    hang_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="A decoding process that takes longer for one image is replaced.",
        ),
    ] = 30.0,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help=(
                "Image encoders by torch.compile; recorded. Default: if it is measured to pay in "
                "ten minutes or more."
            ),
        ),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable rows that is still a success.")
    ] = 0.01,
    add: Annotated[
        bool, typer.Option("--add", help="Keep these features beside those of another encoder.")
    ] = False,
    append: Annotated[
        bool, typer.Option("--append", help="The table has grown at its end: encode that too.")
    ] = False,
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Read all inputs again and compare their hashes.")
    ] = False,
    single_writer: SingleWriter = False,
    part: Annotated[
        str | None,
        typer.Option(
            help=(
                "i/n: encode the i-th of n shares of the shards, beside others who do the rest "
                "(Slurm)."
            )
        ),
    ] = None,
    engine: Engine = "local",
    address: Address = None,
    ray_actors: RayActors = None,
    ray_cpus: RayCpus = None,
    ray_gpus: RayGpus = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what it would take in bytes, time and money; write nothing.",
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of the machine, in any currency; for --dry-run.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run the frozen encoders once over images and captions, into a feature store.

    One image is encoded once however many captions it has. Killed or interrupted, the same command
    goes on; run again when all is done, it says so and does nothing.

    Example: apecache extract pairs.tsv --store store --image timm:vit_small_patch14_dinov2.lvd142m
    --text hf:sentence-transformers/all-MiniLM-L6-v2
    """
    with ending():
        # Options and the source are checked before the imports of torch, which take seconds.
        choice("--storage", storage, ("float16", "float32", "int8"))
        from apecache.extraction.shard_range import WHOLE, parse_part

        shard_range = parse_part(part) if part else WHOLE
        cluster = ray_spec(engine, address=address, actors=ray_actors, cpus=ray_cpus, gpus=ray_gpus)
        from apecache.data.sources import open_pairs

        required: list[Role] = []
        if image:
            required.append("image")
        if text:
            required.append("caption")
        source = open_pairs(pairs, opening(*required))
        choice("--resize", resize, ("reference", "torchvision"))
        images = encoder_specs(
            image,
            modality="image",
            cuts=image_cut,
            dtype=dtype,
            resolution=resolution,
            resize=resize,
        )
        texts = encoder_specs(
            text,
            modality="text",
            cuts=text_cut,
            dtype=dtype,
            max_tokens=max_tokens,
            prefix=text_prefix,
        )
        from apecache.extraction.run import ExtractSpec

        keep_freed_memory()

        options: dict[str, Any] = {
            "image": images,
            "text": texts,
            "storage_dtype": storage,
            "max_bad": max_bad,
        }
        options |= {"image_batch": image_batch, "text_batch": text_batch, "shard_rows": shard_rows}
        options |= {
            "device": device,
            "add": add,
            "append": append,
            "recheck": recheck,
            "compiled": compiled,
        }
        options |= {"single_writer": single_writer}
        options |= {"part": shard_range, "hang_seconds": hang_seconds, "workers": workers}
        options |= {"views": view_spec(views, view_scale, view_seed)} if views else {}
        spec = ExtractSpec(**options)
        if dry_run:
            show_plan(source, store=store, spec=spec, price_per_hour=price_per_hour, json=json)
            return
        # The bar is on standard error, so that --json leaves one object on standard output.
        with progress() as update, results_only(cluster):
            report = run_on(cluster)(source, store, spec, update)
        show_extracted(report, source.fields, json)


def run_on(cluster: "RaySpec | None") -> Any:
    """Return `extract` of the local engine, or of a Ray cluster."""
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
    """Show what an extraction would take; nothing is written."""
    from apecache.extraction.estimate import plan_extraction

    plan = plan_extraction(source, store=store, spec=spec, price_per_hour=price_per_hour)
    if json:
        sums = {"n_bytes": plan.n_bytes, "seconds": plan.seconds, "fits": plan.fits}
        columns_of_roles = {**source.fields.taken, "unused": list(source.fields.unused)}
        show_json(
            {
                **vars(plan),
                "arrays": [vars(array) for array in plan.arrays],
                **sums,
                "columns": columns_of_roles,
            }
        )
        return
    typer.echo(printable(str(source.fields)))
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
        warn("the disk is too small")


def encoder_specs(
    names: list[str] | None,
    modality: "Modality",
    cuts: list[str] | None,
    dtype: Any,
    **settings: Any,
) -> "tuple[EncoderSpec, ...]":
    """Parse encoder options: every cut of every encoder.

    Args:
        names: The encoders, as `--image` or `--text` takes them.
        modality: The side of all encoders.
        cuts: The poolings, as `--image-cut` takes them; None: the encoder's own.
        dtype: The type of the computation; checked here.
        settings: Other fields of `EncoderSpec`, the same for all encoders.

    Raises:
        OptionError: An unknown `dtype`, or a cut that cannot be parsed.
        EncoderError: A name that cannot be parsed.
    """
    from dataclasses import replace

    from apecache.encoders.spec import parse_cut, parse_encoder

    choice("--dtype", dtype, ("float32", "float16", "bfloat16"))
    parsed_cuts = [parse_cut(cut) for cut in cuts or ["default"]]
    specs = [parse_encoder(name, modality) for name in names or ()]
    return tuple(
        replace(spec, pooling=pooling, layer=layer, dtype=dtype, **settings)
        for spec in specs
        for pooling, layer in parsed_cuts
    )


def view_spec(count: int, scale: str, seed: int) -> "Views":
    """Parse the options of augmented views.

    Raises:
        OptionError: `scale` is not two shares of the area in ascending order.
    """
    from apecache.data.augment import Views
    from apecache.errors import OptionError

    try:
        low, high = (float(share) for share in scale.split(","))
        if not 0 < low <= high <= 1:
            raise ValueError
    except ValueError:
        raise OptionError(
            f"--view-scale {scale}: expected two shares of the area like 0.2,1"
        ) from None
    return Views(count, seed, (low, high))


def show_extracted(report: "ExtractReport", fields: "SourceFields", json: bool) -> None:
    """Show what an extraction did, and which column of the source has which role."""
    for array in report.arrays:
        for example in array.examples:
            warn(f"{array.modality} {example}")
        if array.n_quarantined > len(array.examples):
            warn(
                f"in all, {counted(array.n_quarantined, f'unreadable {array.modality} row')}; "
                "apecache info names the reasons"
            )
        if array.n_truncated:
            warn(
                f"cut: {counted(array.n_truncated, 'caption')} of more tokens than the encoder "
                "takes"
            )
    if report.duplicates:
        warn(f"{counted(report.duplicates, 'image')} with the bytes of an earlier one")
    if json:
        arrays = [vars(array) for array in report.arrays]
        columns_of_roles = {**fields.taken, "unused": list(fields.unused)}
        show_json(
            {
                **vars(report),
                "arrays": arrays,
                "nothing_to_do": report.nothing_to_do,
                "columns": columns_of_roles,
            }
        )
        return
    typer.echo(printable(str(fields)))
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
        progress_of_store = "" if report.part.whole else f"; {standing(report)}"
        typer.echo(summary(report) + progress_of_store)


def standing(report: "ExtractReport") -> str:
    """Say how far the store is."""
    if report.complete:
        return f"{report.store} is complete"
    return f"part {report.part} is done, {report.share_done:.0%} of {report.store} is"


def summary(report: "ExtractReport") -> str:
    """Sum up a run in one line. Arrays that are filled in one pass share its seconds."""
    rows = sum(a.n_encoded for a in report.arrays)
    size = sum(a.n_bytes for a in report.arrays)
    bad = sum(a.n_quarantined for a in report.arrays)
    return (
        f"{counted(rows, 'row')} encoded in {report.seconds:.1f} s, {size / 1e6:,.1f} MB; "
        f"{bad:,} unreadable"
    )
