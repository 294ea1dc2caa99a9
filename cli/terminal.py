"""What every command shares: output for people and for machines, progress, and how it ends."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from .system_errors import explain

FAILURE = 1
INTERRUPTED = 130
PLAIN_WIDTH = 160
"""Columns of tables that go to a file or a pipe."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run of this command wrote.")
]


@contextmanager
def ending() -> Iterator[None]:
    """Turn an error into one line and its exit code, and an interrupt into what to do next.

    Exit codes: 0 ok, 1 failure (also what the operating system refuses), 2 usage, 3 data, 4
    something does not match a store, 130 interrupted.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from apecache.errors import ApecacheError

    try:
        yield
    except ApecacheError as error:
        complain(str(error))
        show_differences(getattr(error, "differences", ()))
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; resume with: {command_line()}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if not complain_of_system(error):
            raise
        raise typer.Exit(FAILURE) from None


def complain_of_system(error: Exception) -> bool:
    """Show an error of the operating system as one line. False for any other error: nothing is
    shown."""
    message = explain(error)
    if message is None:
        return False
    with suppress(OSError):  # standard error may lie on the same full disk
        complain(message)
    drop_output()
    return True


def drop_output() -> None:
    """Send what standard output could not take to nowhere; else Python fails once more when it
    ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # a stream without a descriptor has nothing to drop
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of those known, before anything is loaded. Raises OptionError."""
    from apecache.errors import OptionError, nearest

    if value not in known:
        raise OptionError(
            f"{option} {value}: expected one of {', '.join(known)}{nearest(value, known)}"
        )


def command_line() -> str:
    """The command as the user typed it."""
    return shlex.join(["apecache", *sys.argv[1:]])


def complain(message: str) -> None:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def warn(message: str) -> None:
    typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def show_differences(differences: Iterable[tuple[str, object, object]]) -> None:
    """Field by field, on standard error."""
    rows = [(field, str(here), str(there)) for field, here, there in differences]
    if rows:
        show_table("difference", ("field", "here", "in the store"), rows, err=True)


def show_json(value: object) -> None:
    """One JSON object on standard output; dataclasses become objects, paths strings."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    typer.echo(json.dumps(plain, ensure_ascii=False, default=str))


def show_table(
    title: str,
    columns: tuple[str, ...],
    rows: Iterable[Iterable[object]],
    err: bool = False,
) -> None:
    """A table; numbers to the right. Text from data is shown literally: no markup, no control
    characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    filled = [list(row) for row in rows]
    for position, column in enumerate(columns):
        numeric = all(isinstance(row[position], int | float) for row in filled)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in filled:
        table.add_row(
            *(
                Text(f"{cell:.1f}" if isinstance(cell, float) else printable(str(cell)))
                for cell in row
            )
        )
    terminal = Console(stderr=err).is_terminal
    Console(stderr=err, width=None if terminal else PLAIN_WIDTH).print(table)


def printable(text: str) -> str:
    """Control characters, which could steer a terminal, as visible escapes."""
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text
    )


class _Rate:
    """What progress says of one stage: rows a second since it began, what is written, what could
    not be read.

    `Standing` comes from `apecache.extraction.report`, which is too heavy to import here.
    """

    def __init__(self, first: Any) -> None:
        self.began = time.monotonic()
        self.first = first.done

    def per_second(self, standing: Any) -> float:
        return float((standing.done - self.first) / max(time.monotonic() - self.began, 1e-9))

    def text(self, standing: Any) -> str:
        size = f", {standing.n_bytes / 1e9:.3f} GB" if standing.n_bytes else ""
        bad = f", {standing.n_bad:,} unreadable" if standing.n_bad else ""
        return f"{self.per_second(standing):.1f}/s{size}{bad}"


class _Lines:
    """Progress for a log file: a line at the start of a stage, every ten seconds, and at its
    end."""

    def __init__(self) -> None:
        self.rates: dict[str, _Rate] = {}
        self.shown = 0.0
        self.last: Any = None

    def __call__(self, standing: Any) -> None:
        if standing.modality not in self.rates:
            self.end()
            self.rates[standing.modality] = _Rate(standing)
            self.shown = 0.0
        self.last = standing
        if time.monotonic() - self.shown >= 10:
            self._show(standing)

    def end(self) -> None:
        """The last line of a stage, once all of it is known."""
        if self.last is not None:
            self._show(self.last)

    def _show(self, standing: Any) -> None:
        self.shown = time.monotonic()
        self.last = None
        rate = self.rates[standing.modality]
        left = standing.rows - standing.done
        per_second = rate.per_second(standing)
        until = f", {left / per_second:.0f} s left" if per_second and left else ""
        typer.echo(
            (
                f"{standing.modality}: {standing.done:,}/{standing.rows:,}, "
                f"{rate.text(standing)}{until}"
            ),
            err=True,
        )


@contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """Progress with rate and time left, on standard error: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        lines = _Lines()
        yield lines
        lines.end()
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns: tuple[Any, ...] = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, tuple[Any, _Rate]] = {}

        def update(standing: Any) -> None:
            if standing.modality not in tasks:
                task = bar.add_task(
                    standing.modality,
                    total=standing.rows,
                    completed=standing.done,
                    rate="",
                )
                tasks[standing.modality] = task, _Rate(standing)
            task, rate = tasks[standing.modality]
            bar.update(task, completed=standing.done, total=standing.rows, rate=rate.text(standing))

        yield update
