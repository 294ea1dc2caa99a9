"""The command `apecache`: one verb per command, one library function behind each.

Nothing heavy is imported here: `apecache --help` must not wait for torch.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from . import (
    analyze,
    auto,
    bundle,
    compare,
    curate,
    demo,
    doctor,
    evaluate,
    export_embeddings,
    export_run,
    extract,
    fit,
    import_features,
    lint,
    plan,
    recipes,
    report,
    scout,
    search,
    serve,
    store,
    sweep,
    views,
)
from .system_errors import Command
from .terminal import FAILURE, INTERRUPTED, command_line, complain_of_system

app = typer.Typer(
    name="apecache",
    help=(
        "Build image-text models from pretrained encoders: cache their features once, then train "
        "small heads on them in seconds. Start with: apecache demo"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CACHE = "Cache"
TRAIN = "Train"
EVALUATE = "Evaluate"
SEARCH = "Search"
TOOLS = "Tools"


def _add(panel: str, command: Callable[..., None], name: str | None = None) -> None:
    """Add a command to a panel of the help; the list of commands shows its first paragraph.

    Typer keeps the line breaks of a docstring, which are those of the source. Here every paragraph
    becomes one line, which the terminal wraps.
    """
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    decorate = app.command(
        name,
        cls=Command,
        help="\n\n".join(lines),
        short_help=lines[0],
        rich_help_panel=panel,
    )
    decorate(command)


_add(CACHE, extract.extract)
_add(CACHE, import_features.import_features, name="import")
_add(CACHE, store.info)
_add(CACHE, views.views)
_add(CACHE, views.split)
_add(CACHE, views.compact)
_add(CACHE, views.add)
_add(CACHE, views.delete)
_add(CACHE, store.verify)
_add(CACHE, store.repair)
_add(CACHE, store.remove)
_add(CACHE, store.copy)
_add(CACHE, store.export)
_add(CACHE, store.upgrade)
_add(TRAIN, recipes.recipes)
_add(TRAIN, fit.fit_head, name="fit-head")
_add(TRAIN, fit.fit_encoder, name="fit-encoder")
_add(TRAIN, sweep.sweep)
_add(TRAIN, auto.auto)
_add(TRAIN, lint.lint)
_add(TRAIN, fit.ensemble)
_add(EVALUATE, evaluate.evaluate)
_add(EVALUATE, compare.compare)
_add(EVALUATE, analyze.analyze)
_add(EVALUATE, report.report)
_add(SEARCH, search.index)
_add(SEARCH, search.search)
_add(SEARCH, serve.serve)
_add(TOOLS, demo.demo)
_add(TOOLS, doctor.doctor)
_add(TOOLS, scout.scout)
_add(TOOLS, plan.plan)
_add(TOOLS, auto.forecast)
_add(TOOLS, curate.curate)
_add(TOOLS, export_run.export_run, name="export-run")
_add(TOOLS, bundle.bundle)
_add(TOOLS, export_embeddings.export_embeddings, name="export-embeddings")


def _version(is_requested: bool) -> None:
    """Show the version and end; Typer calls this before any command."""
    if is_requested:
        from importlib.metadata import version

        typer.echo(f"apecache {version('apecache')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the console script.

    Each command handles its own errors with `ending`. An interrupt or an error of the system while
    Typer parses or prints help is handled here in the same way.
    """
    try:
        app()
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; resume with: {command_line()}", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:  # for example help that is written to a full disk
        if not complain_of_system(error):
            raise
        sys.exit(FAILURE)
