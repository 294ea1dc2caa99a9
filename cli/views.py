"""Commands on views: `apecache views`, `split`, `compact`, `add` and `delete`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .option_groups import ADVANCED, Device, ImageFeatures, Json, Root
from .terminal import choice, ending, progress, show_json, show_table

if TYPE_CHECKING:
    from apecache.store.views import ViewRecord

Store = Annotated[str, typer.Argument(help="A feature store: a folder, s3://…, gs://… or az://….")]


def views(
    action: Annotated[str, typer.Argument(help="list, name or remove.")],
    store: Store,
    view: Annotated[
        list[str] | None,
        typer.Argument(
            help="With remove: ids, numbers or names of views. With name: one view, then its name."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List, name or remove the views of a store.

    A view is a table that was extracted: each change of the table makes a new one. The newest is
    used unless --view names another. Features stay; compact frees those that no view needs.

    Example: apecache views list store
    """
    with ending():
        choice("ACTION", action, ("list", "name", "remove"))
        from apecache.errors import OptionError
        from apecache.store.manage import list_views, remove_views, rename_view

        if action == "list":
            if view:
                raise OptionError("views list takes no VIEW; leave it out")
            show_views(store, list_views(store), json)
            return
        if action == "name":
            if not view or len(view) != 2:
                raise OptionError(
                    "views name needs a VIEW and its new name: apecache views name STORE VIEW NAME"
                )
            named = rename_view(store, view[0], view[1])
            if json:
                show_json({"store": str(store), **describe_view(named)})
            else:
                typer.echo(f"{named.view}: {named.name}")
            return
        if not view:
            raise OptionError(
                f"views remove needs a VIEW; list them with: apecache views list {store}"
            )
        ids = remove_views(store, *view)
        if json:
            show_json({"store": str(store), "removed": ids})
        else:
            typer.echo(f"removed {', '.join(ids)}; free their features with: apecache compact")


def show_views(store: str, records: "list[ViewRecord]", json: bool) -> None:
    """Show views, the newest last."""
    if json:
        show_json({"store": store, "views": [describe_view(record) for record in records]})
        return
    if not records:
        typer.echo(f"{store} has one table; a change of it makes views")
        return
    rows = [
        (
            record.view,
            record.name,
            record.n_images,
            record.n_texts,
            len(record.blocks),
            ", ".join(record.columns),
            record.origin,
        )
        for record in records
    ]
    columns = ("view", "name", "images", "captions", "blocks", "further columns", "source")
    show_table("views", columns, rows)


def describe_view(record: "ViewRecord") -> dict[str, object]:
    """Return the JSON form of a view."""
    return {
        "view": record.view,
        "name": record.name,
        "parent": record.parent,
        "digest": record.digest,
        "n_images": record.n_images,
        "n_texts": record.n_texts,
        "blocks": [block.folder for block in record.blocks],
        "origin": record.origin,
        "root": record.root,
        "splits": record.splits,
        "columns": list(record.columns),
    }


def split(
    store: Store,
    fraction: Annotated[
        str,
        typer.Option(metavar="NAME=SHARE,…", help="Shares that add to 1: train=.9,val=.1."),
    ],
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="Keep together: content (equal files), key, label, or a column of the table.",
        ),
    ] = "content",
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="COSINE",
            help="Keep together also images whose features are this close, e.g. 0.95.",
        ),
    ] = None,
    image_features: ImageFeatures = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The table with the column of --by, if it is not where the store recorded it.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other splits.")] = 0,
    json: Json = False,
) -> None:
    """Divide the images of a store into splits.

    Equal files are always in one split. Nothing is encoded. Images that are added later are split
    by the same rule, and no other image moves; near duplicates among them are not looked for.

    Example: apecache split store --fraction train=.8,val=.1,test=.1
    """
    with ending():
        from apecache.data.splits import parse_fractions
        from apecache.store.reader import FeatureStore
        from apecache.store.view_edits import split_store

        FeatureStore.open(store)
        record = split_store(
            store,
            parse_fractions(fraction),
            by=by,
            seed=seed,
            near=near_duplicates,
            features=image_features,
            source=source,
        )
        split_counts = FeatureStore.open(store).pairs.split_counts()
        if json:
            show_json({"store": str(store), "view": record.view, "splits": split_counts})
        else:
            shown = ", ".join(f"{name} {count:,}" for name, count in split_counts.items())
            typer.echo(f"{store}: view {record.view}: {shown}")


def compact(store: Store, json: Json = False) -> None:
    """Free the features that no view of a store needs.

    Remove views first. Interrupt at any time; run the same command again to finish. Nobody else may
    write to the store meanwhile.

    Example: apecache compact store
    """
    with ending():
        from apecache.store.compact import compact_store
        from apecache.store.reader import FeatureStore

        FeatureStore.open(store)
        report = compact_store(store)
        if json:
            show_json({"store": str(store), **vars(report)})
        else:
            typer.echo(
                f"{store}: {counted(report.n_rows, 'row')} freed, {report.n_bytes / 1e6:,.1f} MB"
            )


def add(
    store: Store,
    images: Annotated[list[Path], typer.Argument(help="Image files below the root of the store.")],
    caption: Annotated[
        list[str] | None,
        typer.Option("--caption", metavar="TEXT", help="Caption of these images. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="Their split.")] = "",
    label: Annotated[str, typer.Option(metavar="LABEL", help="Their label.")] = "",
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME=VALUE",
            help="Their value of a further column of the store. Repeatable.",
        ),
    ] = None,
    root: Root = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Add images to a store: encode them with all encoders of the store.

    The newest view gets these rows at its end. Your own table does not change.

    Example: apecache add store images/new.jpg --caption "a dog in the snow"
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.extraction.additions import add_images
        from apecache.store.reader import FeatureStore

        values = assignments(column, "--column")
        if len(dict(values)) < len(values):
            raise OptionError("--column: one name has two values; give each name once")
        with progress() as update:
            reports = add_images(
                store,
                images,
                captions=caption or (),
                split=split,
                label=label,
                columns=dict(values),
                root=root,
                device=device,
                progress=update,
            )
        view = FeatureStore.open(store).view
        arrays = [array for report in reports for array in report.arrays]
        if json:
            view_id = view.record.view if view else None
            encoded = {f"{array.modality}/{array.name}": array.n_encoded for array in arrays}
            show_json({"store": str(store), "view": view_id, "encoded": encoded})
            return
        for array in arrays:
            rows = counted(array.n_encoded, "row")
            typer.echo(f"{array.modality}/{array.name}: {rows} encoded")


def delete(
    store: Store,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="KEY", help="Key of an image. Repeatable."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=VALUE",
            help="Images with this key, split, label or value of a further column. Repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Delete images, with their captions, from the newest view of a store.

    Their features stay until no view needs them and apecache compact frees them. Your own table
    does not change: extracting it again brings the rows back.

    Example: apecache delete store --where label=cat
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.extraction.additions import delete_images

        conditions = assignments(where, "--where")
        if not key and not conditions:
            raise OptionError("nothing to delete: give --key or --where")
        record = delete_images(store, key or (), conditions)
        if json:
            show_json({"store": str(store), **describe_view(record)})
        else:
            typer.echo(f"{store}: view {record.view} has {counted(record.n_images, 'image')}")


def assignments(texts: list[str] | None, option: str) -> list[tuple[str, str]]:
    """Parse values of an option like `color=red`.

    Raises:
        OptionError: A text has no `=`.
    """
    from apecache.errors import OptionError

    pairs: list[tuple[str, str]] = []
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator:
            raise OptionError(f"{option} {text}: expected COLUMN=VALUE")
        pairs.append((name, value))
    return pairs
