"""The few operations that a store is made of. `storage.local` has them on the files of a folder,
`storage.object_files` on object storage.

Everything a store keeps goes through here: whole objects, written durably or not at all, and the
put-if-absent that commits them. A name is a path relative to the store's root and uses `/`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

Buffer = bytes | memoryview
TEMPORARY = ".tmp-"


class Files(Protocol):
    """A place that keeps objects. What is written or created stands, whole, whatever happens after
    the return.

    All methods but the first six raise StoreError where the place refuses, with what mends it.
    """

    @property
    def place(self) -> str | Path:
        """The root: a folder or a URL."""

    def where(self, name: str) -> str:
        """An object as people name it."""

    def child(self, folder: str) -> "Files":
        """A folder below as a place of its own."""

    def hint(self) -> str:
        """`; did you mean …?` for what lies beside a root that is not there, else nothing."""

    def free_bytes(self) -> int | None:
        """Room that is left; None where there is no telling."""

    @property
    def readers(self) -> int:
        """How many reads side by side pay."""

    def settle(self, folder: str) -> None:
        """Make durable what is in a folder, also what killed writers put there."""

    def exclusive(self, folder: str) -> AbstractContextManager[None]:
        """Keep other writers out of a folder while one that holds it works, where the place can do
        that. It is not what makes commits safe: put-if-absent decides who was first."""

    def prepare(self) -> None:
        """Called before a run writes anything: raises where no store can be kept."""

    def write(self, name: str, *buffers: Buffer) -> None:
        """Put one object, replacing what is there."""

    def create(self, name: str, *buffers: Buffer) -> bool:
        """Put one object only if there is none: True if it was put, also where another writer put
        the same bytes and nobody can tell."""

    def remove(self, name: str) -> None:
        """Remove one object, if it is there; gone for good after return."""

    def remove_folder(self, folder: str) -> None:
        """Remove everything below a folder."""

    def remove_temporary(self, *folders: str) -> None:
        """Remove what killed writers left in the root and anywhere below `folders`."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        """Objects in this order, read ahead where that pays. Raises as `read` does."""

    def read_into(
        self,
        name: str,
        views: Sequence[memoryview],
        seen: Callable[[memoryview], None],
    ) -> int:
        """Fill `views` one after another; returns the number of bytes read, plus one if the object
        is longer.

        `seen` is called with every block as it is read, in order, no block reaching over two views.
        Raises as `read`.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, folder: str) -> list[str]:
        """Names of the objects and folders in a folder, sorted, temporary ones left out; none if
        there is no such."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object anywhere below a folder, temporary ones too, by name and sorted."""
