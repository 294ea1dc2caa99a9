"""The few file operations that a store is made of. An object store can take this class's place.

Everything a store keeps goes through here: whole objects, written durably or not at all, and the put-if-absent that
commits them. A path is relative to the store's root and uses `/`.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from apecache.errors import StoreError

Buffer = bytes | memoryview
TEMPORARY = ".tmp-"


class LocalFiles:
    """Durable objects in a local folder: temporary file, fsync, rename or link, fsync of the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        return self.root / name

    def write(self, name: str, *buffers: Buffer) -> None:
        """Put one object, replacing what is there. After return it survives a power cut.

        Raises:
            StoreError: the operating system refused (disk full, no permission, …); what was there before stands.
        """
        with self._explained(name):
            temporary = self._write_temporary(name, buffers)
            with self._removing(temporary):
                os.replace(temporary, self.path(name))
            self._sync_folder(self.path(name).parent)

    def create(self, name: str, *buffers: Buffer) -> bool:
        """Put one object only if there is none: True if it was put. After True it survives a power cut.

        Raises:
            StoreError: as for `write`.
        """
        with self._explained(name):
            temporary = self._write_temporary(name, buffers)
            with self._removing(temporary):
                try:
                    os.link(temporary, self.path(name))
                except FileExistsError:
                    os.unlink(temporary)
                    return False
                os.unlink(temporary)
            self._sync_folder(self.path(name).parent)
            return True

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        return self.path(name).read_bytes()

    def read_into(self, name: str, views: Sequence[memoryview]) -> int:
        """Fill `views` one after another; returns the number of bytes read, plus one if the object is longer."""
        with self.path(name).open("rb", buffering=0) as file:
            total = sum(_read_full(file.fileno(), view) for view in views)
            return total + len(os.read(file.fileno(), 1))

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def list(self, folder: str) -> list[str]:
        """Names of the objects in a folder, sorted, temporary ones left out; none if there is no such folder."""
        try:
            return sorted(name for name in os.listdir(self.path(folder)) if not name.startswith(TEMPORARY))
        except FileNotFoundError:
            return []

    def _write_temporary(self, name: str, buffers: Sequence[Buffer]) -> Path:
        folder = self.path(name).parent
        self._make_folder(folder)
        temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with self._removing(temporary):
            try:
                for buffer in buffers:
                    _write_full(descriptor, memoryview(buffer).cast("B"))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return temporary

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each entry made durable in its own parent."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        self._sync_folder(folder.parent)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _removing(self, temporary: Path) -> Iterator[None]:
        """Remove the temporary file if the step fails."""
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.path(name)
            remedy = "make room or permit writing, then run the same command again; committed shards stand"
            raise StoreError(f"{where}: {error.strerror or error}; {remedy}") from error


def _write_full(descriptor: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def _read_full(descriptor: int, view: memoryview) -> int:
    done = 0
    while done < view.nbytes:
        count = os.readv(descriptor, [view[done:]])
        if not count:
            break
        done += count
    return done
