"""Errors of the operating system, as one line each: what failed, on which path, and what to do.

A full disk, a read-only folder, a missing permission or a limit of the process can end any command
at any write or read. They arrive as OSError, or as another exception that a library makes of one.
Any other error is a fault of the program and ends with its traceback.
"""

import errno
import io
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from .option_groups import ADVANCED

OUTPUTS = ("out", "to", "heat_map", "store", "work", "tensorboard")
"""Parameters that name what a command writes, the first given one first."""

AGAIN = "then run the same command again"
SHOWN_CHARACTERS = 120
"""A longer path is cut in a message."""

STANDARD_OUTPUT = Path("standard output")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY = (
    f"out of memory: close other programs, or choose smaller batches or a smaller model, {AGAIN}"
)

FOREIGN = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
    "PytorchStreamWriter failed": errno.EIO,
}
"""What libraries say in place of the system's own words: SQLite (also below Optuna), torch."""

FOREIGN_NUMBERS = (
    *NO_SPACE,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
    errno.EIO,
)
"""Errors that are recognized by the system's own words, wherever they stand in a message."""


@dataclass(frozen=True, kw_only=True)
class GivenPath:
    """Hold a path that was given on the command line."""

    flag: str
    """The option or argument that takes the path."""
    path: Path
    is_output: bool
    """Whether the command writes there."""


_called: ContextVar[typer.Context | None] = ContextVar("called", default=None)


PLACEHOLDERS = {"int": "N", "float": "X", "Path": "PATH", "list": "TEXT", "str": "TEXT"}
"""Names of option values in the help, by the beginning of Typer's own name of the type."""


LAST_OPTIONS = ("overwrite", "device", "json")
"""Options of many commands; the help shows them after those of the one command."""


class Command(TyperCommand):
    """Run a command that takes each option once, and whose arguments `explain` can name."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Give every option a short name of its value; the help is 80 columns wide."""
        super().__init__(*args, **settings)
        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.metavar is None:
                parameter.metavar = _placeholder(parameter)
        # The help shows options, and panels by their first option, in this order.
        self.params.sort(key=_rank)

    def get_help_option(self, ctx: Any) -> Any:
        """Return `--help`, which takes no value."""
        option = super().get_help_option(ctx)
        if isinstance(option, TyperOption):
            option.metavar = ""
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an option that is given twice, unless it takes several values.

        The last value would win in silence, and the first is as likely to be the one that was
        meant.
        """
        if not ctx.resilient_parsing:
            # A copy: the parser takes the arguments out of its list.
            _, _, occurrences = self.make_parser(ctx).parse_args(args=list(args))
            _require_once(ctx, occurrences)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; until it ends, `explain` sees its arguments."""
        # Reset afterwards: `apecache demo` runs commands within a command.
        token = _called.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _called.reset(token)


def _rank(parameter: Any) -> int:
    """Return where the help shows a parameter: expert options last, after those of all commands."""
    if getattr(parameter, "rich_help_panel", None) == ADVANCED:
        return len(LAST_OPTIONS) + 1
    return LAST_OPTIONS.index(parameter.name) + 1 if parameter.name in LAST_OPTIONS else 0


def _placeholder(option: TyperOption) -> str:
    """Return what the help shows for the value of an option; a flag has no value."""
    if option.is_flag:
        return ""
    type_name = option.bare_type()
    matches = [name for prefix, name in PLACEHOLDERS.items() if type_name.startswith(prefix)]
    return matches[0] if matches else "TEXT"


def _require_once(ctx: typer.Context, occurrences: Sequence[Any]) -> None:
    """End with a usage error if an option that takes one value is given twice."""
    earlier: list[Any] = []
    for parameter in occurrences:
        takes_one = isinstance(parameter, TyperOption) and not (
            parameter.multiple or parameter.is_eager
        )
        if takes_one and parameter in earlier:
            flag = "/".join((*parameter.opts, *parameter.secondary_opts))
            limit = "give it once" if parameter.is_flag else "it takes one value"
            ctx.fail(f"{flag} is given twice; {limit}")
        earlier.append(parameter)


def explain(error: BaseException) -> str | None:
    """Explain an error of the system in one line: the path, what happened, the remedy.

    Returns:
        The line; None for any other error.
    """
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, OSError):
        return _line(error.errno, _path_of(error) or _written_file(error), str(error))
    text = str(error)
    # By name: the class is torch's, which is not imported here.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    number = _foreign_number(text)
    return None if number is None else _line(number, _foreign_path(text), text)


def _foreign_number(text: str) -> int | None:
    """Find the system's error number in the message of a library; None without one."""
    # Rust's libraries write the number out.
    written = re.search(r"os error (\d+)", text)
    if written:
        return int(written.group(1))
    phrases = {**FOREIGN, **{os.strerror(number): number for number in FOREIGN_NUMBERS}}
    return next((number for phrase, number in phrases.items() if phrase in text), None)


def _foreign_path(text: str) -> Path | None:
    """Find the file that a library's message names; None without one.

    FAISS writes `write error in /x/y: …`, safetensors `at path "/x/y"`.
    """
    named = re.search(
        r"(?:write error in|could not open|at path) \"?(/[^\":]+?)\"?(?: for |:|$|\))",
        text,
    )
    return Path(named.group(1)) if named else None


def _path_of(error: OSError) -> Path | None:
    """Return the path of an error; None without one."""
    # The target of a rename is what the user knows; its source is a scratch file.
    name = error.filename2 or error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return Path(name) if isinstance(name, str | os.PathLike) and str(name) else None


def _written_file(error: OSError) -> Path | None:
    """Find the file that a failing write was for.

    Python does not name it. It is open in the innermost frame that has an open file.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        held = [
            *frame.f_locals.values(),
            *getattr(owner, "__dict__", {}).values(),
            getattr(owner, "file", None),
        ]
        for value in held:
            name = getattr(value, "name", None)
            mode = str(getattr(value, "mode", "")) if isinstance(value, io.IOBase) else ""
            if mode.startswith(("w", "x", "a")) and isinstance(name, str):
                return STANDARD_OUTPUT if name == "<stdout>" else Path(name)
    return None


def _line(number: int | None, path: Path | None, text: str) -> str:
    """Write the line for an error number: the path, what happened, the remedy."""
    given_paths = list(_given_paths())
    error_path = path or _likely_path(number, given_paths)
    given_path = None if error_path == STANDARD_OUTPUT else _given_for(error_path, given_paths)
    flag = given_path.flag if given_path else None
    # A scratch file or a folder above is not what the user gave.
    is_of_output = given_path is not None and given_path.is_output
    if given_path and is_of_output and not _is_below(error_path, given_path.path):
        shown = _shown(given_path.path)
    else:
        shown = _shown(error_path)
    other = f" or choose another {flag}" if flag else ""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left on {shown}: free space{other}, {AGAIN}"
        case errno.EFBIG:
            return (
                f"{shown}: a file is too large for the file system or the process (ulimit "
                f"-f): raise the limit{other}, {AGAIN}"
            )
        case errno.EROFS:
            return f"{shown} is on a read-only file system: remount it for writing{other}, {AGAIN}"
        case errno.EACCES | errno.EPERM:
            return f"{shown}: permission denied: permit reading and writing there{other}, {AGAIN}"
        case errno.EMFILE | errno.ENFILE:
            return f"{shown}: too many open files: raise the limit (ulimit -n 4096), {AGAIN}"
        case errno.ENAMETOOLONG:
            return f"{shown}: the name is too long for the file system: give a shorter one"
        case errno.ENOMEM:
            return OUT_OF_MEMORY
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY:
            file_above = _file_above(given_path.path) if given_path and is_of_output else None
            if file_above:
                return f"{shown}: {_shown(file_above)} is a file: give another {flag}"
            remedy = f"give another {flag}" if is_of_output else "give another path"
            return f"{shown}: {os.strerror(number).lower()}: {remedy}"
        case None:
            return f"{shown}: {' '.join(text.split())[:200]}: check the disk{other}, {AGAIN}"
        case _:
            return (
                f"{shown}: {os.strerror(number).lower()}: check the disk or the "
                f"network{other}, {AGAIN}"
            )


def _given_paths() -> Iterator[GivenPath]:
    """Yield the paths that the running command was given; those that it writes come first."""
    ctx = _called.get()
    if ctx is None:
        return
    outputs = [name for name in OUTPUTS if ctx.params.get(name) is not None]
    if len(outputs) > 1 and "store" in outputs:
        outputs.remove("store")  # it is read
    names = [*outputs, *(name for name in ctx.params if name not in outputs)]
    flags = {parameter.name: _flag(parameter) for parameter in ctx.command.params}
    for name in names:
        value = ctx.params[name]
        for item in value if isinstance(value, list | tuple) else [value]:
            # A URL of object storage is not a path, though it is an output.
            is_local_text = isinstance(item, str) and ":/" not in item
            if isinstance(item, Path) or (name in OUTPUTS and is_local_text):
                yield GivenPath(flag=flags[name], path=Path(item), is_output=name in outputs)


def _given_for(error_path: Path, given_paths: list[GivenPath]) -> GivenPath | None:
    """Return the given path that an error is of; None if none has to do with the error."""
    for given_path in given_paths:
        if _is_below(error_path, given_path.path):
            return given_path
    output_paths = [given_path for given_path in given_paths if given_path.is_output]
    # A scratch file of an output lies beside it; most are named after it.
    scratch_of = [
        given_path for given_path in output_paths if _scratch_name(error_path, given_path.path)
    ]
    for given_path in scratch_of:
        name = _scratch_name(error_path, given_path.path)
        if name.startswith(f".{given_path.path.name}."):
            return given_path
    if scratch_of:
        return scratch_of[0]
    # A folder above an output could not be made or searched.
    for given_path in output_paths:
        if _is_below(given_path.path, error_path):
            return given_path
    return None


def _scratch_name(error_path: Path, output: Path) -> str:
    """Return the name of the scratch file or folder beside an output that an error is of.

    It is empty if the error is of something else: other files beside an output can be inputs.
    """
    folder = output.absolute().parent
    if not error_path.absolute().is_relative_to(folder):
        return ""
    names = error_path.absolute().relative_to(folder).parts
    return names[0] if names and names[0].startswith(".") else ""


def _file_above(path: Path) -> Path | None:
    """Return the file that stands where a folder above `path` should be; None without one."""
    return next((folder for folder in path.parents if os.path.isfile(folder)), None)


def _flag(parameter: Any) -> str:
    if isinstance(parameter, TyperOption):
        return str(max(parameter.opts, key=len))
    return str(parameter.name).upper()


def _likely_path(number: int | None, given_paths: list[GivenPath]) -> Path:
    """Guess where an error without a path happened: a failing write does not name its file.

    Of a full disk it is what the command writes, or the folder of temporary files, whichever has
    less room.
    """
    outputs = [given_path.path for given_path in given_paths if given_path.is_output]
    candidates = [*outputs, Path(tempfile.gettempdir())]
    return min(candidates, key=_free_bytes) if number in NO_SPACE else candidates[0]


def _free_bytes(path: Path) -> int:
    """Return the free bytes of the file system where a path is, or would be."""
    absolute = path.absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if os.path.exists(folder))
    return shutil.disk_usage(existing).free


def _is_below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _shown(path: Path) -> str:
    """Return a path for a message: one line, and not too long."""
    text = "".join(c if c.isprintable() else "?" for c in str(path))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
