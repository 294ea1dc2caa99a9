"""Describe what is wrong with an object of a store."""

from dataclasses import dataclass
from typing import Literal

from apecache.fingerprint import Modality

Kind = Literal["damaged", "missing", "unsealed", "uncommitted", "temporary", "foreign"]
"""What is wrong with an object.

damaged, missing: what a record promises is not there. unsealed: all shards are committed, but the
seal is missing (a run was killed just before its end), so the array cannot be loaded yet; or a view
lacks the copy of its record. uncommitted: chunks of a shard, or columns of a view, without a record
(of a killed run; the next run writes them again). temporary: left by a killed writer. foreign: not
of apecache.
"""
HARMFUL: tuple[Kind, ...] = ("damaged", "missing")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Describe what is wrong with one object."""

    kind: Kind
    object: str
    """Path of the object below the store."""
    detail: str
    array: tuple[Modality, str] | None = None
    """Modality and name of the array that the object belongs to."""
    shard: int | None = None
    """Shard that the object belongs to."""

    @property
    def harmful(self) -> bool:
        return self.kind in HARMFUL
