"""Define the commands on a store, from `apecache info` to `apecache upgrade`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .option_groups import (
    Device,
    Json,
    MovedImage,
    MovedText,
    SingleWriter,
    SplitSourceOptions,
    takes_groups,
)
from .terminal import complain, ending, progress, show_json, show_table

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource
    from apecache.data.spec import OpenSpec
    from apecache.errors import ApecacheError
    from apecache.store.array import FeatureArray
    from apecache.store.verify import VerifyReport

Store = Annotated[str, typer.Argument(help="A feature store: a folder, s3://…, gs://… or az://….")]


def info(store: Store, json: Json = False) -> None:
    """Show the contents of a store: splits, features, encoders and progress.

    Example: apecache info store
    """
    with ending():
        from apecache.store.reader import FeatureStore

        opened = FeatureStore.open(store)
        pairs = opened.pairs
        arrays = [describe(array) for array in opened.arrays()]
        totals = {
            "n_images": len(pairs.keys),
            "n_texts": len(pairs.captions),
            "splits": pairs.split_counts(),
        }
        if json:
            origin = {
                "store": str(store),
                "origin": opened.source["origin"],
                "segments": 1 + len(opened.segments),
            }
            show_json({**origin, **totals, "arrays": arrays})
            return
        splits = ", ".join(
            f"{name or '(none)'} {count:,}" for name, count in pairs.split_counts().items()
        )
        typer.echo(
            f"{store}: {counted(len(pairs.keys), 'image')}, "
            f"{counted(len(pairs.captions), 'caption')}; images "
            f"by split: {splits}"
        )
        columns = (
            "modality",
            "features",
            "encoder",
            "rows",
            "row shape",
            "dtype",
            "done",
            "unreadable",
            "MB",
        )
        show_table("features", columns, map(info_row, arrays))


def info_row(array: dict[str, Any]) -> tuple[Any, ...]:
    """Return the table row of what `describe` returns."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(array["reasons"].items()))
    share_done = f"{array['done']:.0%}"
    if array["done"] >= 1 and not array["complete"]:
        share_done = "100%, not sealed"
    row_shape = " x ".join(map(str, array["row_shape"]))
    if array["ragged"]:
        row_shape += " at most"
    return (
        array["modality"],
        array["name"],
        array["encoder"],
        array["rows"],
        row_shape,
        array["dtype"],
        share_done,
        reasons or "0",
        array["mb"],
    )


def describe(array: "FeatureArray") -> dict[str, Any]:
    """Return the JSON form of an array."""
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
        "row_shape": list(array.row_shape),
        "ragged": record.layout.ragged,
        "dtype": record.layout.dtype,
        "done": array.share_done,
        "complete": array.complete,
        "quarantined": array.n_quarantined,
        "reasons": reasons,
        "mb": array.rows * array.row_bytes / 1e6,
        "fingerprint": record.fingerprint.digest,
        "layout": vars(record.layout),
        "environment": record.environment,
    }


def verify(store: Store, json: Json = False) -> None:
    """Check every file of a store against its recorded hash.

    Lists all damaged, missing and unknown files. The exit code is 3 if anything is
    damaged or missing.

    Example: apecache verify store
    """
    with ending():
        from apecache.errors import DamagedError
        from apecache.store.verify import verify_store

        report = verify_store(store)
        damaged = sum(problem.harmful for problem in report.problems)
        if json:
            problems = [vars(problem) for problem in report.problems]
            show_json({**vars(report), "problems": problems, "sound": report.sound})
        else:
            show_problems(report)
        if damaged:
            # After the report: the error sets the exit code.
            complain_or_raise(
                DamagedError(
                    f"{counted(damaged, 'object')} damaged; repair with: apecache repair {store}"
                ),
                json,
            )


def complain_or_raise(error: "ApecacheError", json: bool) -> None:
    """Raise an error; with --json, whose answer has been given, only exit with its code."""
    if not json:
        raise error
    complain(str(error))
    raise typer.Exit(error.exit_code)


def show_problems(report: "VerifyReport") -> None:
    """Show what is damaged, missing or left over in a store, and whether it is sound."""
    if report.problems:
        rows: list[tuple[object, ...]] = []
        for problem in report.problems:
            shard = "" if problem.shard is None else problem.shard
            rows.append((problem.kind, problem.object, shard, problem.detail))
        show_table("problems", ("kind", "object", "shard", "detail"), rows)
    state = "sound" if report.sound else "damaged"
    typer.echo(
        f"{report.store}: {state}; {report.n_objects:,} objects, {report.n_bytes / 1e6:,.1f} "
        "MB read and hashed"
    )


@takes_groups
def repair(
    store: Store,
    source_options: SplitSourceOptions,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Source of images and captions. Default: its location at extraction.",
        ),
    ] = None,
    image: MovedImage = None,
    text: MovedText = None,
    single_writer: SingleWriter = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Repair the damaged parts of a store.

    Damaged shards are encoded again. Other files are rebuilt from the records. Give the same source
    options as for extract: the store does not record them.

    Example: apecache repair store --pairs pairs.tsv
    """
    with ending():
        from apecache.encoders.spec import parse_encoder
        from apecache.extraction.repair import repair as run
        from apecache.extraction.run import ExtractSpec

        source = source_of(store, pairs, source_options.spec())
        moved_image = parse_encoder(image, "image") if image else None
        moved_text = parse_encoder(text, "text") if text else None
        with progress() as update:
            spec = ExtractSpec(moved_image, moved_text, device=device, single_writer=single_writer)
            report = run(store, source=source, spec=spec, progress=update)
        if json:
            shown = {
                "shards": report.shards,
                "objects": report.objects,
                "sound": report.after.sound,
            }
            show_json({"store": str(store), **shown, "nothing_to_do": report.nothing_to_do})
            return
        for array, shards in report.shards.items():
            typer.echo(f"{array}: shards encoded again: {', '.join(map(str, shards)) or 'none'}")
        for name in report.objects:
            typer.echo(f"file written again: {name}")
        if report.nothing_to_do:
            typer.echo("nothing to do")
        show_problems(report.after)


def source_of(store: str, pairs: str | None, spec: "OpenSpec") -> "PairSource":
    """Open the source that was given, or the one that the store has recorded.

    Args:
        store: The feature store.
        pairs: The source; None: the one that the store has recorded.
        spec: How to open the source; its `root` replaces the recorded one.

    Raises:
        StoreError: The store has no readable record of its source, and `pairs` is None.
    """
    from dataclasses import replace

    from apecache.data.media import FolderMedia, ObjectMedia, media_below
    from apecache.data.sources import open_pairs
    from apecache.errors import DamagedError, StoreError
    from apecache.storage.open import open_files
    from apecache.store.layout import SOURCE
    from apecache.store.maintenance import require_store
    from apecache.store.records import read_record

    files = open_files(store)
    require_store(files)
    if pairs is not None:
        return open_pairs(pairs, spec)
    try:
        record = read_record(files, SOURCE)
    except DamagedError:
        raise StoreError(
            f"{store} has no readable record of its source; give it with --pairs SOURCE"
        ) from None
    source = open_pairs(record["origin"], spec)
    # Images in tars or in the table itself come with the source; only paths have a root.
    has_root = isinstance(source.media, FolderMedia | ObjectMedia)
    if spec.root is None and has_root:
        return replace(source, media=media_below(record["root"]))
    return source


def remove(
    store: Store,
    name: Annotated[str, typer.Argument(help="Features to remove: NAME, image/NAME or text/NAME.")],
    json: Json = False,
) -> None:
    """Remove the features of one encoder from a store.

    Example: apecache remove store minilm-l6
    """
    with ending():
        from apecache.storage.open import open_files
        from apecache.store.maintenance import find_array, remove_array
        from apecache.store.verify import begun_segments

        files = open_files(store)
        modality, array_name = find_array(files, name)
        # The store itself last: while the array is there, a removal that was interrupted can be
        # repeated.
        total = {"objects": 0, "bytes": 0}
        for folder in (*begun_segments(files), ""):
            removed = remove_array(files.child(folder), modality, array_name)
            total["objects"] += removed["objects"]
            total["bytes"] += removed["bytes"]
        if json:
            show_json({"store": str(store), "removed": f"{modality}/{array_name}", **total})
        else:
            typer.echo(
                f"removed {modality}/{array_name}: {total['objects']} objects, "
                f"{total['bytes'] / 1e6:,.1f} MB"
            )


def copy(
    store: Store,
    to: Annotated[
        str, typer.Argument(help="Location of the copy: a folder, s3://…, gs://… or az://….")
    ],
    single_writer: SingleWriter = False,
    json: Json = False,
) -> None:
    """Copy a store and verify the copy, e.g. from object storage to a local disk.

    Interrupt at any time; run the same command to resume. Run it again later to copy what is new.

    Example: apecache copy s3://bucket/store store
    """
    with ending():
        from apecache.store.copy import copy_store

        report = copy_store(store, to, single_writer)
        if json:
            problems = [vars(problem) for problem in report.problems]
            show_json({**vars(report), "problems": problems, "sound": report.sound})
        else:
            show_problems(report)


def export(
    store: Store,
    out: Annotated[Path, typer.Argument(help="File (.npz) or folder (Parquet) to create.")],
    npz: Annotated[
        bool, typer.Option("--npz", help="Write one .npz file. NumPy alone can read it.")
    ] = False,
    parquet: Annotated[
        bool,
        typer.Option("--parquet", help="Write images.parquet and texts.parquet."),
    ] = False,
    json: Json = False,
) -> None:
    """Export the pairs and features of a store as plain files.

    Give exactly one of --npz and --parquet.

    Example: apecache export store features.npz --npz
    """
    with ending():
        from apecache.errors import DataError, OptionError
        from apecache.store.export import export_npz, export_parquet
        from apecache.store.reader import FeatureStore

        if npz == parquet:
            raise OptionError("expected exactly one of --npz and --parquet")
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise DataError(f"{out} exists already and is not overwritten; give another path")
        export_files = export_npz if npz else export_parquet
        names = export_files(FeatureStore.open(store), out)
        if json:
            show_json({"store": str(store), "out": str(out), "wrote": names})
        else:
            typer.echo(f"{out}: {', '.join(names)}")


def upgrade(
    store: Store,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder for the store in the newest format.")
    ],
    json: Json = False,
) -> None:
    """Write a store of an older format as a new store in the newest format.

    The old store is not changed. There is only one format so far.

    Example: apecache upgrade store --out store-new
    """
    with ending():
        from apecache.store.upgrade import upgrade_store

        written = upgrade_store(store, out)
        if json:
            show_json({"store": str(store), "out": str(out), "written": written})
        else:
            typer.echo(
                f"{out} written" if written else f"nothing to do: {store} has the newest format"
            )
