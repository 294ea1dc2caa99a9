"""`apecache index` and `apecache search`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .option_groups import (
    ADVANCED,
    Device,
    Json,
    LiveRoot,
    OptionGroup,
    Overwrite,
    View,
    takes_groups,
)
from .runs import MovedEncoders, opener
from .terminal import choice, ending, printable, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.search.index import IndexReport
    from apecache.search.query import Query, SearchIndex

TERMS = "More terms of the query"


def index(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    store: Annotated[
        str,
        typer.Option(metavar="STORE", help="Feature store of the images and captions."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Index folder to create or to update.")
    ],
    split: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Index this split only. Default: all images."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Type of the index: flat (exact; the default), ivf, hnsw, int8, binary, or a "
            "FAISS factory string such as IVF256,PQ32.",
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep the first N values of each embedding. For runs of loss.matryoshka.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Keep a column of the table, for search --where NAME=VALUE. Repeatable.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Add and remove what has changed in the store."),
    ] = False,
    view: View = None,
    root: LiveRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Build a search index (FAISS) of the images and captions of a store.

    The embeddings come from the run. The recall@10 and the time of an approximate index are
    measured when it is built.

    Example: apecache index run --store store --out index

    Example: apecache index run --store store --out index --update
    """
    with ending():
        # Before the run is opened: wrong options cost no time.
        require_one_way(update, overwrite)
        require_trained_width(run, dim)
        if update:
            require_as_built(dim, column)
            report = update_by(
                run,
                store=store,
                view=view,
                out=out,
                root=root,
                split=split,
                kind=kind,
            )
        else:
            from apecache.search.index import build_index
            from apecache.store.reader import FeatureStore

            opened = FeatureStore.open(store, view)
            report = build_index(
                run,
                store=opened,
                out=out,
                split=split,
                overwrite=overwrite,
                kind=kind or "flat",
                open_image=opener(root, opened),
                dim=dim,
                columns=column or (),
            )
        if json:
            show_json(report)
        else:
            show_index(report, update)


def require_as_built(dim: int | None, columns: list[str] | None) -> None:
    """Refuse another width and other columns with --update.

    Raises:
        OptionError: --dim or --column is given.
    """
    from apecache.errors import OptionError

    if dim is not None:
        raise OptionError("--dim has no effect on --update, which keeps the width; leave it out")
    if columns:
        raise OptionError(
            "--column has no effect on --update, which keeps the columns; leave it out"
        )


def require_trained_width(run: Path, dim: int | None) -> None:
    """Warn if the run was not trained for embeddings of this width."""
    # The full width was trained in any case.
    if dim is None:
        return
    from apecache.runs.load import recorded_training

    recipe = recorded_training(run).get("recipe") or {}
    widths = (recipe.get("loss") or {}).get("matryoshka") or ()
    if dim not in widths:
        warn(
            f"the first {dim} values were not trained as an embedding (loss.matryoshka is "
            f"{list(widths)}); the recall below says what that costs"
        )


def require_one_way(update: bool, overwrite: bool) -> None:
    """Refuse to change an index and to build it again at once.

    Raises:
        OptionError: Both are asked for.
    """
    from apecache.errors import OptionError

    if update and overwrite:
        raise OptionError(
            "--update and --overwrite exclude each other: --update changes the index, "
            "--overwrite builds it again; leave one out"
        )


def update_by(
    run: Path,
    store: str,
    view: str | None,
    out: Path,
    root: str | None,
    split: str | None,
    kind: str | None,
) -> "IndexReport":
    """Update an index; `split` and `kind` must be those that it was built with, if given."""
    from apecache.search.index import require_same, update_index
    from apecache.search.index_files import read_description
    from apecache.store.reader import FeatureStore

    require_same(read_description(out), split, kind)
    opened = FeatureStore.open(store, view)
    return update_index(
        run,
        store=opened,
        out=out,
        open_image=opener(root, opened),
    )


def show_index(report: "IndexReport", update: bool) -> None:
    """Show the contents of an index, and the recall of an approximate one."""
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
        columns = ("results", "kind", "recall@10, %", "ms per query", "ms if exact", "queries")
        show_table("approximate index compared with exact search", columns, rows)


@dataclass(frozen=True, kw_only=True)
class TermOptions(OptionGroup):
    """Hold terms that are added to the query, or subtracted from it."""

    like: Annotated[
        list[str] | None,
        typer.Option(
            help="Add words or an image file. Repeatable.",
            rich_help_panel=TERMS,
        ),
    ] = None
    unlike: Annotated[
        list[str] | None,
        typer.Option(
            help="Subtract words or an image file. Repeatable.",
            rich_help_panel=TERMS,
        ),
    ] = None
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Add an image of the index, by its key. Repeatable.",
            rich_help_panel=TERMS,
        ),
    ] = None

    def query(self, first: str | None) -> "Query":
        """Return the query of all terms."""
        from apecache.search.query import Query

        terms = list(self.like or ())
        if first is not None:
            terms.insert(0, first)
        # `files`: the texts are the user's own, so that they may name files to open.
        return Query(
            tuple(terms),
            unlike=tuple(self.unlike or ()),
            keys=tuple(self.key or ()),
            files=True,
        )


@dataclass(frozen=True, kw_only=True)
class OpenOptions(MovedEncoders):
    """Hold how an index is opened and searched."""

    nprobe: Annotated[
        int | None,
        typer.Option(
            help="Lists to search. For kinds with lists, such as ivf.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    ef_search: Annotated[
        int | None,
        typer.Option(
            "--ef-search",
            help="Candidates to visit. For hnsw.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    device: Device = "auto"

    def open(self, index: Path) -> "SearchIndex":
        """Open an index."""
        from apecache.search.query import SearchIndex

        return SearchIndex.open(
            index,
            *self.recorded_in(index),
            nprobe=self.nprobe,
            ef_search=self.ef_search,
            device=self.device,
        )


@takes_groups
def search(
    index: Annotated[Path, typer.Argument(help="An index folder.")],
    terms: TermOptions,
    open_options: OpenOptions,
    query: Annotated[str | None, typer.Argument(help="Words, or an image file.")] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Number of results.")] = 5,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="images or captions. Default: images for words, captions for images alone.",
        ),
    ] = None,
    csls: Annotated[
        bool,
        typer.Option(
            "--csls",
            help="Rank by CSLS, which moves hubs down. The scores are then not cosines.",
        ),
    ] = False,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITIONS",
            help='Only rows that meet conditions: "split=val and label=dog". Fields: key, '
            "caption, split, label, language. Operators: =, != and ~ (with * and ?).",
        ),
    ] = None,
    min_score: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="Only results that score as high: a number, or auto for the score that chance "
            "reaches in 5 % of queries without an answer.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Search an index by words or by an image.

    Words find images; an image finds captions. --like, --unlike and --key add and subtract further
    terms.

    Example: apecache search index "a dog in the snow"

    Example: apecache search index photo.jpg --target images

    Example: apecache search index --key images/0001.jpg --like "at night" --unlike "a dog"
    """
    with ending():
        if target is not None:
            choice("--target", target, ("images", "captions"))
        search_query = terms.query(query)
        # `choice` has checked it; the type of the argument is a Literal, which an option is not.
        aim: Any = target
        opened = open_options.open(index)
        # The threshold belongs to one target, which depends on the kind of the query.
        threshold = opened.nothing_found(aim or opened.target_of(search_query))
        hits = opened.find(
            search_query,
            k=k,
            target=aim,
            csls=csls,
            where=where,
            min_score=least_score(min_score, threshold, csls),
        )
        score = "CSLS" if csls else "cosine"
        if json:
            show_json(
                {
                    "query": query,
                    "like": search_query.like,
                    "unlike": search_query.unlike,
                    "keys": search_query.keys,
                    "score": score,
                    "nothing_found": threshold,
                    "hits": [vars(hit) for hit in hits],
                }
            )
        else:
            rows = [(hit.rank, f"{hit.score:.3f}", hit.key, hit.caption) for hit in hits]
            show_table(printable(title_of(search_query)), ("", score, "image", "caption"), rows)
            if not hits:
                typer.echo("nothing found")
            elif threshold is not None and not csls and hits[0].score < threshold:
                typer.echo(
                    f"The index may have no answer: the best result scores {hits[0].score:.3f}. "
                    f"Of queries without an answer, 95 % score below {threshold:.3f}."
                )


def least_score(text: str | None, threshold: float | None, csls: bool = False) -> float | None:
    """Return the lowest score of a result; None for no limit.

    Args:
        text: The option: a number, or `auto`.
        threshold: What the index measured.
        csls: Whether scores are those of CSLS, which have no upper end of 1.

    Raises:
        OptionError: Not a number that a score can reach, or `auto` for an index that measured
            nothing.
    """
    from apecache.errors import OptionError

    if text is None:
        return None
    if text == "auto":
        if threshold is None:
            raise OptionError(
                "--min-score auto: the index has no measured score (too few rows, or built before "
                "there was one); give a number, or build it again"
            )
        return threshold
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise OptionError(f"--min-score {text}: expected a number or auto")
    if score > 1 and not csls:
        raise OptionError(f"--min-score {text}: a cosine is at most 1; give a smaller number")
    return score


def title_of(query: "Query") -> str:
    """Write a query as the sum and difference of its terms."""
    added = " + ".join((*query.like, *query.keys))
    subtracted = "".join(f" - {text}" for text in query.unlike)
    return added + subtracted
