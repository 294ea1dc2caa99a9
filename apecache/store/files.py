"""The few operations that a store is made of, on the files of a folder; `store.objects` has them for object storage.

Everything a store keeps goes through here: whole objects, written durably or not at all, and the put-if-absent that
commits them. A name is a path relative to the store's root and uses `/`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from apecache.errors import StoreError, nearest
from apecache.objects import is_object_url, require_known_scheme

Buffer = bytes | memoryview
TEMPORARY = ".tmp-"
BLOCK_BYTES = 1 << 18
UNWRITABLE = (errno.EROFS, errno.EACCES)


class Files(Protocol):
    """A place that keeps objects. What is written or created stands, whole, whatever happens after the return.

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
        """Keep other writers out of a folder while one that holds it works, where the place can do that. It is not what
        makes commits safe: put-if-absent decides who was first."""

    def prepare(self) -> None:
        """Called before a run writes anything: raises where no store can be kept."""

    def write(self, name: str, *buffers: Buffer) -> None:
        """Put one object, replacing what is there."""

    def create(self, name: str, *buffers: Buffer) -> bool:
        """Put one object only if there is none: True if it was put, also where another writer put the same bytes and
        nobody can tell."""

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

    def read_into(self, name: str, views: Sequence[memoryview], seen: Callable[[memoryview], None]) -> int:
        """Fill `views` one after another; returns the number of bytes read, plus one if the object is longer.

        `seen` is called with every block as it is read, in order, no block reaching over two views. Raises as `read`.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, folder: str) -> list[str]:
        """Names of the objects and folders in a folder, sorted, temporary ones left out; none if there is no such."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object anywhere below a folder, temporary ones too, by name and sorted."""


def open_files(place: str | Path, alone: bool = False) -> Files:
    """The files of a folder, or the objects below `s3://BUCKET/…`, `gs://BUCKET/…` or `az://CONTAINER/…`.

    Args:
        alone: nobody else writes there, so that object storage without put-if-absent will do.

    Raises:
        StoreError: a URL that names no place. MissingExtraError: object storage without the extra `remote`.
    """
    require_known_scheme(place)
    if is_object_url(place):
        from apecache.store.objects import open_objects

        return open_objects(str(place), alone)
    return LocalFiles(Path(place))


class LocalFiles:
    """Durable objects in a local folder: temporary file, fsync, rename or link, fsync of the folder. See `Files`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._durable: set[Path] = set()

    @property
    def place(self) -> Path:
        return self.root

    def path(self, name: str) -> Path:
        return self.root / name

    def where(self, name: str) -> str:
        return str(self.path(name))

    def child(self, folder: str) -> "LocalFiles":
        return LocalFiles(self.path(folder))

    def hint(self) -> str:
        siblings = [path.name for path in self.root.parent.iterdir()] if self.root.parent.is_dir() else []
        return "" if self.root.exists() else nearest(self.root.name, siblings)

    def free_bytes(self) -> int:
        """On the disk where the root is, or would be."""
        there = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.exists())
        return shutil.disk_usage(there).free

    @property
    def readers(self) -> int:
        return 4

    def prepare(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root} is a file; give a folder as --store")

    def write(self, name: str, *buffers: Buffer) -> None:
        """After return it survives a power cut. Where the system refuses (disk full, no permission, …) there is the old
        object or the new one, whole."""
        with self._explained(name), self._temporary(name, buffers) as temporary:
            os.replace(temporary, self.path(name))
            self._sync_folder(self.path(name).parent)

    def create(self, name: str, *buffers: Buffer) -> bool:
        """After return it survives a power cut, also where another writer put it."""
        with self._explained(name):
            try:
                return self._put_if_absent(name, buffers)
            except OSError as error:
                # A finished store may lie on a read-only file system: what is there needs no writing.
                if error.errno not in UNWRITABLE or not self.path(name).exists():
                    raise
                return False

    def _put_if_absent(self, name: str, buffers: Sequence[Buffer]) -> bool:
        with self._temporary(name, buffers) as temporary:
            put = True
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                put = False  # by a writer that was perhaps killed before it made the entry durable: sync all the same
            os.unlink(temporary)
            self._sync_folder(self.path(name).parent)
            return put

    def settle(self, folder: str) -> None:
        with self._explained(folder):
            self._sync_folder(self.path(folder))

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        """The system ends it when a writer dies. A file system without locks (some network ones) is used without."""
        with self._explained(folder):
            self._make_folder(self.path(folder))
            descriptor = os.open(self.path(folder), os.O_RDONLY | os.O_DIRECTORY)
        with self._locked(descriptor, fcntl.LOCK_EX):
            yield

    def remove_temporary(self, *folders: str) -> None:
        """Unless somebody is writing at this moment. A store that lies elsewhere in the root has writers of its own."""
        patterns = (f"{TEMPORARY}*", *(f"{folder}/**/{TEMPORARY}*" for folder in folders))
        with self._explained("."):
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            with self._locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                for path in (path for pattern in patterns for path in self.root.glob(pattern)) if alone else ():
                    if path.is_file():
                        path.unlink()

    def read(self, name: str) -> bytes:
        with self._readable(name):
            return self.path(name).read_bytes()

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def read_into(self, name: str, views: Sequence[memoryview], seen: Callable[[memoryview], None]) -> int:
        """`seen` gets blocks that are still in the processor's cache: summing them there costs half of what a second
        pass over memory would."""
        with self._readable(name), self.path(name).open("rb", buffering=0) as file:
            total = sum(_read_full(file.fileno(), view, seen) for view in views)
            return total + len(os.read(file.fileno(), 1))

    def remove(self, name: str) -> None:
        with self._explained(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(name))
            if self.path(name).parent.is_dir():
                self._sync_folder(self.path(name).parent)

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(self.path(folder), ignore_errors=True)

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for where, _, names in os.walk(self.path(folder)):
            below = Path(where).relative_to(self.root)
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found[(below / name).as_posix()] = _size(os.path.join(where, name))
        return dict(sorted(found.items()))

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path(folder)) if not name.startswith(TEMPORARY))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextlib.contextmanager
    def _temporary(self, name: str, buffers: Sequence[Buffer]) -> Iterator[Path]:
        """A durable file beside the object's place; an error of any kind removes it."""
        folder = self.path(name).parent
        self._make_folder(folder)
        temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        # Shared by all that write: who gets it exclusively knows that every temporary file is a dead writer's.
        with self._locked(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                try:
                    for buffer in buffers:
                        _write_full(descriptor, memoryview(buffer).cast("B"))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                yield temporary
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

    @contextlib.contextmanager
    def _locked(self, descriptor: int, how: int) -> Iterator[bool]:
        """Lock an open folder and close it after use; False if it was not to be had."""
        held = True
        try:
            try:
                fcntl.flock(descriptor, how)
            except OSError:
                held = False
            yield held
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # close() would not do while a process forked meanwhile lives
            os.close(descriptor)

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each entry made durable in its own parent.

        A folder that is there may come from a writer that was killed before the entry was durable, so every process
        makes sure once, from the store's own folder downwards.
        """
        inside = folder == self.root or self.root in folder.parents
        if (folder in self._durable or not inside) and folder.is_dir():
            return
        parent = folder.parent if folder != self.root else Path(os.path.abspath(folder)).parent
        self._make_folder(parent)
        existed = folder.is_dir()
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        try:
            self._sync_folder(parent)
        except PermissionError:
            if not existed:  # else somebody else's: a mount point or a home, in a folder that we may not read
                raise
        self._durable.add(folder)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            where = self.path(name)
            raise StoreError(f"{where}: {error.strerror or error}; permit reading, or check the disk") from error

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.path(name)
            remedy = "make room or permit writing, then run the same command again; committed shards stand"
            raise StoreError(f"{where}: {error.strerror or error}; {remedy}") from error


def _size(path: str) -> int:
    """Of what a link leads to, or of a link that leads nowhere."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return os.lstat(path).st_size


def _write_full(descriptor: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def _read_full(descriptor: int, view: memoryview, seen: Callable[[memoryview], None]) -> int:
    done = 0
    while done < view.nbytes:
        block = view[done : done + BLOCK_BYTES]
        count = os.readv(descriptor, [block])
        if not count:
            break
        seen(block[:count])
        done += count
    return done
