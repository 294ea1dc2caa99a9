"""A ring of worker processes around shared memory: tensors come back in order, whatever becomes of
a worker.

Workers are forked, so what they work on needs no pickling. They share one piece of anonymous memory
with their parent, which has no name and ends with the last of them, and two counters of the kernel
to wake each other. What stands in the memory is changed under a lock that the kernel takes back
from the dead. A worker dies with its parent.
"""

import ctypes
import faulthandler
import fcntl
import gc
import json
import mmap
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from apecache.errors import ApecacheError, RowError

Result = tuple[list[Tensor] | None, str, RowError | None]
"""Tensors or none, digest, and why there are none."""

CRASH = "decoder-crash"
HANG = "decoder-hang"
MESSAGE_BYTES = 4096
TICK_SECONDS = 0.5
IDLE_DEATHS = 5
"""So many workers may die before they have taken any work."""
PR_SET_PDEATHSIG = 1


def can_fork() -> bool:
    return sys.platform == "linux" and hasattr(os, "eventfd")


@contextmanager
def open_processes(
    work: Callable[[int], Result],
    count: int,
    shapes: Sequence[tuple[int, ...]],
    workers: int,
    ahead: int,
    hang_seconds: float,
) -> Iterator[Iterator[Result]]:
    """Results of `work` for 0 to `count` in this order, computed by `workers` processes, at most
    `ahead` in front.

    Tensors are float32 of the `shapes`, in memory that is used again when the next result is asked
    for. What dies over a position costs that position: `decoder-crash`, or `decoder-hang` after
    `hang_seconds`. Seconds are counted while the consumer waits and runs: a stopped and continued
    run loses nothing.

    Raises:
        RuntimeError: `work` raised; the message has its traceback. ApecacheError: no processes are
            to be had.
    """
    pool = _Pool(
        work,
        count=count,
        ring=_Ring(ahead, max(1, min(workers, count)), shapes),
        hang_seconds=hang_seconds,
    )
    try:
        pool.start()
        yield pool.results()
    finally:
        pool.close()


class _Ring:
    """What parent and workers share: `ahead` slots, of which position p has the one numbered p
    modulo `ahead`.

    `counts`: the next position to take, and the first that may not be taken yet. `current`: the
    position that each worker has taken, -1 for none. `lengths`: of each slot's message, 0 until it
    is done.
    """

    def __init__(self, ahead: int, workers: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self.ahead = ahead
        self.workers = workers
        sizes = [
            16,
            8 * workers,
            8 * ahead,
            MESSAGE_BYTES * ahead,
            *(4 * ahead * prod(shape) for shape in shapes),
        ]
        starts = [
            sum(-(-size // 64) * 64 for size in sizes[:place]) for place in range(len(sizes) + 1)
        ]
        memory = mmap.mmap(-1, starts[-1])
        self.counts = np.frombuffer(memory, np.int64, 2, starts[0])
        self.current = np.frombuffer(memory, np.int64, workers, starts[1])
        self.lengths = np.frombuffer(memory, np.int64, ahead, starts[2])
        self.messages = np.frombuffer(memory, np.uint8, MESSAGE_BYTES * ahead, starts[3]).reshape(
            ahead,
            MESSAGE_BYTES,
        )
        self.tensors = [
            torch.frombuffer(
                memory,
                dtype=torch.float32,
                count=ahead * prod(shape),
                offset=start,
            ).view(ahead, *shape)
            for start, shape in zip(starts[4:], shapes, strict=False)
        ]
        self.current[:] = -1
        self.lock = os.memfd_create("decoding")
        self.tokens = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self.news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        for handle in (self.lock, self.tokens, self.news):
            os.close(handle)

    @contextmanager
    def locked(self) -> Iterator[None]:
        fcntl.lockf(self.lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN)

    def allow(self, end: int) -> None:
        """Positions below `end` may be taken."""
        with self.locked():
            more = end - int(self.counts[1])
            self.counts[1] = end
        if more > 0:
            os.eventfd_write(self.tokens, more)

    def take(self, worker: int) -> int | None:
        with self.locked():
            position = int(self.counts[0])
            if position >= self.counts[1]:
                return None
            self.current[worker] = position
            self.counts[0] += 1
            return position

    def finish(self, worker: int, position: int, message: bytes) -> None:
        slot = position % self.ahead
        with self.locked():
            self.messages[slot, : len(message)] = np.frombuffer(message, np.uint8)
            self.lengths[slot] = len(message)
            self.current[worker] = -1
        os.eventfd_write(self.news, 1)

    def message(self, position: int) -> bytes:
        """Empty while the position is not done."""
        slot = position % self.ahead
        with self.locked():
            return self.messages[slot, : int(self.lengths[slot])].tobytes()

    def free(self, position: int) -> None:
        with self.locked():
            self.lengths[position % self.ahead] = 0

    def tensors_at(self, position: int) -> list[Tensor]:
        return [tensor[position % self.ahead] for tensor in self.tensors]


class _Worker:
    """`life` is a pipe that ends when the process does. `waited`: seconds that `position` has kept
    the parent."""

    def __init__(self, pid: int, life: int) -> None:
        self.pid = pid
        self.life = life
        self.position = -1
        self.waited = 0.0
        self.hung = False

    def wait(self, position: int, seconds: float, limit: float) -> None:
        """Count the seconds; kill what is over the limit."""
        self.waited = self.waited + seconds if position == self.position else 0.0
        self.position = position
        if position >= 0 and self.waited > limit and not self.hung:
            self.hung = True
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill it if it lives, and take its exit status: negative for a signal."""
        os.close(self.life)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # somebody else reaps all children of this process
            return 0


class _Pool:
    def __init__(
        self,
        work: Callable[[int], Result],
        count: int,
        ring: _Ring,
        hang_seconds: float,
    ) -> None:
        self.work = work
        self.count = count
        self.ring = ring
        self.hang_seconds = hang_seconds
        self.tick = min(TICK_SECONDS, hang_seconds / 4)
        self.workers: dict[int, _Worker] = {}
        self.idle_deaths = 0

    def start(self) -> None:
        self.ring.allow(min(self.count, self.ring.ahead))
        for number in range(self.ring.workers):
            self.workers[number] = self._fork(number)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()
        self.ring.close()

    def results(self) -> Iterator[Result]:
        for position in range(self.count):
            while not (message := self.ring.message(position)):
                self._wait()
            yield self._result(position, message)
            self.ring.free(position)
            self.ring.allow(min(self.count, position + 1 + self.ring.ahead))

    def _result(self, position: int, message: bytes) -> Result:
        told = json.loads(message)
        if "defect" in told:
            raise RuntimeError(f"in a decoding process:\n{told['defect']}")
        if told["reason"]:
            return None, told["digest"], RowError(told["reason"], told["detail"])
        return self.ring.tensors_at(position), told["digest"], None

    def _wait(self) -> None:
        """Until a worker has done something, or died, or a tick is over."""
        poll = select.poll()
        poll.register(self.ring.news, select.POLLIN)
        numbers = {worker.life: number for number, worker in self.workers.items()}
        for life in numbers:
            poll.register(life, select.POLLIN)
        begin = time.monotonic()
        ready = [handle for handle, _ in poll.poll(1000 * self.tick)]
        seconds = min(time.monotonic() - begin, 2 * self.tick)
        if self.ring.news in ready:
            os.eventfd_read(self.ring.news)
        for number, worker in self.workers.items():
            worker.wait(int(self.ring.current[number]), seconds, self.hang_seconds)
        for life in numbers.keys() & set(ready):
            self._replace(numbers[life])

    def _replace(self, number: int) -> None:
        """Bury the dead, write off what it had taken, and fork another."""
        dead = self.workers.pop(number)
        status = dead.end()
        with self.ring.locked():
            position = int(self.ring.current[number])
        if position < 0:
            self.idle_deaths += 1
            if self.idle_deaths > IDLE_DEATHS:
                raise ApecacheError(
                    f"decoding processes {_ended(status)} before they begin; use --workers 0 "
                    "(threads)"
                )
        else:
            reason = HANG if dead.hung else CRASH
            detail = (
                f"no end after {self.hang_seconds:g} s"
                if dead.hung
                else f"the decoder {_ended(status)}"
            )
            self.ring.finish(number, position, _message("", reason, detail))
        self.workers[number] = self._fork(number)
        os.eventfd_write(
            self.ring.tokens,
            1,
        )  # it may have died over one; one too many does no harm

    def _fork(self, number: int) -> _Worker:
        life, held = os.pipe()
        parent = os.getpid()
        old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            pid = _fork_quietly()
            if pid == 0:
                self._serve(number, parent)
        except OSError as error:
            os.close(life)
            message = (
                f"no process for decoding ({error.strerror}); use fewer --workers, or 0 (threads)"
            )
            raise ApecacheError(message) from None
        finally:
            os.close(held)
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return _Worker(pid, life)

    def _serve(self, number: int, parent: int) -> NoReturn:
        """The life of a worker."""
        try:
            _settle(parent)
            while True:
                os.eventfd_read(self.ring.tokens)
                position = self.ring.take(number)
                if position is not None:
                    self.ring.finish(number, position, self._done(position))
        except BaseException:
            os._exit(1)

    def _done(self, position: int) -> bytes:
        try:
            tensors, digest, error = self.work(position)
            if error is not None or tensors is None:
                return _message(
                    digest,
                    error.reason if error else "unusable",
                    error.detail if error else "",
                )
            for place, tensor in zip(self.ring.tensors_at(position), tensors, strict=True):
                if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                    raise TypeError(
                        f"{tensor.dtype} {tuple(tensor.shape)} in place of {tuple(place.shape)}"
                    )
                place.copy_(tensor)
            return _message(digest, "", "")
        except Exception:
            return _fitting({"defect": ""}, "defect", traceback.format_exc()[-MESSAGE_BYTES:])


def _settle(parent: int) -> None:
    """A worker's own ways: one thread, no output, no signals of the terminal, and no life without
    the parent."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    gc.freeze()  # what was there before is not touched, so that its memory stays shared


def _fork_quietly() -> int:
    """Tokenizers and newer Pythons warn of forks beside threads; workers use neither's threads."""
    configured = "TOKENIZERS_PARALLELISM" in os.environ
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        if not configured:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _ended(status: int) -> str:
    return (
        f"was ended by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with exit status {status}"
    )


def _message(digest: str, reason: str, detail: str) -> bytes:
    return _fitting({"digest": digest, "reason": reason, "detail": ""}, "detail", detail)


def _fitting(told: dict[str, Any], field: str, text: str) -> bytes:
    """JSON of at most MESSAGE_BYTES, the text cut to that."""
    while len(message := json.dumps({**told, field: text}).encode()) > MESSAGE_BYTES:
        text = text[: -max(1, len(text) // 8)]
    return message
