"""Commands on the views of a store: `apecache views`, `split`, `compact` and `delete`."""

from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .option_groups import Json
from .terminal import choice, ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.store.views import ViewRecord

Store = Annotated[str, typer.Argument(help="A feature store: a folder, s3://…, gs://… or az://….")]


def views(
    action: Annotated[str, typer.Argument(help="list or remove.")],
    store: Store,
    view: Annotated[
        list[str] | None,
        typer.Argument(help="With remove: ids or numbers of views."),
    ] = None,
    json: Json = False,
) -> None:
    """List or remove the views of a store.

    A view is a table that was extracted: each change of the table makes a new one. The newest is
    used unless --view names another. Features stay; compact frees those that no view needs.

    Example: apecache views list store
    """
    with ending():
        choice("ACTION", action, ("list", "remove"))
        from apecache.errors import OptionError, StoreError
        from apecache.storage.open import open_files
        from apecache.store.reader import FeatureStore
        from apecache.store.views import find_view, read_view_record, remove_view, view_ids

        FeatureStore.open(store)
        files = open_files(store)
        if action == "list":
            if view:
                raise OptionError("views list takes no VIEW; leave it out")
            records = [read_view_record(files, view_id) for view_id in view_ids(files)]
            show_views(store, records, json)
            return
        if not view:
            raise OptionError("views remove needs a VIEW; list them with: apecache views list")
        ids = [find_view(files, name) for name in view]
        if view_ids(files)[-1] in ids:
            raise StoreError(
                f"{view_ids(files)[-1]} is the newest view, which is in use; extract another table "
                "first"
            )
        for view_id in ids:
            remove_view(files, view_id)
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
        (record.view, record.n_images, record.n_texts, len(record.blocks), record.origin)
        for record in records
    ]
    show_table("views", ("view", "images", "captions", "blocks", "source"), rows)


def describe_view(record: "ViewRecord") -> dict[str, object]:
    """Return the JSON form of a view."""
    return {
        "view": record.view,
        "parent": record.parent,
        "digest": record.digest,
        "n_images": record.n_images,
        "n_texts": record.n_texts,
        "blocks": [block.folder for block in record.blocks],
        "origin": record.origin,
        "root": record.root,
        "splits": record.splits,
    }


def split(
    store: Store,
    fraction: Annotated[
        str,
        typer.Option(metavar="NAME=SHARE,…", help="Shares that add to 1: train=.9,val=.1."),
    ],
    by: Annotated[
        str,
        typer.Option(metavar="WHAT", help="Keep together: content (equal files), key or label."),
    ] = "content",
    seed: Annotated[int, typer.Option(help="Another seed gives other splits.")] = 0,
    json: Json = False,
) -> None:
    """Divide the images of a store into splits.

    Equal files are always in one split. Nothing is encoded. Images that are added later are split
    by the same rule, and no other image moves.

    Example: apecache split store --fraction train=.8,val=.1,test=.1
    """
    with ending():
        choice("--by", by, ("content", "key", "label"))
        from apecache.data.splits import parse_fractions
        from apecache.storage.open import open_files
        from apecache.store.reader import FeatureStore
        from apecache.store.view_edits import split_store

        FeatureStore.open(store)
        files = open_files(store)
        record = split_store(files, parse_fractions(fraction), by=by, seed=seed)
        counts = FeatureStore.at(files).pairs.split_counts()
        if json:
            show_json({"store": str(store), "view": record.view, "splits": counts})
        else:
            shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            typer.echo(f"{store}: view {record.view}: {shown}")


def compact(store: Store, json: Json = False) -> None:
    """Free the features that no view of a store needs.

    Remove views first. Interrupt at any time; run the same command again to finish. Nobody else may
    write to the store meanwhile.

    Example: apecache compact store
    """
    with ending():
        from importlib.metadata import version

        from apecache.storage.open import open_files
        from apecache.store.compact import compact_store
        from apecache.store.reader import FeatureStore

        FeatureStore.open(store)
        report = compact_store(open_files(store), version("apecache"))
        if json:
            show_json({"store": str(store), **vars(report)})
        else:
            typer.echo(
                f"{store}: {counted(report.n_rows, 'row')} freed, {report.n_bytes / 1e6:,.1f} MB"
            )
