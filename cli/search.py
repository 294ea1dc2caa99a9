"""`apecache index` and `apecache search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .runs import MovedImage, MovedText, moved_encoders, opener
from .terminal import Device, Json, Overwrite, choice, ending, printable, show_json, show_table

if TYPE_CHECKING:
    from apecache.search.index import IndexReport
    from apecache.search.query import Query


def index(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    store: Annotated[
        str, typer.Option(help="The feature store whose images and captions are to be found.")
    ],
    out: Annotated[Path, typer.Option(help="The index folder to make, or to update.")],
    split: Annotated[str | None, typer.Option(help="Only this split. Default: everything.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help=(
                "flat (exact; the default), ivf, hnsw, or a FAISS factory string: IVF256,PQ32, "
                "SQ8, …."
            )
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add and remove what has changed in the store, by key.")
    ] = False,
    root: Annotated[
        str | None, typer.Option(help="Folder of the images, if the run trained its image tower.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a searchable index (FAISS) of a store's images and captions under a run.

    An approximate kind is measured when it is built: the share of the true ten nearest that it
    finds, and its time.

    Example: apecache index run --store store --out index

    Example: apecache index run --store store --out index --update
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.search.index import build_index, read_description, require_same, update_index
        from apecache.store.reader import FeatureStore

        if update and overwrite:
            raise OptionError(
                "--update and --overwrite: an index is either brought up to date or made anew"
            )
        if update:
            require_same(read_description(out), split, kind)
            report = update_index(
                run,
                store=FeatureStore.open(store),
                out=out,
                open_image=opener(root),
            )
        else:
            report = build_index(
                run,
                store=FeatureStore.open(store),
                out=out,
                split=split,
                overwrite=overwrite,
                kind=kind or "flat",
                open_image=opener(root),
            )
        if json:
            show_json(report)
        else:
            show_index(report, update)


def show_index(report: "IndexReport", update: bool) -> None:
    """Show what an index holds, and how well an approximate one finds."""
    changes = f"; {report.n_added:,} added, {report.n_removed:,} removed" if update else ""
    contents = (
        f"{counted(report.n_images, 'image')} and "
        f"{counted(report.n_texts, 'caption')}, {report.dim} dimensions"
    )
    typer.echo(f"{report.index}: {contents}{changes}")
    if report.left_out.total:
        typer.echo(str(report.left_out))
    rows: list[tuple[object, ...]] = []
    for modality, measured in (("images", report.images), ("captions", report.texts)):
        # None for an exact index: it finds everything.
        if measured.recall_at_10 is not None:
            rows.append(
                (
                    modality,
                    measured.factory,
                    100 * measured.recall_at_10,
                    f"{measured.ms_per_query:.3g}",
                    f"{measured.exact_ms_per_query:.3g}",
                    measured.n_queries,
                )
            )
    if rows:
        columns = ("found are", "kind", "recall@10, %", "ms per query", "ms if exact", "queries")
        show_table("against comparing with everything", columns, rows)


def search(
    index: Annotated[Path, typer.Argument(help="An index folder.")],
    query: Annotated[str | None, typer.Argument(help="Words, or an image file.")] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="An image of the index. May be repeated: a sum.")
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(help="Words or an image file to add to the query. May be repeated."),
    ] = None,
    unlike: Annotated[
        list[str] | None,
        typer.Option(help="Words or an image file to subtract from it. May be repeated."),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="How many results.")] = 5,
    target: Annotated[
        str | None,
        typer.Option(
            help="images or captions. Default: words find images, pictures alone captions."
        ),
    ] = None,
    csls: Annotated[
        bool,
        typer.Option(
            "--csls",
            help="Rank by CSLS: what is near to everything comes later. Not a cosine.",
        ),
    ] = False,
    nprobe: Annotated[
        int | None, typer.Option(help="Lists to look through (kinds with lists).")
    ] = None,
    ef_search: Annotated[
        int | None, typer.Option("--ef-search", help="Candidates on the way (hnsw).")
    ] = None,
    image: MovedImage = None,
    text: MovedText = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find images by words, and captions by a photo; or either by sums and differences of words,
    photos and keys.

    Example: apecache search index "a dog in the snow"

    Example: apecache search index photo.jpg --target images

    Example: apecache search index --key images/0001.jpg --like "at night" --unlike "a dog"
    """
    with ending():
        if target is not None:
            choice("--target", target, ("images", "captions"))
        from apecache.search.query import Query, SearchIndex

        moved = moved_encoders(index, image, text)
        tuned: dict[str, Any] = {"nprobe": nprobe, "ef_search": ef_search, "device": device}
        terms = list(like or ())
        if query is not None:
            terms.insert(0, query)
        # `files`: the texts are the user's own, so that they may name files to open.
        search_query = Query(
            tuple(terms),
            unlike=tuple(unlike or ()),
            keys=tuple(key or ()),
            files=True,
        )
        # `choice` has checked it; the type of the argument is a Literal, which an option is not.
        aim: Any = target
        hits = SearchIndex.open(index, *moved, **tuned).find(search_query, k, aim, csls)
        score = "CSLS" if csls else "cosine"
        if json:
            show_json(
                {
                    "query": query,
                    "like": search_query.like,
                    "unlike": search_query.unlike,
                    "keys": search_query.keys,
                    "score": score,
                    "hits": [vars(hit) for hit in hits],
                }
            )
        else:
            rows = [(hit.rank, f"{hit.score:.3f}", hit.key, hit.caption) for hit in hits]
            show_table(printable(title_of(search_query)), ("", score, "image", "caption"), rows)


def title_of(query: "Query") -> str:
    """Write a query as the sum and difference of its terms."""
    added = " + ".join((*query.like, *query.keys))
    subtracted = "".join(f" - {text}" for text in query.unlike)
    return added + subtracted
