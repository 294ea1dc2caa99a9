"""Worker processes and their parent: neither outlives the other, and what they share ends with
them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from apecache.data import processes
from apecache.data.decoding import PrefetchSpec, preprocess_ahead
from apecache.data.images import LoadedImage
from apecache.data.processes import Result, open_processes
from apecache.errors import ApecacheError

PARENT = """
import os, sys, time, torch
from apecache.data.processes import open_processes

def work(position):
    if position == 1:
        {moment}
    return [torch.zeros(2)], str(os.getpid()), None

with open_processes(work, [(2,)], 2, 4, 1000.0) as results_of:
    results = results_of(range(10**6))
    print(*sorted({{next(results)[1]}}), flush=True)
    for result in results:
        {after}
"""


@contextmanager
def in_order(
    work: Callable[[int], Result],
    count: int,
    **settings: Any,
) -> Iterator[Iterator[Result]]:
    """Yield the results of the items 0 to `count` - 1."""
    with open_processes(work, **settings) as results_of:
        yield results_of(range(count))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        ("time.sleep(1000)", "pass"),
        ("time.sleep(0)", "pass"),
        ("time.sleep(0)", "time.sleep(1000)"),
    ],
    ids=["a worker hangs", "all are busy", "workers wait"],
)
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(by: signal.Signals, moment: str, after: str) -> None:
    code = PARENT.format(moment=moment, after=after)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a job in the background inherits it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        workers = children_of(parent.pid)
        assert len(workers) == 2
        parent.send_signal(by)
        _, told = parent.communicate(timeout=20)
    except BaseException:
        parent.kill()
        parent.communicate()
        raise
    if by is not signal.SIGINT:  # an interrupt shows where the parent was
        assert told == ""
    assert told.count("Traceback") == (by is signal.SIGINT)
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))


def test_an_interrupt_of_the_terminal_reaches_the_parent_only() -> None:
    def work(position: int) -> Result:
        os.kill(os.getpid(), signal.SIGINT)
        return [torch.full((2,), float(position))], "", None

    with in_order(
        work,
        count=20,
        shapes=[(2,)],
        workers=2,
        ahead=4,
        hang_seconds=5.0,
    ) as results:
        assert [int(values[0][0]) for values, _, error in results if values] == list(range(20))


def test_workers_killed_from_outside_cost_at_most_the_row_that_they_were_at() -> None:
    def work(position: int) -> Result:
        time.sleep(0.002)
        return [torch.full((2,), float(position))], str(os.getpid()), None

    lost = 0
    with in_order(
        work,
        count=400,
        shapes=[(2,)],
        workers=3,
        ahead=8,
        hang_seconds=5.0,
    ) as results:
        for position, (values, _, error) in enumerate(results):
            if values is None:
                assert error is not None
                assert error.reason == "decoder-crash"
                lost += 1
            else:
                assert values[0].tolist() == [position, position]
            if position % 40 == 20:
                os.kill(children_of(os.getpid())[-1], signal.SIGKILL)
    assert lost <= 10


def test_workers_that_are_killed_while_they_wait_end_no_long_run() -> None:
    def work(position: int) -> Result:
        return [torch.full((2,), float(position))], "", None

    others = set(children_of(os.getpid()))  # of other tests in this process
    with in_order(
        work,
        count=processes.IDLE_DEATHS,
        shapes=[(2,)],
        workers=2,
        ahead=1,
        hang_seconds=5.0,
    ) as results:
        for _ in results:
            # Nothing may be begun before this result is taken back, so the workers wait.
            time.sleep(0.05)
            for worker in set(children_of(os.getpid())) - others:
                os.kill(worker, signal.SIGKILL)


def test_workers_that_die_before_they_begin_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_settle", lambda parent: os._exit(3))
    others = children_of(os.getpid())  # of other tests in this process
    with (
        pytest.raises(
            ApecacheError,
            match="ended with exit status 3 before they begin; use --workers 0",
        ),
        in_order(
            lambda position: ([], "", None),
            count=3,
            shapes=[],
            workers=2,
            ahead=4,
            hang_seconds=5.0,
        ) as results,
    ):
        next(results)
    assert set(children_of(os.getpid())) <= set(others)


def test_no_more_workers_are_forked_than_there_is_work() -> None:
    others = children_of(os.getpid())  # of other tests in this process
    with preprocess_ahead(
        ["a", "b"],
        load=lambda key: LoadedImage(image=key, digest=key),
        preprocess=lambda loaded: [torch.zeros(1)],
        shapes=[(1,)],
        ahead=PrefetchSpec(workers=50, images=4, hang_seconds=5.0),
    ) as results:
        next(results)
        assert len(set(children_of(os.getpid())) - set(others)) == 2


def test_processes_stay_from_one_call_to_the_next() -> None:
    """As an actor of a cluster needs them: rows of one shard, and later those of another one."""

    def work(item: int) -> Result:
        if item == 7:
            os._exit(9)
        return [torch.full((1,), float(item))], str(os.getpid()), None

    with open_processes(work, shapes=[(1,)], workers=2, ahead=3, hang_seconds=5.0) as results_of:
        workers: list[set[str]] = []
        for items in ([5, 3, 11, 2, 4], [], [1], list(range(20, 60))):
            results = [
                (values[0].item(), digest, error)
                for values, digest, error in results_of(items)
                if values
            ]
            assert [value for value, _, _ in results] == items
            workers.append({digest for _, digest, _ in results})
        assert set.union(*workers) <= set(map(str, children_of(os.getpid())))
        # A worker that dies costs its item alone, in this call and in the next one.
        lost = [error.reason if error else None for _, _, error in results_of([6, 7, 8])]
        assert lost == [None, "decoder-crash", None]
        # A consumer may take as many results as it has asked for and never end the iteration.
        for _ in range(3):
            results = results_of([9, 10])
            assert [next(results)[0][0].item(), next(results)[0][0].item()] == [9, 10]


def test_a_worker_computes_with_one_thread() -> None:
    def work(position: int) -> Result:
        return [torch.tensor([float(torch.get_num_threads())])], "", None

    with in_order(
        work,
        count=1,
        shapes=[(1,)],
        workers=1,
        ahead=1,
        hang_seconds=5.0,
    ) as results:
        values, _, _ = next(results)
        assert values is not None
        assert values[0].item() == 1


def test_memory_does_not_grow_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work(position: int) -> Result:
        return [torch.zeros(250_000)], "", None

    with in_order(
        work,
        count=600,
        shapes=[(250_000,)],
        workers=2,
        ahead=8,
        hang_seconds=5.0,
    ) as results:
        for _ in range(50):
            next(results)
        before = resident()
        for _ in results:
            pass
        assert resident() - before < 20e6  # 550 results are 550 MB
