"""I/O errors: each single system call of a run fails in turn."""

import errno
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from apecache.errors import StoreError
from apecache.storage.files import TEMPORARY
from apecache.storage.local_files import LocalFiles
from apecache.store.views import view_ids, view_number
from benchmarks.reliability.injection.kill import check, committed
from benchmarks.reliability.injection.syscalls import Call, Fail, intercepted, unsynced
from benchmarks.reliability.injection.tower import TowerSpec, cached_tables, run, tree

NUMBERS = (errno.ENOSPC, errno.EIO, errno.EFBIG)


@dataclass(kw_only=True)
class ErrorResult:
    """`failed` counts the calls that were made to fail, by their name."""

    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def failing_calls(
    folder: Path,
    spec: TowerSpec,
    numbers: tuple[int, ...] = NUMBERS,
    every: bool = False,
) -> ErrorResult:
    """Call after call fails, with one of the error numbers in turn or (`every`) with each of
    them."""
    result = ErrorResult()
    with cached_tables(), intercepted(folder, unsynced()):
        run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    for number in range(len(numbers) if every else 1):
        nth = 1
        while _fail(
            folder / f"{number}-{nth}",
            spec=spec,
            nth=nth,
            number=numbers[(number + nth) % len(numbers)],
            wanted=wanted,
            result=result,
        ):
            nth += 1
    return result


def _fail(
    store: Path,
    spec: TowerSpec,
    nth: int,
    number: int,
    wanted: dict[str, bytes],
    result: ErrorResult,
) -> bool:
    """One run with an error and one without; False if the run has fewer than `nth` calls."""
    fail = Fail(nth=nth, number=number)
    promised = set[str]()
    error = None
    with cached_tables():
        try:
            with intercepted(store.parent, unsynced(fail)):
                run(store, spec, acknowledge=promised.add)
        except Exception as caught:
            error = caught
        if fail.failed is None:
            return False
        result.failed[fail.failed.op] += 1
        result.wrong += [
            f"{fail.failed}: {what}"
            for what in _judge(
                store,
                spec=spec,
                call=fail.failed,
                number=number,
                error=error,
                promised=promised,
            )
        ]
        with intercepted(store.parent, unsynced()):
            run(store, spec)
    if tree(store) != wanted:
        result.wrong.append(f"{fail.failed}: the next run ends with another store")
    shutil.rmtree(store)
    return True


def _judge(
    store: Path,
    spec: TowerSpec,
    call: Call,
    number: int,
    error: Exception | None,
    promised: set[str],
) -> list[str]:

    wrong = []
    text = str(error)
    if not isinstance(error, StoreError) or "\n" in text:
        wrong.append(f"ended with {type(error).__name__}: {text}")
    elif (
        str(store) not in text
        or os.strerror(number) not in text
        or "run the same command again" not in text
    ):
        wrong.append(f"says only: {text}")
    if call.op != "unlink":  # it is that very file
        wrong += [f"{path.name} is left" for path in store.rglob(f"{TEMPORARY}*")]
    present = committed(store, spec).keys() | _views(store)
    # Shards and views are numbered; other promises are checked with them.
    numbered = {what for what in promised if what.rpartition("/")[2].isdecimal()}
    wrong += [f"{what} was committed and is not there" for what in sorted(numbered - present)]
    return wrong + check(store, spec, {}, begun=1)


def _views(store: Path) -> set[str]:
    """Return the views of a store as `tower.run` acknowledges them."""
    return {f"view/{view_number(view_id)}" for view_id in view_ids(LocalFiles(store))}
