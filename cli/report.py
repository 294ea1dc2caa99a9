"""`apecache report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import (
    Device,
    ImagesFrom,
    Json,
    OptionGroup,
    Root,
    View,
    takes_groups,
)
from .terminal import command_line, ending, show_json

if TYPE_CHECKING:
    from apecache.data.media import Media
    from apecache.store.reader import FeatureStore

PAGE = "Page"


@dataclass(frozen=True, kw_only=True)
class PageOptions(OptionGroup):
    """Hold the options of a page of runs."""

    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Feature store. Adds measurements and pictures."),
    ] = None
    view: View = None
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Split to measure. Default: the dev images of each run.",
        ),
    ] = None
    root: Root = None
    source: ImagesFrom = None
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Also measure a ready-made model: open_clip:NAME/TAG, or hf:ID of a CLIP or "
            "SigLIP.",
        ),
    ] = None
    title: Annotated[str, typer.Option(help="Heading of the page.", rich_help_panel=PAGE)] = ""
    items: Annotated[
        int, typer.Option(min=1, help="Queries in each gallery.", rich_help_panel=PAGE)
    ] = 6


@takes_groups
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs of fit-head or fit-encoder, or one sweep folder."),
    ],
    page_options: PageOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write. Default: RUN-report.html beside the run, or report.html in the "
            "sweep folder.",
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write an HTML page about one or more runs: recalls, curves, pictures and costs.

    The page is one file without scripts. Recalls are shown beside chance.

    Example: apecache report run --store store --out report.html

    Example: apecache report run-0 run-1 run-2 --store store --split val --out runs.html
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.report.sweep_page import is_sweep, sweep_page

        # A sweep has a page of its own: many trials on one dev split, and not one run.
        if any(is_sweep(run) for run in runs):
            if len(runs) > 1:
                raise OptionError(
                    f"expected runs or one sweep folder, found {len(runs)} folders with a sweep "
                    "among them: give the sweep folder alone"
                )
            page = sweep_page(runs[0], page_path(runs, out) if out else None, page_options.title)
        else:
            page = runs_page(runs, page_path(runs, out), options=page_options, device=device)
        if json:
            show_json({"page": str(page), "bytes": page.stat().st_size})
        else:
            typer.echo(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


def page_path(runs: list[Path], out: Path | None) -> Path:
    """Return where the page is to be written; by default beside the run.

    Raises:
        OptionError: Several runs without `out`, or a page whose folder does not exist.
    """
    from apecache.errors import OptionError

    if out is None and len(runs) > 1:
        raise OptionError("--out is missing: name the file for the page of several runs")
    run = runs[0].resolve()
    page = out or run.with_name(f"{run.name}-report.html")
    # Refused before the measuring, which may take minutes.
    if not page.parent.is_dir() or page.is_dir():
        raise OptionError(
            f"--out {page}: expected a file in a folder that exists; choose another path"
        )
    return page


def runs_page(runs: list[Path], out: Path, options: PageOptions, device: str) -> Path:
    """Write the page of runs.

    Args:
        runs: Finished run folders.
        out: The page.
        options: What to measure, and what the page shows.
        device: Where the embeddings are computed.

    Raises:
        OptionError: Options that need a store, without one.
    """
    from apecache.errors import OptionError
    from apecache.report.report_page import ReportSpec, report_page

    # These options choose what is measured, which the runs alone do not hold.
    needs_store = (options.split, options.root, options.source, options.baseline)
    if options.store is None and any(needs_store):
        raise OptionError(
            "--split, --root, --source and --baseline need --store; give --store STORE too"
        )
    opened = None
    if options.store is not None:
        from apecache.store.reader import FeatureStore

        opened = FeatureStore.open(options.store, options.view)
    spec = ReportSpec(
        opened,
        split=options.split,
        media=media_of(options.root, options.source, opened),
        title=options.title,
        command=command_line(),
        n_items=options.items,
        device=device,
        baseline=options.baseline,
    )
    return report_page(runs, out, spec)


def media_of(
    root: str | None,
    source: str | None,
    store: "FeatureStore | None" = None,
) -> "Media | None":
    """Return where the images are; None if neither option is given.

    Args:
        root: Folder of the images.
        source: Source that the images come with.
        store: Store that recorded how the source was opened.

    Raises:
        OptionError: Both are given, or `root` is not a folder.
    """
    from apecache.data.recorded import recorded_media
    from apecache.errors import OptionError
    from apecache.storage.bucket import is_object_url

    if root is not None and source is not None:
        raise OptionError("--root and --source exclude each other: leave one out")
    if root is not None and not is_object_url(root) and not Path(root).is_dir():
        raise OptionError(f"--root {root}: expected a folder, found none; give another path")
    if root is None and source is None:
        return None
    record = {} if store is None else store.last_source
    return recorded_media(record, root=root, source=source)
