"""Stepping between the store and the operating system: every call that changes a folder passes
through here.

Only the process under test is touched, and only below one folder; the product has no hooks.
"""

import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Call:
    """`op` is open (of a new file), write, fsync, close, replace, link, unlink, mkdir or rmdir; paths are
    relative to the folder that is watched. `source` is where a replace or link comes from; `data`
    is what a write writes."""

    op: str
    path: str
    source: str = ""
    data: bytes = b""


Around = Callable[[Call, Callable[..., Any]], Any]
"""Is given a call and a function that performs it (for a write: or, given a number, so many bytes
of it); what it returns or raises is what the product sees."""

CHANGING = ("mkdir", "open", "write", "fsync", "replace", "link", "unlink", "rmdir")


@contextmanager
def intercepted(base: Path, around: Around) -> Iterator[None]:
    """Send the calls of `CHANGING` that concern `base` or anything below it through `around`.
    `base` is absolute."""
    real = {name: getattr(os, name) for name in ("close", *CHANGING)}
    # `shutil.rmtree` removes by descriptors where it can, and its calls would not be seen.
    by_descriptor = shutil._use_fd_functions  # type: ignore[attr-defined]
    opened: dict[int, str] = {}
    top = os.path.abspath(base)

    def below(path: Any) -> str | None:
        full = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if full == top:
            return "."
        return full[len(top) + 1 :] if full.startswith(top + os.sep) else None

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        name = below(path)
        perform = lambda: real["open"](path, flags, *args, **kwargs)  # noqa: E731
        if name is None:
            return int(perform())
        descriptor = (
            around(Call(op="open", path=name), perform) if flags & os.O_CREAT else perform()
        )
        opened[descriptor] = name
        return int(descriptor)

    def close(descriptor: int) -> None:
        opened.pop(descriptor, None)
        real["close"](descriptor)

    def write(descriptor: int, data: Any) -> int:
        if descriptor not in opened:
            return int(real["write"](descriptor, data))
        call = Call(op="write", path=opened[descriptor], data=bytes(data))
        return int(
            around(
                call,
                lambda part=None: real["write"](descriptor, data if part is None else data[:part]),
            )
        )

    def fsync(descriptor: int) -> None:
        if descriptor not in opened:
            real["fsync"](descriptor)
        else:
            around(Call(op="fsync", path=opened[descriptor]), lambda: real["fsync"](descriptor))

    def one(op: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            name = below(path)
            perform = lambda: real[op](path, *args, **kwargs)  # noqa: E731
            perform() if name is None else around(Call(op=op, path=name), perform)

        return call

    def two(op: str) -> Callable[..., None]:
        def call(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            name = below(target)
            perform = lambda: real[op](source, target, *args, **kwargs)  # noqa: E731
            perform() if name is None else around(
                Call(op=op, path=name, source=below(source) or ""),
                perform,
            )

        return call

    changed = {"open": open_, "close": close, "write": write, "fsync": fsync}
    changed |= {
        "mkdir": one("mkdir"),
        "rmdir": one("rmdir"),
        "unlink": one("unlink"),
        "replace": two("replace"),
        "link": two("link"),
    }
    try:
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        for name, function in changed.items():
            setattr(os, name, function)
        yield
    finally:
        shutil._use_fd_functions = by_descriptor  # type: ignore[attr-defined]
        for name, function in real.items():
            setattr(os, name, function)


@dataclass(kw_only=True)
class Kill:
    """SIGKILL to oneself at the `nth` call of `op` (any, if empty) whose path has `pattern` in it.

    `when`: before the call, after it, or halfway: with half of a write on the disk.
    """

    op: str = ""
    pattern: str = ""
    when: str = "before"
    nth: int = 1

    def __call__(self, call: Call, perform: Callable[..., Any]) -> Any:
        if self.op not in ("", call.op) or not re.search(self.pattern, call.path):
            return perform()
        self.nth -= 1
        if self.nth == 0 and self.when == "before":
            die()
        halfway = self.nth == 0 and self.when == "halfway" and call.op == "write"
        result = perform(len(call.data) // 2) if halfway else perform()
        if self.nth == 0:
            die()
        return result


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(kw_only=True)
class Fail:
    """The `nth` call fails with an error number and does nothing (a write: half of it).

    `failed` is that call, if it was reached.
    """

    nth: int
    number: int = errno.EIO
    failed: Call | None = None

    def __call__(self, call: Call, perform: Callable[..., Any]) -> Any:
        self.nth -= 1
        if self.nth == 0:
            self.failed = call
            if call.op == "write":  # a full disk takes what fits
                perform(len(call.data) // 2)
            raise OSError(self.number, os.strerror(self.number), call.path)
        return perform()


class SimulatedKill(BaseException):
    """Raised by `Stop` in place of a signal."""


@dataclass(kw_only=True)
class Stop:
    """A kill without a process: from the `nth` call on nothing reaches the disk, no cleaning up
    either."""

    nth: int
    then: Around

    def __call__(self, call: Call, perform: Callable[..., Any]) -> Any:
        self.nth -= 1
        if self.nth <= 0:
            raise SimulatedKill
        return self.then(call, perform)


def unsynced(around: Around | None = None) -> Around:
    """The same without waiting for the disk: where nobody cuts the power, fsync changes nothing but
    the time."""

    def call(call: Call, perform: Callable[..., Any]) -> Any:
        quick: Callable[..., Any] = (lambda: None) if call.op == "fsync" else perform
        return around(call, quick) if around else quick()

    return call
