"""The command `apecache`: one verb per command, one library function behind each. Nothing heavy is imported here."""

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
    laws,
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
from .terminal import INTERRUPTED, command_line

app = typer.Typer(
    name="apecache",
    help="Image-text models out of encoders that exist: cache their features once, fit heads on them in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract.extract)
app.command()(recipes.recipes)
app.command()(scout.scout)
app.command()(plan.plan)
app.command("fit-head")(fit.fit_head)
app.command("fit-encoder")(fit.fit_encoder)
app.command()(sweep.sweep)
app.command()(laws.laws)
app.command()(lint.lint)
app.command("export-run")(export_run.export_run)
app.command()(fit.combine)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(analyze.analyze)
app.command()(search.index)
app.command()(search.search)
app.command()(report.report)
app.command()(serve.serve)
for _command in (store.info, store.verify, store.repair, store.remove, store.copy, store.export, store.upgrade):
    app.command()(_command)
app.command()(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
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
    """The console script. An interrupt outside a command's own work (while importing, say) ends as inside it."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; resume with: {command_line()}", err=True)
        sys.exit(INTERRUPTED)
