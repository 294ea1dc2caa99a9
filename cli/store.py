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
    View,
    takes_groups,
)
from .source_options import SplitSourceOptions
from .terminal import complain, ending, printable, progress, show_json, show_table

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource
    from apecache.data.spec import OpenSpec
    from apecache.errors import ApecacheError
    from apecache.store.array import FeatureArray
    from apecache.store.reader import FeatureStore
    from apecache.store.verify import VerifyReport

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters that begin a formula in a spreadsheet."""
Store = Annotated[str, typer.Argument(help="A feature store: a folder, s3://…, gs://… or az://….")]


def info(
    store: Store,
    view: View = None,
    bad: Annotated[
        bool,
        typer.Option("--bad", help="List the rows that could not be encoded, and why."),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="With --bad: write the list as a CSV file."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the contents of a store: splits, features, encoders, views and progress.

    Example: apecache info store
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.store.reader import FeatureStore
        from apecache.store.views import view_ids

        if csv is not None and not bad:
            raise OptionError("--csv needs --bad")
        opened = FeatureStore.open(store, view)
        if bad:
            show_bad(opened, csv, json)
            return
        pairs = opened.pairs
        arrays = [describe(array) for array in opened.arrays()]
        totals = {
            "n_images": len(pairs.keys),
            "n_texts": len(pairs.captions),
            "splits": pairs.split_counts(),
            "columns": list(pairs.columns),
        }
        if json:
            origin = {
                "store": str(store),
                "origin": opened.source["origin"],
                "segments": 1 + len(opened.segments),
                "view": opened.view.record.view if opened.view else None,
                "views": view_ids(opened.files),
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
        if opened.view is not None:
            n_views = len(view_ids(opened.files))
            view_name = opened.view.record.view
            typer.echo(f"view {view_name} of {n_views}; all: apecache views list {store}")
        if pairs.columns:
            typer.echo(printable(f"further columns: {', '.join(pairs.columns)}"))
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


def show_bad(opened: "FeatureStore", csv: Path | None, json: bool) -> None:
    """Show the rows that could not be encoded, or write them to a CSV file."""
    rows: list[dict[str, Any]] = []
    for array in opened.arrays():
        for row in array.quarantined():
            rows.append({"modality": array.record.modality, "features": array.name, **row})
    names = ("modality", "features", "row", "key", "reason", "detail")
    if csv is not None:
        write_csv(csv, names, rows)
        typer.echo(f"{csv}: {counted(len(rows), 'row')}")
    elif json:
        show_json({"store": str(opened.path), "bad": rows})
    elif not rows:
        typer.echo(f"{opened.path}: every row was encoded")
    else:
        show_table("unreadable", names, [tuple(row[name] for name in names) for row in rows])


def write_csv(path: Path, names: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; a cell that a spreadsheet would run as a formula gets a quote before."""
    from csv import writer

    with path.open("w", encoding="utf-8", newline="") as file:
        table = writer(file)
        table.writerow(names)
        for row in rows:
            cells = [str(row[name]) for name in names]
            table.writerow([f"'{cell}" if cell[:1] in FORMULA else cell for cell in cells])


def info_row(array: dict[str, Any]) -> tuple[Any, ...]:
    """Return the table row of what `describe` returns."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(array["reasons"].items()))
    share_done = f"{array['done']:.0%}"
    # All shards are there, but the run ended before it sealed them.
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
    # The reasons are read from file to file, so only where there are any.
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

        # Opened before the encoders: a wrong source costs no time.
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

    from apecache.data.media import (
        FolderMedia,
        ObjectMedia,
        base_media,
        media_below,
        moved_media,
    )
    from apecache.data.sources import open_pairs
    from apecache.data.spec import recorded_options, spec_of_options
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
    # The recorded options hold; those that are given come before them.
    spec_given = recorded_options(spec)
    options = {**record.get("options", {}), **spec_given}
    spec = replace(spec_of_options(options), require=spec.require)
    source = open_pairs(record["origin"], spec)
    # Images in tars or in the table itself come with the source; only paths have a root.
    has_root = isinstance(base_media(source.media), FolderMedia | ObjectMedia)
    if "root" not in spec_given and has_root:
        base = media_below(record["root"], spec.allow_root)
        return replace(source, media=moved_media(source.media, base))
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
        from apecache.store.manage import remove_features

        report = remove_features(store, name)
        removed = f"{report.modality}/{report.name}"
        if json:
            total = {"objects": report.n_objects, "bytes": report.n_bytes}
            show_json({"store": str(store), "removed": removed, **total})
        else:
            typer.echo(
                f"removed {removed}: {report.n_objects} objects, {report.n_bytes / 1e6:,.1f} MB"
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
    view: View = None,
    json: Json = False,
) -> None:
    """Export the pairs and features of a view of a store as plain files.

    Give exactly one of --npz and --parquet.

    Example: apecache export store features.npz --npz
    """
    with ending():
        from apecache.errors import DataError, OptionError
        from apecache.store.export import export_npz, export_parquet
        from apecache.store.reader import FeatureStore

        if npz == parquet:
            raise OptionError("expected exactly one of --npz and --parquet")
        # An empty folder is taken: it may be a mount point.
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise DataError(f"{out} exists already and is not overwritten; give another path")
        export_files = export_npz if npz else export_parquet
        names = export_files(FeatureStore.open(store, view), out)
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

    The old store is not changed, and nothing is encoded: its table becomes the first view of the
    new store. A store that has views has the newest format.

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
