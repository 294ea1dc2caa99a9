"""The command `apecache`: one verb per command, one library function behind each.

Nothing heavy is imported here: `apecache --help` must not wait for torch.
"""

import sys
from typing import Annotated

import typer

from . import (
    analyze,
    compare,
    demo,
    evaluate,
    export_run,
    extract,
    fit,
    lint,
    plan,
    recipes,
    report,
    scout,
    search,
    serve,
    store,
    sweep,
)
from .system_errors import Command
from .terminal import FAILURE, INTERRUPTED, command_line, complain_of_system

app = typer.Typer(
    name="apecache",
    help=(
        "Image-text models out of encoders that exist: cache their features once, fit heads on "
        "them in seconds."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(extract.extract)
app.command(cls=Command)(recipes.recipes)
app.command(cls=Command)(scout.scout)
app.command(cls=Command)(plan.plan)
app.command("fit-head", cls=Command)(fit.fit_head)
app.command("fit-encoder", cls=Command)(fit.fit_encoder)
app.command(cls=Command)(sweep.sweep)
app.command(cls=Command)(lint.lint)
app.command("export-run", cls=Command)(export_run.export_run)
app.command(cls=Command)(fit.ensemble)
app.command(cls=Command)(evaluate.evaluate)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(analyze.analyze)
app.command(cls=Command)(search.index)
app.command(cls=Command)(search.search)
app.command(cls=Command)(report.report)
app.command(cls=Command)(serve.serve)
for _command in (
    store.info,
    store.verify,
    store.repair,
    store.remove,
    store.copy,
    store.export,
    store.upgrade,
):
    app.command(cls=Command)(_command)
app.command(cls=Command)(demo.demo)


def _version(is_requested: bool) -> None:
    """Show the version and end; Typer calls this before any command."""
    if is_requested:
        from importlib.metadata import version

        typer.echo(f"apecache {version('apecache')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the console script.

    Commands end their own work with `ending`. An interrupt or an error of the system outside of it,
    while Typer parses or prints help, ends in the same way.
    """
    try:
        app()
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; resume with: {command_line()}", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:  # help that a full disk does not take, say
        if not complain_of_system(error):
            raise
        sys.exit(FAILURE)
