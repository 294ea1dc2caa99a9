"""Fill arrays by a pool, on the driver: hand out shards, count what comes back, seal.

The workers commit what they encode, by the protocol of the store, and only report it to the driver.
Whatever process dies, what is committed stays: the records tell this driver, or the next one, which
shards are missing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apecache.cluster.pool import ActorPool
from apecache.errors import EngineError
from apecache.fingerprint import Modality
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter

SEEN_SECONDS = 90.0
"""How long a network file system may hide a new file from others that have listed its folder (NFS:
60 s by default)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Name the arrays of one segment that are filled in one pass."""

    folder: str | Path
    """Of the segment."""
    job: int
    """Number of the pass, among those of the segment and modality."""
    modality: Modality
    names: tuple[str, ...]
    """Of the arrays."""


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """Ask an actor for one shard of all arrays of a task."""

    task: Task
    shard: int

    def __str__(self) -> str:
        return f"shard {self.shard} of {self.task.modality}/{', '.join(self.task.names)}"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Report a committed shard to the driver."""

    n_bad: int = 0
    n_truncated: int = 0


class TaskState:
    """Follow a task on the driver.

    `missing` has, for each shard that is to be encoded, the names of the arrays that lack it.
    """

    def __init__(self, task: Task) -> None:
        store = FeatureStore.block(open_files(task.folder))
        arrays = [store.array(task.modality, name) for name in task.names]
        self.task = task
        self.files = store.files
        self.writers = [ArrayWriter(store.files, array.record) for array in arrays]
        self.layout = arrays[0].record.layout
        committed = {writer.record.name: writer.committed().keys() for writer in self.writers}
        self.missing: dict[int, tuple[str, ...]] = {}
        for shard in range(self.layout.n_shards):
            names = tuple(name for name, shards in committed.items() if shard not in shards)
            if names:
                self.missing[shard] = names

    @property
    def rows_done(self) -> int:
        """Return the number of rows that all arrays have."""
        return self.layout.rows - sum(len(self.layout.shard(shard)) for shard in self.missing)

    def seal(self) -> None:
        """Seal the arrays.

        Raises:
            EngineError: the driver does not see what the workers have committed.
        """
        deadline = time.monotonic() + SEEN_SECONDS
        for writer in self.writers:
            # An actor has answered for each of these shards; its node's files may show up late.
            while unseen := writer.pending():
                if time.monotonic() > deadline:
                    request = ShardRequest(task=self.task, shard=unseen[0])
                    raise EngineError(
                        f"{self.files.place} lacks {request}, which an actor has committed; the "
                        "store must be one and the same place on every node"
                    )
                time.sleep(0.5)
            writer.seal()


ShardCallback = Callable[[TaskState, int, tuple[str, ...], ShardReport], None]
"""Called for every shard that was encoded, with the arrays that lacked it."""


def fill(pool: ActorPool, task_states: Sequence[TaskState], on_shard: ShardCallback) -> None:
    """Have every missing shard encoded, and seal each array as soon as it is complete.

    Errors are those of `ActorPool.run` and `TaskState.seal`.
    """
    by_task = {task_state.task: task_state for task_state in task_states}
    for task_state in task_states:
        # An earlier driver may have ended between the last commit and the seal.
        if not task_state.missing:
            task_state.seal()
    for request, report in pool.run(_requests(task_states)):
        # A request carries its task alone: the state with its open files stays on the driver.
        task_state = by_task[request.task]
        on_shard(task_state, request.shard, task_state.missing.pop(request.shard), report)
        if not task_state.missing:
            task_state.seal()


def _requests(task_states: Sequence[TaskState]) -> Iterator[ShardRequest]:
    for task_state in task_states:
        # A list, as `fill` takes shards out of `missing` while requests are still handed out.
        for shard in list(task_state.missing):
            yield ShardRequest(task=task_state.task, shard=shard)
