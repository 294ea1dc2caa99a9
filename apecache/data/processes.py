"""Run worker processes around shared memory: tensors come back in order, even if workers die.

Workers are forked, so what they work on needs no pickling. They share one block of anonymous memory
with their parent, which is freed when the last process ends, and two kernel counters to wake each
other. The memory is changed under a lock that the kernel releases when its holder dies. A worker
dies with its parent.
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
from itertools import accumulate
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
"""Number of workers that may die without work before another result comes."""
PR_SET_PDEATHSIG = 1


def can_fork() -> bool:
    """Return whether this system has what the workers need."""
    return sys.platform == "linux" and hasattr(os, "eventfd")


@contextmanager
def open_processes(
    work: Callable[[int], Result],
    shapes: Sequence[tuple[int, ...]],
    workers: int,
    ahead: int,
    hang_seconds: float,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Callable[[Sequence[int]], Iterator[Result]]]:
    """Start processes, and yield a function that gives the results of `work` for items, in order.

    The function can be called again once all results of the call before have been taken: the
    processes stay. A worker that dies loses the item that it worked on, with the reason
    `decoder-crash`, or `decoder-hang` if it was killed after `hang_seconds`. Seconds count only
    while the consumer waits and runs, so a stopped and continued run loses nothing.

    Args:
        work: Computes one item in a worker.
        shapes: Shapes of the tensors of each result. Their memory is used again when the
            next result is asked for.
        workers: Number of processes.
        ahead: Largest number of results in front of the consumer.
        hang_seconds: How long a worker may take for one item.
        dtype: Of all tensors.

    Raises:
        RuntimeError: `work` raised; the message has its traceback.
        ApecacheError: The system starts no processes.
    """
    ring = _Ring(ahead, workers=max(1, workers), shapes=shapes, dtype=dtype)
    pool = _WorkerPool(work, ring=ring, hang_seconds=hang_seconds)
    try:
        pool.start()
        yield pool.results
    finally:
        pool.close()


class _Ring:
    """Hold what parent and workers share: `ahead` slots; position p uses slot p modulo `ahead`.

    Positions count the items of all calls.

    Attributes:
        counts: int64 [2]: the next position to take, and the first that may not be taken yet.
        current: int64 [workers]: the position that each worker has taken, -1 for none.
        items: int64 [ahead]: the item of each slot's position.
        lengths: int64 [ahead]: bytes of each slot's message, 0 until it is done.
        messages: uint8 [ahead, MESSAGE_BYTES]: the JSON messages.
        tensors: [ahead, *shape] for each shape.
    """

    def __init__(
        self,
        ahead: int,
        workers: int,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self.ahead = ahead
        self.workers = workers
        region_bytes = [
            16,
            8 * workers,
            8 * ahead,
            8 * ahead,
            MESSAGE_BYTES * ahead,
            *(dtype.itemsize * ahead * prod(shape) for shape in shapes),
        ]
        # Regions start at multiples of 64 bytes: no two of them share a cache line.
        aligned_bytes = [-(-size // 64) * 64 for size in region_bytes]
        starts = list(accumulate(aligned_bytes, initial=0))
        memory = mmap.mmap(-1, starts[-1])
        self.counts = np.frombuffer(memory, np.int64, 2, starts[0])
        self.current = np.frombuffer(memory, np.int64, workers, starts[1])
        self.items = np.frombuffer(memory, np.int64, ahead, starts[2])
        self.lengths = np.frombuffer(memory, np.int64, ahead, starts[3])
        messages = np.frombuffer(memory, np.uint8, MESSAGE_BYTES * ahead, starts[4])
        self.messages = messages.reshape(ahead, MESSAGE_BYTES)
        self.tensors: list[Tensor] = []
        for start, shape in zip(starts[5:], shapes, strict=False):
            tensor = torch.frombuffer(
                memory,
                dtype=dtype,
                count=ahead * prod(shape),
                offset=start,
            )
            self.tensors.append(tensor.view(ahead, *shape))
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

    def allow(self, items: Sequence[int]) -> None:
        """Let workers take the next positions, which are those of these items."""
        if not items:
            return
        with self.locked():
            first = int(self.counts[1])
            for position, item in enumerate(items, first):
                self.items[position % self.ahead] = item
            self.counts[1] = first + len(items)
        os.eventfd_write(self.tokens, len(items))

    def take(self, worker: int) -> int | None:
        """Return the next position for a worker; None if there is none yet."""
        with self.locked():
            position = int(self.counts[0])
            if position >= self.counts[1]:
                return None
            self.current[worker] = position
            self.counts[0] += 1
            return position

    def item(self, position: int) -> int:
        """Return the item of a position that a worker has taken."""
        with self.locked():
            return int(self.items[position % self.ahead])

    def finish(self, worker: int, position: int, message: bytes) -> None:
        """Store the message of a position that a worker had taken, and wake the parent."""
        slot = position % self.ahead
        with self.locked():
            self.messages[slot, : len(message)] = np.frombuffer(message, np.uint8)
            self.lengths[slot] = len(message)
            self.current[worker] = -1
        os.eventfd_write(self.news, 1)

    def message(self, position: int) -> bytes:
        """Return the message of a position; empty while the position is not done."""
        slot = position % self.ahead
        with self.locked():
            return self.messages[slot, : int(self.lengths[slot])].tobytes()

    def free(self, position: int) -> None:
        with self.locked():
            self.lengths[position % self.ahead] = 0

    def tensors_at(self, position: int) -> list[Tensor]:
        return [tensor[position % self.ahead] for tensor in self.tensors]


class _WorkerProcess:
    """Watch one worker process.

    Attributes:
        life: Read end of a pipe that closes when the process ends.
        position: The position that it works on, -1 for none.
        waited: Seconds that the parent has waited while it worked on `position`.
        hung: Whether it was killed for working too long.
    """

    def __init__(self, pid: int, life: int) -> None:
        self.pid = pid
        self.life = life
        self.position = -1
        self.waited = 0.0
        self.hung = False

    def wait(self, position: int, seconds: float, limit: float) -> None:
        """Count the seconds of a position; kill the process when they exceed the limit."""
        self.waited = self.waited + seconds if position == self.position else 0.0
        self.position = position
        if position >= 0 and self.waited > limit and not self.hung:
            self.hung = True
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill the process if it lives, and return its exit status: negative for a signal."""
        os.close(self.life)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(self.pid, 0)
            return os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            # Other code in this process reaps all its children.
            return 0


class _WorkerPool:
    """Run the workers of one ring, and replace those that die."""

    def __init__(
        self,
        work: Callable[[int], Result],
        ring: _Ring,
        hang_seconds: float,
    ) -> None:
        self.work = work
        self.ring = ring
        self.n_taken = 0
        self.held: int | None = None
        self.hang_seconds = hang_seconds
        self.tick = min(TICK_SECONDS, hang_seconds / 4)
        self.workers: dict[int, _WorkerProcess] = {}
        self.idle_deaths = 0

    def start(self) -> None:
        for number in range(self.ring.workers):
            self.workers[number] = self._fork(number)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()
        self.ring.close()

    def results(self, items: Sequence[int]) -> Iterator[Result]:
        """Yield the results of these items; all results of the call before have been taken."""
        # A consumer that counts never comes back after the last result of a call.
        self._release()
        self.ring.allow(items[: self.ring.ahead])
        for index in range(len(items)):
            position = self.n_taken
            while not (message := self.ring.message(position)):
                self._wait()
            self.n_taken += 1
            # Deaths in a row count: over days some workers are killed while they wait.
            self.idle_deaths = 0
            self.held = position
            yield self._result(position, message)
            self._release()
            next_index = index + self.ring.ahead
            self.ring.allow(items[next_index : next_index + 1])

    def _release(self) -> None:
        """Give the slot of the last result back."""
        if self.held is not None:
            self.ring.free(self.held)
            self.held = None

    def _result(self, position: int, message: bytes) -> Result:
        outcome = json.loads(message)
        if "defect" in outcome:
            raise RuntimeError(f"in a decoding process:\n{outcome['defect']}")
        if outcome["reason"]:
            return None, outcome["digest"], RowError(outcome["reason"], outcome["detail"])
        return self.ring.tensors_at(position), outcome["digest"], None

    def _wait(self) -> None:
        """Wait until a worker has finished a position or died, or a tick is over."""
        poll = select.poll()
        poll.register(self.ring.news, select.POLLIN)
        numbers = {worker.life: number for number, worker in self.workers.items()}
        for life in numbers:
            poll.register(life, select.POLLIN)
        begin = time.monotonic()
        ready = [handle for handle, _ in poll.poll(1000 * self.tick)]
        # The time of a process that was stopped meanwhile does not count as a worker's hang.
        seconds = min(time.monotonic() - begin, 2 * self.tick)
        if self.ring.news in ready:
            os.eventfd_read(self.ring.news)
        for number, worker in self.workers.items():
            worker.wait(int(self.ring.current[number]), seconds, self.hang_seconds)
        for life in numbers.keys() & set(ready):
            self._replace(numbers[life])

    def _replace(self, number: int) -> None:
        """Fork a new worker for a dead one, and finish the position that it had taken."""
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
            reason = CRASH
            detail = f"the decoder {_ended(status)}"
            if dead.hung:
                reason = HANG
                detail = f"no end after {self.hang_seconds:g} s"
            self.ring.finish(number, position, _message("", reason, detail))
        self.workers[number] = self._fork(number)
        # The dead worker may have read a token without taking a position. A token too many does no
        # harm.
        os.eventfd_write(self.ring.tokens, 1)

    def _fork(self, number: int) -> _WorkerProcess:
        # The worker alone holds the write end, which closes when it ends, however it ends.
        life, write_end = os.pipe()
        parent = os.getpid()
        # Blocked until the worker has its own handlers: before that, a signal would run the
        # parent's handlers in the worker.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
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
            os.close(write_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        return _WorkerProcess(pid, life)

    def _serve(self, number: int, parent: int) -> NoReturn:
        """Work as a worker until the process ends."""
        try:
            _settle(parent)
            while True:
                os.eventfd_read(self.ring.tokens)
                position = self.ring.take(number)
                if position is not None:
                    self.ring.finish(number, position, self._done(position))
        except BaseException:
            # Not `sys.exit`: the worker must not run the parent's cleanup.
            os._exit(1)

    def _done(self, position: int) -> bytes:
        """Work on a position, write its tensors into the ring, and return its message."""
        try:
            tensors, digest, error = self.work(self.ring.item(position))
            if error is not None or tensors is None:
                reason = error.reason if error else "unusable"
                detail = error.detail if error else ""
                return _message(digest, reason, detail)
            for slot_tensor, tensor in zip(self.ring.tensors_at(position), tensors, strict=True):
                if (tensor.shape, tensor.dtype) != (slot_tensor.shape, slot_tensor.dtype):
                    expected_shape = tuple(slot_tensor.shape)
                    raise TypeError(
                        f"{tensor.dtype} {tuple(tensor.shape)} in place of {expected_shape}"
                    )
                slot_tensor.copy_(tensor)
            return _message(digest, "", "")
        except Exception:
            text = traceback.format_exc()[-MESSAGE_BYTES:]
            return _fitting({"defect": ""}, "defect", text)


def _settle(parent: int) -> None:
    """Set up a worker: one thread, no output, no terminal signals, and an end with the parent."""
    torch.set_num_threads(1)
    # The parent may have died before this call, so its id is compared afterwards.
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
    # Collections then do not touch the parent's objects, whose memory stays shared.
    gc.freeze()


def _fork_quietly() -> int:
    """Fork without the warnings of tokenizers and newer Pythons about forks beside threads.

    Workers use none of these threads.
    """
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
    """Describe how a process ended; a negative status is a signal."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _message(digest: str, reason: str, detail: str) -> bytes:
    return _fitting({"digest": digest, "reason": reason, "detail": ""}, "detail", detail)


def _fitting(fields: dict[str, Any], field: str, text: str) -> bytes:
    """Return JSON of at most MESSAGE_BYTES, with the text of one field shortened to fit."""
    while len(message := json.dumps({**fields, field: text}).encode()) > MESSAGE_BYTES:
        text = text[: -max(1, len(text) // 8)]
    return message
