"""Errors that the operating system causes, as one line each: what failed, on which path, and what
to do.

A full disk, a read-only folder, a missing permission or a limit of the process can end any command
at any write or read. They arrive as OSError, or as whatever a library makes of one. Everything else
stays a fault of the program, which ends with its traceback.
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
from itertools import chain
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

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
    """A path on the command line, the option or argument that it was given as, and whether the
    command writes it."""

    flag: str
    path: Path
    is_output: bool


_called: ContextVar[typer.Context | None] = ContextVar("called", default=None)


class Command(TyperCommand):
    """A command that takes each option once, and whose arguments are known to `explain`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an option that is given twice, unless it takes several values.

        The last value would win in silence, and the first is as likely to be the one that was
        meant.
        """
        if not ctx.resilient_parsing:
            _, _, occurrences = self.make_parser(ctx).parse_args(args=list(args))
            _require_once(ctx, occurrences)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        token = _called.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _called.reset(token)


def _require_once(ctx: Any, occurrences: Sequence[Any]) -> None:
    seen: list[Any] = []
    for parameter in occurrences:
        takes_one = isinstance(parameter, TyperOption) and not (
            parameter.multiple or parameter.is_eager
        )
        if takes_one and parameter in seen:
            flag = "/".join((*parameter.opts, *parameter.secondary_opts))
            limit = "give it once" if parameter.is_flag else "it takes one value"
            ctx.fail(f"{flag} is given twice; {limit}")
        seen.append(parameter)


def explain(error: BaseException) -> str | None:
    """One line for an error of the system: the path, what happened, the remedy. None for any other
    error."""
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, OSError):
        return _line(error.errno, _path_of(error) or _written_file(error), str(error))
    text = str(error)
    if (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    ):  # of torch, which is not imported
        return OUT_OF_MEMORY
    number = _foreign_number(text)
    return None if number is None else _line(number, _foreign_path(text), text)


def _foreign_number(text: str) -> int | None:
    """The system's error number in the message of a library; Rust's libraries write it out."""
    written = re.search(r"os error (\d+)", text)
    if written:
        return int(written.group(1))
    phrases = {**FOREIGN, **{os.strerror(number): number for number in FOREIGN_NUMBERS}}
    return next((number for phrase, number in phrases.items() if phrase in text), None)


def _foreign_path(text: str) -> Path | None:
    """The file that FAISS (`write error in /x/y: …`) or safetensors (`at path "/x/y"`) names."""
    named = re.search(
        r"(?:write error in|could not open|at path) \"?(/[^\":]+?)\"?(?: for |:|$|\))",
        text,
    )
    return Path(named.group(1)) if named else None


def _path_of(error: OSError) -> Path | None:
    """The target of a rename is what the user knows, its source a scratch file."""
    name = error.filename2 or error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return Path(name) if isinstance(name, str | os.PathLike) and str(name) else None


def _written_file(error: OSError) -> Path | None:
    """The file that a failing write was for. Python does not say; the innermost frame that has it
    open does."""
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
            is_written = isinstance(value, io.IOBase) and str(
                getattr(value, "mode", "")
            ).startswith(("w", "x", "a"))
            if is_written and isinstance(name, str):
                return STANDARD_OUTPUT if name == "<stdout>" else Path(name)
    return None


def _line(number: int | None, path: Path | None, text: str) -> str:
    given = list(_given_paths())
    where = path or _likely_path(number, given)
    flag = None if where == STANDARD_OUTPUT else _flag_for(where, given)
    shown = _shown(where)
    other = f" or choose another {flag}" if flag else ""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left on {shown}: free space{other}, {AGAIN}"
        case errno.EFBIG:
            return (
                f"{shown}: a file is too large for the file system or the process (ulimit "
                f"-f): raise it{other}, {AGAIN}"
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
            return f"{shown}: {os.strerror(number).lower()}: give another path"
        case None:
            return f"{shown}: {' '.join(text.split())[:200]}: check the disk{other}, {AGAIN}"
        case _:
            return (
                f"{shown}: {os.strerror(number).lower()}: check the disk or the "
                f"network{other}, {AGAIN}"
            )


def _given_paths() -> Iterator[GivenPath]:
    """What the running command was given as paths; what it writes comes first."""
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
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path) or (
                name in OUTPUTS and isinstance(one, str) and ":/" not in one
            ):
                yield GivenPath(flag=flags[name], path=Path(one), is_output=name in outputs)


def _flag_for(where: Path, given: list[GivenPath]) -> str | None:
    """The option that takes another path. A scratch file of an output lies beside it."""
    below = (one.flag for one in given if _is_below(where, one.path))
    beside = (one.flag for one in given if one.is_output and _is_below(where, one.path.parent))
    return next(chain(below, beside), None)


def _flag(parameter: Any) -> str:
    if isinstance(parameter, TyperOption):
        return str(max(parameter.opts, key=len))
    return str(parameter.name).upper()


def _likely_path(number: int | None, given: list[GivenPath]) -> Path:
    """Where an error without a path happened: a failing write does not say into which file.

    Of a full disk it is what the command writes, or the folder of temporary files, wherever there
    is least room.
    """
    outputs = [one.path for one in given if one.is_output]
    candidates = [*outputs, Path(tempfile.gettempdir())]
    return min(candidates, key=_free_bytes) if number in NO_SPACE else candidates[0]


def _free_bytes(path: Path) -> int:
    """Room on the file system where a path is, or would be."""
    absolute = path.absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if os.path.exists(folder))
    return shutil.disk_usage(existing).free


def _is_below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _shown(path: Path) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(path))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
