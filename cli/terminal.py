"""Shared by all commands: output for people and for machines, progress, and exit codes."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

import typer

from .system_errors import explain

if TYPE_CHECKING:
    from rich.progress import TaskID

FAILURE = 1
INTERRUPTED = 130
PLAIN_WIDTH = 160
"""Columns of tables that go to a file or a pipe."""


class RowsState(Protocol):
    """Say how far a command is with the rows of one stage."""

    @property
    def modality(self) -> str: ...

    @property
    def done(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def n_bad(self) -> int: ...

    @property
    def n_bytes(self) -> int: ...


@contextmanager
def ending() -> Iterator[None]:
    """Turn an error into one line and its exit code, and an interrupt into what to do next.

    Exit codes: 0 ok, 1 failure (also what the operating system refuses), 2 usage, 3 data, 4
    something does not match a store, 130 interrupted.
    """
    # Before the commands import these libraries, which read the environment once.
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
        # The reader of a pipe has ended. Python flushes once more at exit: give it another file.
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
    """Show an error of the operating system as one line.

    Returns:
        Whether it is one; for any other error nothing is shown.
    """
    message = explain(error)
    if message is None:
        return False
    with suppress(OSError):  # standard error may lie on the same full disk
        complain(message)
    drop_output()
    return True


def drop_output() -> None:
    """Discard what standard output could not take; otherwise Python fails once more at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # a stream without a descriptor has nothing to drop
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown value of an option, before anything is loaded.

    Raises:
        OptionError: `value` is not among `known`.
    """
    from apecache.errors import OptionError, nearest

    if value not in known:
        raise OptionError(
            f"{option} {value}: expected one of {', '.join(known)}{nearest(value, known)}"
        )


def command_line() -> str:
    """Return the command as the user typed it."""
    return shlex.join(["apecache", *sys.argv[1:]])


def complain(message: str) -> None:
    """Show an error on standard error."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def warn(message: str) -> None:
    """Show a warning on standard error."""
    typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def show_differences(differences: Iterable[tuple[str, object, object]]) -> None:
    """Show (field, value here, recorded value) rows on standard error."""
    rows = [(field, str(current), str(stored)) for field, current, stored in differences]
    if rows:
        show_table("difference", ("field", "here", "recorded"), rows, err=True)


def show_json(value: object) -> None:
    """Print one JSON object on standard output; dataclasses become objects, paths strings."""
    json_value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    typer.echo(json.dumps(json_value, ensure_ascii=False, default=str))


def show_table(
    title: str,
    columns: tuple[str, ...],
    rows: Iterable[Iterable[object]],
    err: bool = False,
) -> None:
    """Show a table, numbers to the right.

    Text from data is shown literally: no markup, no control characters.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    filled = [list(row) for row in rows]
    for position, column in enumerate(columns):
        numeric = all(isinstance(row[position], int | float) for row in filled)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in filled:
        cells = []
        for cell in row:
            text = f"{cell:.1f}" if isinstance(cell, float) else printable(str(cell))
            # Text, because rich reads a string as markup.
            cells.append(Text(text))
        table.add_row(*cells)
    # A file or a pipe has no width: rich would fold everything to 80 columns.
    terminal = Console(stderr=err).is_terminal
    Console(stderr=err, width=None if terminal else PLAIN_WIDTH).print(table)


def printable(text: str) -> str:
    """Replace control characters, which could steer a terminal, by visible escapes."""
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text
    )


class _Rate:
    """Say of one stage: rows a second since it began, bytes written, rows that are unreadable."""

    def __init__(self, first: RowsState) -> None:
        self.began = time.monotonic()
        self.first = first.done

    def per_second(self, standing: RowsState) -> float:
        """Return rows a second of this run; rows of an earlier run do not count."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return float((standing.done - self.first) / seconds)

    def text(self, standing: RowsState) -> str:
        size = ""
        if standing.n_bytes:
            is_large = standing.n_bytes >= 1e9
            unit = "GB" if is_large else "MB"
            size = f", {standing.n_bytes / (1e9 if is_large else 1e6):.1f} {unit}"
        bad = f", {standing.n_bad:,} unreadable" if standing.n_bad else ""
        return f"{self.per_second(standing):.1f}/s{size}{bad}"


class _Lines:
    """Show progress for a log file: a line when a stage starts, every ten seconds, when it ends."""

    def __init__(self) -> None:
        self.rates: dict[str, _Rate] = {}
        self.shown = 0.0
        self.last: RowsState | None = None

    def __call__(self, standing: RowsState) -> None:
        if standing.modality not in self.rates:
            self.end()
            self.rates[standing.modality] = _Rate(standing)
            # The first line of a stage comes at once.
            self.shown = 0.0
        self.last = standing
        if time.monotonic() - self.shown >= 10:
            self._show(standing)

    def end(self) -> None:
        """Show the last line of a stage, unless it was shown."""
        if self.last is not None:
            self._show(self.last)

    def _show(self, standing: RowsState) -> None:
        self.shown = time.monotonic()
        self.last = None
        rate = self.rates[standing.modality]
        remaining_rows = standing.rows - standing.done
        per_second = rate.per_second(standing)
        until = ""
        if per_second and remaining_rows:
            until = f", {remaining_rows / per_second:.0f} s left"
        rows = f"{standing.done:,}/{standing.rows:,}"
        typer.echo(f"{standing.modality}: {rows}, {rate.text(standing)}{until}", err=True)


@contextmanager
def progress() -> "Iterator[Callable[[RowsState], None]]":
    """Show progress with rate and time left on standard error: a bar on a terminal, else lines.

    Yields:
        A function to call with every state of an extraction or an import.
    """
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
        tasks: dict[str, tuple[TaskID, _Rate]] = {}

        def update(standing: RowsState) -> None:
            if standing.modality not in tasks:
                task = bar.add_task(
                    standing.modality,
                    total=standing.rows,
                    completed=standing.done,
                    rate="",
                )
                tasks[standing.modality] = (task, _Rate(standing))
            task, rate = tasks[standing.modality]
            bar.update(task, completed=standing.done, total=standing.rows, rate=rate.text(standing))

        yield update
