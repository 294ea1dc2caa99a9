"""`apecache index` and `apecache search`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .evaluate import moved_encoders, opener
from .extract import choice
from .terminal import Device, Json, Overwrite, ending, printable, show_json, show_table


def index(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    store: Annotated[Path, typer.Option(help="The feature store whose images and captions are to be found.")],
    out: Annotated[Path, typer.Option(help="The index folder to make.")],
    split: Annotated[str | None, typer.Option(help="Only this split. Default: everything.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the images, if the run trained its image tower.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a searchable index (FAISS) of a store's images and captions under a run.

    Example: apecache index run --store store --out index
    """
    with ending():
        from apecache.index import build_index
        from apecache.store.reader import FeatureStore

        report = build_index(run, FeatureStore.open(store), out, split, overwrite, opener(root))
        if json:
            show_json(report)
        else:
            typer.echo(f"{out}: {report.n_images:,} images and {report.n_texts:,} captions, {report.dim} dimensions")


def search(
    index: Annotated[Path, typer.Argument(help="An index folder.")],
    query: Annotated[str, typer.Argument(help="Words, or an image file.")],
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="How many results.")] = 5,
    target: Annotated[
        str | None, typer.Option(help="images or captions. Default: text finds images, a photo captions.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="The image encoder's new place, if its folder has moved.")] = None,
    text: Annotated[str | None, typer.Option(help="The text encoder's new place, if its folder has moved.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find images by words, and captions by a photo.

    Example: apecache search index "a dog in the snow"

    Example: apecache search index photo.jpg --target images
    """
    with ending():
        if target is not None:
            choice("--target", target, ("images", "captions"))
        from apecache.index import SearchIndex

        aim: Any = target
        hits = SearchIndex.open(index, *moved_encoders(index, image, text), device).search(query, k, aim)
        if json:
            show_json({"query": query, "hits": [vars(hit) for hit in hits]})
        else:
            rows = [(hit.rank, f"{hit.score:.3f}", hit.key, hit.caption) for hit in hits]
            show_table(printable(query), ("", "cosine", "image", "caption"), rows)
