"""Write and read durable objects in a local folder."""

import contextlib
import errno
import fcntl
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from apecache.errors import StoreError, UnwritableError, nearest_sibling
from apecache.storage.files import TEMPORARY, Buffer, PutStaged

BLOCK_BYTES = 1 << 18
UNWRITABLE = (errno.EROFS, errno.EACCES)
WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that another path mends, and neither room nor permission."""


class LocalFiles:
    """Implement `Files` in a local folder.

    An object is written as a temporary file, synced, renamed or linked, and its folder is synced.
    """

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
        return nearest_sibling(self.root)

    def free_bytes(self) -> int:
        """Return the free bytes of the disk that the root is on, or will be on."""
        root = self.root.absolute()
        existing_folder = next(folder for folder in (root, *root.parents) if os.path.exists(folder))
        return shutil.disk_usage(existing_folder).free

    @property
    def readers(self) -> int:
        return 4

    def prepare(self) -> None:
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise StoreError(f"{self.root} is a file; give a folder as --store")

    def write(self, name: str, *buffers: Buffer) -> None:
        """Write one object in place of the old one; it survives a power cut after the return.

        Where the system refuses (disk full, no permission, …), the old object or the new one is
        there, whole.
        """
        with self.stage({name: buffers}) as put:
            put([name])

    @contextlib.contextmanager
    def stage(self, objects: Mapping[str, Sequence[Buffer]]) -> Iterator[PutStaged]:
        with self._temporaries(objects) as temporaries:
            yield functools.partial(self._put_staged, temporaries)
            for name, temporary in temporaries.items():
                with self._explained(name):
                    os.unlink(temporary)

    def _put_staged(self, temporaries: dict[str, Path], names: Iterable[str]) -> None:
        paths = {name: self.path(name) for name in names}
        for name, path in paths.items():
            with self._explained(name):
                os.replace(temporaries[name], path)
                # What is left in there when the block ends was not put.
                del temporaries[name]
        for folder in dict.fromkeys(path.parent for path in paths.values()):
            with self._explained(next(iter(paths))):
                self._sync_folder(folder)

    def put_if_absent(self, name: str, *buffers: Buffer) -> bool:
        """Write one object only if there is none.

        The object survives a power cut after the return, also where another writer put it.
        """
        with self._explained(name):
            try:
                return self._link_if_absent(name, buffers)
            except OSError as error:
                # A finished store may lie on a read-only file system: what is there needs no write.
                if error.errno not in UNWRITABLE or not self.path(name).exists():
                    raise
                return False

    def _link_if_absent(self, name: str, buffers: Sequence[Buffer]) -> bool:
        with self._temporaries({name: buffers}) as temporaries:
            temporary = temporaries[name]
            put = True
            # `link`, and not `rename`, fails if another writer was first. That writer may have been
            # killed before its entry was durable, so the folder is synced in either case.
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                put = False
            os.unlink(temporary)
            self._sync_folder(self.path(name).parent)
            return put

    def settle(self, folder: str) -> None:
        with self._explained(folder):
            self._sync_folder(self.path(folder))

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        """Lock a folder against other writers; the system unlocks it when a writer dies.

        A file system without locks (some network ones) is used without.
        """
        with self._explained(folder):
            self._make_folder(self.path(folder))
            descriptor = os.open(self.path(folder), os.O_RDONLY | os.O_DIRECTORY)
        with self._locked(descriptor, fcntl.LOCK_EX):
            yield

    def remove_temporary(self, *folders: str) -> None:
        """Remove the temporary files of killed writers, unless somebody is writing now.

        Only the root and `folders` are searched: another store below the root has its own writers.
        """
        patterns = (f"{TEMPORARY}*", *(f"{folder}/**/{TEMPORARY}*" for folder in folders))
        with self._explained("."):
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            with self._locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                for pattern in patterns if alone else ():
                    for path in self.root.glob(pattern):
                        if path.is_file():
                            path.unlink()

    def read(self, name: str) -> bytes:
        with self._readable(name):
            return self.path(name).read_bytes()

    def digest(self, name: str) -> str:
        # In blocks: one buffer of a whole shard would be new memory each time.
        hasher = blake3()
        block = bytearray(BLOCK_BYTES)
        with self._readable(name), self.path(name).open("rb", buffering=0) as file:
            while n_read := file.readinto(block):
                hasher.update(memoryview(block)[:n_read])
        return hasher.hexdigest()

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, names)

    def read_into(
        self,
        name: str,
        views: Sequence[memoryview],
        seen: Callable[[memoryview], None],
    ) -> int:
        """Read an object into buffers, see `Files.read_into`."""
        # `seen` gets blocks that are still in the processor's cache: a checksum over them costs
        # half of what a second pass over memory costs.
        with self._readable(name), self.path(name).open("rb", buffering=0) as file:
            n_read = sum(_read_full(file.fileno(), view, seen) for view in views)
            n_beyond = len(os.read(file.fileno(), 1))
            return n_read + n_beyond

    def remove(self, name: str) -> None:
        with self._explained(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(name))
            # Also if the object was gone: the removal may not have been durable.
            if self.path(name).parent.is_dir():
                self._sync_folder(self.path(name).parent)

    def remove_folder(self, folder: str) -> None:
        path = self.path(folder)
        with self._explained(folder):
            while path.is_dir():
                # Another process may remove the same files; what cannot be removed is an error,
                # because callers remove next what leads to these files.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path)
            # Also if the folder was gone: its removal may not have been durable.
            if path.parent.is_dir():
                self._sync_folder(path.parent)

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def sizes(self, folder: str) -> dict[str, int]:
        size_by_name = {}
        for directory, _, names in os.walk(self.path(folder)):
            below = Path(directory).relative_to(self.root)
            for name in names:
                # Another process may remove a file while the folder is listed.
                with contextlib.suppress(FileNotFoundError):
                    size_by_name[(below / name).as_posix()] = _size(os.path.join(directory, name))
        return dict(sorted(size_by_name.items()))

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(
                name for name in os.listdir(self.path(folder)) if not name.startswith(TEMPORARY)
            )
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextlib.contextmanager
    def _temporaries(self, objects: Mapping[str, Sequence[Buffer]]) -> Iterator[dict[str, Path]]:
        """Write durable files beside the objects' paths; an error of any kind removes them.

        Yields the file of each name that is still a temporary one.
        """
        temporaries: dict[str, Path] = {}
        with self._explained(next(iter(objects), ".")):
            self._make_folder(self.root)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        # All writers share this lock. So whoever holds it exclusively knows that every temporary
        # file belongs to a dead writer. One for all: a table may have a thousand objects.
        with self._locked(descriptor, fcntl.LOCK_SH):
            try:
                for name, buffers in objects.items():
                    with self._explained(name):
                        self._make_folder(self.path(name).parent)
                        temporaries[name] = self._temporary_path(name)
                        _write_new(temporaries[name], buffers)
                yield temporaries
            except BaseException:
                for temporary in temporaries.values():
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                raise

    def _temporary_path(self, name: str) -> Path:
        return self.path(name).parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"

    @contextlib.contextmanager
    def _locked(self, descriptor: int, how: int) -> Iterator[bool]:
        """Lock an open folder and close it after use; yields whether the lock was granted."""
        held = True
        try:
            try:
                fcntl.flock(descriptor, how)
            except OSError:
                held = False
            yield held
        finally:
            # close() alone keeps the lock while a process that was forked meanwhile lives.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each entry made durable in its own parent.

        A folder that exists may come from a writer that was killed before the entry was durable.
        So every process syncs each folder once, from the store's own folder downwards.
        """
        inside = folder == self.root or self.root in folder.parents
        if (folder in self._durable or not inside) and folder.is_dir():
            return
        # The root may be relative, such as ".", whose `parent` is not the folder above.
        parent = folder.parent if folder != self.root else Path(os.path.abspath(folder)).parent
        self._make_folder(parent)
        existed = folder.is_dir()
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        try:
            self._sync_folder(parent)
        except PermissionError:
            # A folder that existed may be a mount point or a home, whose parent cannot be read.
            if not existed:
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
            path = self.path(name)
            raise StoreError(
                f"{path}: {error.strerror or error}; permit reading, or check the disk"
            ) from error

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refusal(name, error) from error

    def _refusal(self, name: str, error: OSError) -> StoreError:
        """Return what to raise for an error of the system, by whether anything is stored yet."""
        reason = error.strerror or error
        if self._holds_objects():
            return StoreError(
                f"{self.path(name)}: {reason}; make room or permit writing, then run the same "
                "command again; committed shards stand"
            )
        # The root is the path that the user gave; its objects are the store's own affair.
        if error.errno in WRONG_PATH:
            return UnwritableError(
                f"{self.root}: {reason}; no folder can be made there: give another path"
            )
        return UnwritableError(
            f"{self.root}: {reason}; make room or permit writing there, or give another path, "
            "then run the same command again"
        )

    def _holds_objects(self) -> bool:
        """Return whether any object is stored below the root."""
        for _, _, names in os.walk(self.root):
            if any(not name.startswith(TEMPORARY) for name in names):
                return True
        return False


def _size(path: str) -> int:
    """Return the bytes of a file, following links; a broken link has its own size."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return os.lstat(path).st_size


def _write_new(path: Path, buffers: Sequence[Buffer]) -> None:
    """Write a new file that survives a power cut, but for its name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for buffer in buffers:
            _write_full(descriptor, memoryview(buffer).cast("B"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_full(descriptor: int, view: memoryview) -> None:
    # A write may be partial, for instance of more than 2 GiB.
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def _read_full(descriptor: int, view: memoryview, on_block: Callable[[memoryview], None]) -> int:
    n_read = 0
    while n_read < view.nbytes:
        block = view[n_read : n_read + BLOCK_BYTES]
        n_block = os.readv(descriptor, [block])
        if not n_block:
            break
        on_block(block[:n_block])
        n_read += n_block
    return n_read
