"""Commands on a store: `apecache info`, `verify`, `repair`, `remove`, `copy`, `export` and
`upgrade`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .inputs import SingleWriter, SourceOptions, takes_source
from .runs import MovedImage, MovedText
from .terminal import Device, Json, complain, ending, progress, show_json, show_table

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource
    from apecache.data.spec import OpenSpec
    from apecache.errors import ApecacheError
    from apecache.store.array import FeatureArray
    from apecache.store.verify import VerifyReport

Store = Annotated[str, typer.Argument(help="A feature store: a folder, or s3://…, gs://…, az://….")]


def info(store: Store, json: Json = False) -> None:
    """Show what is in a store: pairs and splits, features, by which encoder, how complete.

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
            "each",
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
    """Read and hash everything in a store, and list what is not as it was committed. Exit code 3 if
    anything is.

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
                    f"{damaged} objects are damaged; repair with: apecache repair {store}"
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
        show_table("not as it should be", ("kind", "object", "shard", "what"), rows)
    state = "sound" if report.sound else "damaged"
    typer.echo(
        f"{report.store}: {state}; {report.n_objects:,} objects, {report.n_bytes / 1e6:,.1f} "
        "MB read and hashed"
    )


@takes_source
def repair(
    opening: SourceOptions,
    store: Store,
    pairs: Annotated[
        str | None, typer.Option(help="The source. Default: where it was when extracted.")
    ] = None,
    image: MovedImage = None,
    text: MovedText = None,
    single_writer: SingleWriter = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make exactly what is damaged again: shards by encoding their rows, everything else from the
    records.

    A store remembers where its source was, not how it was opened: give the options that extract was
    given.

    Example: apecache repair store --pairs pairs.tsv
    """
    with ending():
        from apecache.encoders.spec import parse_encoder
        from apecache.extraction.repair import repair as run
        from apecache.extraction.run import ExtractSpec

        source = source_of(store, pairs, opening())
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
            typer.echo(f"{array}: encoded again: shards {', '.join(map(str, shards)) or 'none'}")
        for name in report.objects:
            typer.echo(f"written again: {name}")
        if report.nothing_to_do:
            typer.echo("nothing to do")
        show_problems(report.after)


def source_of(store: str, pairs: str | None, spec: "OpenSpec") -> "PairSource":
    """Open the source that was given, or the one that the store remembers.

    Args:
        store: The feature store.
        pairs: The source; None: the one that the store remembers, with its images where they were.
        spec: How to open the source; its `root` comes before the remembered one.

    Raises:
        StoreError: The store does not remember its source, and `pairs` is None.
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
            f"{store} does not remember its source; give it with --pairs SOURCE"
        ) from None
    source = open_pairs(record["origin"], spec)
    # Images in tars or in the table itself come with the source; only paths have a root.
    has_root = isinstance(source.media, FolderMedia | ObjectMedia)
    if spec.root is None and has_root:
        return replace(source, media=media_below(record["root"]))
    return source


def remove(
    store: Store,
    name: Annotated[
        str, typer.Argument(help="The features to remove: NAME, or image/NAME or text/NAME.")
    ],
    json: Json = False,
) -> None:
    """Remove one encoder's features from a store, data and records.

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
        str, typer.Argument(help="Where the copy is to be: a folder, or s3://…, gs://…, az://….")
    ],
    single_writer: SingleWriter = False,
    json: Json = False,
) -> None:
    """Copy a store and verify the copy: from object storage to a disk for many runs, or the other
    way.

    Interrupted, the same command goes on; run again later, it brings what is new.

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
    out: Annotated[Path, typer.Argument(help="The file (.npz) or folder (Parquet) to write.")],
    npz: Annotated[
        bool, typer.Option("--npz", help="One .npz file; needs nothing but NumPy to read.")
    ] = False,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="images.parquet and texts.parquet in a folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a store's pairs and features as plain files.

    Example: apecache export store features.npz --npz
    """
    with ending():
        from apecache.errors import DataError, OptionError
        from apecache.store.export import export_npz, export_parquet
        from apecache.store.reader import FeatureStore

        if npz == parquet:
            raise OptionError("give one of --npz and --parquet")
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise DataError(f"{out} exists already and is not overwritten; give another place")
        export_files = export_npz if npz else export_parquet
        names = export_files(FeatureStore.open(store), out)
        if json:
            show_json({"store": str(store), "out": str(out), "wrote": names})
        else:
            typer.echo(f"{out}: {', '.join(names)}")


def upgrade(
    store: Store,
    out: Annotated[str, typer.Option(help="The folder for the store in the newest format.")],
    json: Json = False,
) -> None:
    """Lift a store of an older format into a new one; the old one is left as it is. So far there is
    one format.

    Example: apecache upgrade store --out store-new
    """
    with ending():
        from apecache.store.upgrade import upgrade_store

        written = upgrade_store(store, out)
        if json:
            show_json({"store": str(store), "out": str(out), "written": written})
        else:
            typer.echo(
                f"{out} written" if written else f"nothing to do: {store} is of the newest format"
            )
