"""`apecache report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import Root
from .terminal import Device, Json, command_line, ending, show_json

if TYPE_CHECKING:
    from apecache.data.media import Media


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs of either trainer; or one folder of a sweep."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page. Default: RUN-report.html beside the run, report.html in a sweep."
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Measure on this store, and show pictures.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Measure this split. Default: the images on which each run's epoch was chosen."
        ),
    ] = None,
    root: Root = None,
    source: Annotated[
        str | None,
        typer.Option(help="Where the images lie, if not in a folder: what extract was given."),
    ] = None,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "",
    items: Annotated[int, typer.Option(min=1, help="Queries in each gallery.")] = 6,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write one HTML page, without scripts and with everything in it: figures beside chance,
    curves, what is found and missed in pictures, several runs compared, costs.

    Example: apecache report run --store store --out report.html

    Example: apecache report run-0 run-1 run-2 --store store --split val --out runs.html
    """
    with ending():
        from apecache.errors import OptionError
        from apecache.report.sweep_page import is_sweep, sweep_page

        if any(is_sweep(run) for run in runs):
            if len(runs) > 1:
                raise OptionError(
                    "a sweep has a page of its own: give its folder alone, or runs without it"
                )
            page = sweep_page(runs[0], page_path(runs, out) if out else None, title)
        else:
            page = runs_page(
                runs,
                out=page_path(runs, out),
                store=store,
                about=(split, root, source, title, items, device),
            )
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
        raise OptionError("--out is missing: say where the page of several runs is to be written")
    run = runs[0].resolve()
    page = out or run.with_name(f"{run.name}-report.html")
    if not page.parent.is_dir() or page.is_dir():
        raise OptionError(
            f"--out {page}: no file can be made there; name a file in a folder that exists"
        )
    return page


def runs_page(runs: list[Path], out: Path, store: str | None, about: tuple[Any, ...]) -> Path:
    """Write the page of runs.

    Args:
        runs: Finished run folders.
        out: The page.
        store: The feature store to measure on; None: nothing is measured.
        about: The options --split, --root, --source, --title, --items and --device.

    Raises:
        OptionError: Options that need a store, without one.
    """
    from apecache.errors import OptionError
    from apecache.report.report_page import ReportSpec, report_page

    split, root, source, title, items, device = about
    if store is None and (split or root or source):
        raise OptionError(
            "--split, --root and --source say what of a store to measure: give --store too"
        )
    opened = None
    if store is not None:
        from apecache.store.reader import FeatureStore

        opened = FeatureStore.open(store)
    media = media_of(root, source)
    return report_page(
        runs,
        out,
        ReportSpec(
            opened,
            split=split,
            media=media,
            title=title,
            command=command_line(),
            n_items=items,
            device=device,
        ),
    )


def media_of(root: str | None, source: str | None) -> "Media | None":
    """Return where images are by these options; None where neither is given.

    Raises:
        OptionError: Both are given, or `root` is not a folder.
    """
    from apecache.data.media import media_below
    from apecache.errors import OptionError
    from apecache.storage.bucket import is_object_url

    if root is not None and source is not None:
        raise OptionError("--root and --source: give one of them")
    if root is not None:
        if not is_object_url(root) and not Path(root).is_dir():
            raise OptionError(f"--root {root} is no folder")
        return media_below(root)
    if source is None:
        return None
    from apecache.data.sources import open_pairs

    return open_pairs(source).media
