"""Filling arrays by a pool: the driver's side. It hands out shards, counts what comes back, and
seals.

The workers commit what they encode, by the protocol of the store, and only tell the driver about
it. Whatever dies, what is committed stands: the records say what is left, to this driver or to the
next one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apecache.cluster.pool import Pool
from apecache.errors import EngineError
from apecache.fingerprint import Modality
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter

SEEN_SECONDS = 90.0
"""So long a network file system may keep a new file from others that have listed its folder (NFS:
60 by default)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Arrays of one segment that are filled in one pass: the `job`-th of the segment at
    `folder`."""

    folder: str | Path
    job: int
    modality: Modality
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardPiece:
    """What an actor is asked for: one shard of all arrays of a task."""

    task: Task
    shard: int

    def __str__(self) -> str:
        return f"shard {self.shard} of {self.task.modality}/{', '.join(self.task.names)}"


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """What an actor tells of a shard that is committed."""

    n_bad: int = 0
    n_truncated: int = 0


class Filling:
    """A task as the driver sees it. `missing`: arrays that lack a shard, for each shard that is to
    be encoded."""

    def __init__(self, task: Task) -> None:
        opened = FeatureStore.open(task.folder)
        arrays = [opened.array(task.modality, name) for name in task.names]
        self.task = task
        self.files = opened.files
        self.writers = [ArrayWriter(opened.files, array.record) for array in arrays]
        self.layout = arrays[0].record.layout
        committed = {writer.record.name: writer.committed().keys() for writer in self.writers}
        lacking = {
            shard: tuple(name for name, done in committed.items() if shard not in done)
            for shard in range(self.layout.n_shards)
        }
        self.missing = {shard: names for shard, names in lacking.items() if names}

    @property
    def rows_done(self) -> int:
        return self.layout.rows - sum(len(self.layout.shard(shard)) for shard in self.missing)

    def seal(self) -> None:
        """Raises EngineError if what the workers have committed is not to be seen here."""
        deadline = time.monotonic() + SEEN_SECONDS
        for writer in self.writers:
            while lost := writer.pending():
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{self.files.place} lacks {ShardPiece(task=self.task, shard=lost[0])}, "
                        "which an actor has committed; the "
                        "store must be one and the same place on every node"
                    )
                time.sleep(0.5)
            writer.seal()


Told = Callable[[Filling, int, tuple[str, ...], ShardDone], None]
"""Called for every shard that was encoded, with the arrays that lacked it."""


def fill(pool: Pool, fillings: Sequence[Filling], told: Told) -> None:
    """Have every missing shard encoded, and seal each array as soon as it is complete. Raises as
    `Pool.run` does."""
    by_task = {filling.task: filling for filling in fillings}
    for filling in fillings:
        if not filling.missing:
            filling.seal()
    for piece, done in pool.run(_pieces(fillings)):
        filling = by_task[piece.task]
        told(filling, piece.shard, filling.missing.pop(piece.shard), done)
        if not filling.missing:
            filling.seal()


def _pieces(fillings: Sequence[Filling]) -> Iterator[ShardPiece]:
    return (
        ShardPiece(task=filling.task, shard=shard)
        for filling in fillings
        for shard in list(filling.missing)
    )
