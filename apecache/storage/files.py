"""Define the few operations on files that a store needs.

`storage.local_files` implements them on the files of a folder, `storage.object_files` on object
storage. Everything a store holds goes through them: whole objects, written durably or not at all,
and the put-if-absent that commits them. A name is a path relative to the store's root and uses `/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

Buffer = bytes | memoryview
TEMPORARY = ".tmp-"
PutStaged = Callable[[Iterable[str]], None]
"""Put staged objects of these names in their places; they are durable when it returns."""


@runtime_checkable
class Files(Protocol):
    """Read and write whole objects in one place.

    An object that is written or created is durable when the method returns. All methods but the
    first six raise StoreError where the place refuses, with what repairs it.
    """

    @property
    def place(self) -> str | Path:
        """Return the root: a folder or a URL."""

    def where(self, name: str) -> str:
        """Return the full path or URL of an object, for messages."""

    def child(self, folder: str) -> "Files":
        """Return a folder below the root as a place of its own."""

    def hint(self) -> str:
        """Return `; did you mean …?` if the root is missing and a neighbor has a similar name."""

    def free_bytes(self) -> int | None:
        """Return the free bytes of the place; None if that is unknown."""

    @property
    def readers(self) -> int:
        """Return the number of parallel reads that are worth it."""

    def settle(self, folder: str) -> None:
        """Make the objects of a folder durable, also those of killed writers."""

    def exclusive(self, folder: str) -> AbstractContextManager[None]:
        """Lock a folder against other writers, if the place has locks.

        Commits are safe without the lock, because put-if-absent decides who was first.
        """

    def prepare(self) -> None:
        """Check, before a run writes anything, that the place can hold a store."""

    def write(self, name: str, *buffers: Buffer) -> None:
        """Write one object in place of the old one."""

    def stage(
        self,
        objects: Mapping[str, Sequence[Buffer]],
    ) -> AbstractContextManager[PutStaged]:
        """Write objects where no reader looks, and yield what puts them in their places.

        So the slow part, the data, is written before a lock is taken, and the entries of a folder
        are made durable together. What was not put when the block ends is removed.
        """

    def put_if_absent(self, name: str, *buffers: Buffer) -> bool:
        """Write one object only if there is none.

        Returns:
            Whether the object was written. It may also be True if another writer wrote the same
            bytes.
        """

    def remove(self, name: str) -> None:
        """Remove one object, durably, if it is there."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with everything below it, durably.

        Raises:
            StoreError: A file cannot be removed.
        """

    def remove_temporary(self, *folders: str) -> None:
        """Remove the temporary files of killed writers in the root and anywhere below `folders`."""

    def read(self, name: str) -> bytes:
        """Return the bytes of an object; raises FileNotFoundError if there is none."""

    def digest(self, name: str) -> str:
        """Return the BLAKE3 of an object as it is stored; raises as `read` does."""

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yield objects in this order, read ahead where that is faster; raises as `read` does."""

    def read_into(
        self,
        name: str,
        views: Sequence[memoryview],
        seen: Callable[[memoryview], None],
    ) -> int:
        """Read an object into buffers; raises as `read` does.

        Args:
            name: The object.
            views: Buffers to fill one after another.
            seen: Called with every block in order, as it is read. No block extends over two views.

        Returns:
            Number of bytes read, plus one if the object is longer than the views.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, folder: str) -> list[str]:
        """Return the sorted names of the objects and folders in a folder, without temporary ones.

        The list is empty if there is no such folder.
        """

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every object below a folder, also temporary ones, sorted by name."""
