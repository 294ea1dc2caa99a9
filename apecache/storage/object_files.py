"""The operations that a store is made of, on object storage. See `Files` for what each of them
promises.

One object is one PUT: shards have at most 64 MB, so none is sent in parts, and nothing unfinished
is ever left. There are no locks: `If-None-Match: *` decides who committed a shard, and that the
storage heeds it is tried before anything is written. Storage that does not may have one writer, who
has to say that there is no other.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from apecache.errors import StoreError
from apecache.storage.bucket import READERS, Bucket, open_bucket
from apecache.storage.files import TEMPORARY, Buffer

RANGE_BYTES = 8 << 20
LEFT_AFTER = timedelta(hours=1)
"""A trial of put-if-absent that is older was left by a killed writer."""


def open_objects(url: str, alone: bool) -> "ObjectFiles":
    """Raises as `open_bucket` does."""
    bucket, root = open_bucket(url)
    return ObjectFiles(bucket, root, alone)


class ObjectFiles:
    """Objects of `bucket` whose keys begin with `root`. `alone`: nobody else writes there."""

    def __init__(self, bucket: Bucket, root: str, alone: bool = False) -> None:
        self.bucket = bucket
        self.root = root
        self.alone = alone

    @property
    def place(self) -> str:
        return self.where("")

    def where(self, name: str) -> str:
        return "/".join(part for part in (self.bucket.name, self._key(name)) if part)

    def child(self, folder: str) -> "ObjectFiles":
        return ObjectFiles(self.bucket, self._key(folder), self.alone)

    def hint(self) -> str:
        return ""

    def free_bytes(self) -> None:
        return None

    @property
    def readers(self) -> int:
        return READERS

    def settle(self, folder: str) -> None:
        """What the storage has acknowledged is durable."""

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        """There is nothing to lock: several writers may be here at once."""
        yield

    def prepare(self) -> None:
        trial = self._key(f"{TEMPORARY}{secrets.token_hex(8)}")
        if not self.alone and not self.bucket.decides_creation(trial):
            raise StoreError(
                f"{self.place}: this storage overwrites an object that is to be created only if "
                "there is none "
                "(If-None-Match), so two writers could undo each other; use other storage, or, if "
                "nobody else writes "
                "there, add --single-writer"
            )

    def write(self, name: str, *buffers: Buffer) -> None:
        self.bucket.write(self._key(name), b"".join(buffers))

    def create(self, name: str, *buffers: Buffer) -> bool:
        data = b"".join(buffers)
        if not self.alone:
            return self.bucket.create(self._key(name), data)
        with contextlib.suppress(FileNotFoundError):
            return self.read(name) == data
        self.bucket.write(self._key(name), data)
        return True

    def remove(self, name: str) -> None:
        self.bucket.remove([self._key(name)])

    def remove_folder(self, folder: str) -> None:
        self.bucket.remove([entry.key for entry in self.bucket.walk(self._key(folder))])

    def remove_temporary(self, *folders: str) -> None:
        """Trials of put-if-absent, which lie in the root; nothing else is ever there in part."""
        _, objects = self.bucket.list(self.root)
        before = datetime.now(UTC) - LEFT_AFTER
        left = [
            entry.key for entry in objects if _is_temporary(entry.key) and entry.modified < before
        ]
        self.bucket.remove(left)

    def read(self, name: str) -> bytes:
        return self.bucket.read(self._key(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        return self.bucket.read_all(map(self._key, names))

    def read_into(
        self,
        name: str,
        views: Sequence[memoryview],
        seen: Callable[[memoryview], None],
    ) -> int:
        """Ranges of an object are fetched side by side."""
        key = self._key(name)
        wanted = sum(view.nbytes for view in views)
        first, size = self.bucket.read_range(key, 0, min(RANGE_BYTES, wanted + 1))
        starts = range(RANGE_BYTES, min(size, wanted), RANGE_BYTES)
        later = [
            self.bucket.pool.submit(self.bucket.read_range, key, start, start + RANGE_BYTES)
            for start in starts
        ]
        target = _Target(views, seen)
        target.fill(first)
        for future in later:
            target.fill(future.result()[0])
        return target.filled + (size > wanted)

    def exists(self, name: str) -> bool:
        return self.bucket.size(self._key(name)) is not None

    def sizes(self, folder: str) -> dict[str, int]:
        below = len(self.root) + 1 if self.root else 0
        return dict(
            sorted((entry.key[below:], entry.size) for entry in self.bucket.walk(self._key(folder)))
        )

    def list(self, folder: str) -> list[str]:
        folders, objects = self.bucket.list(self._key(folder))
        names = {*folders, *(entry.key.rpartition("/")[2] for entry in objects)}
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self.root, name) if part)


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


class _Target:
    """Buffers that are filled one after another from blocks that come in order."""

    def __init__(self, views: Sequence[memoryview], seen: Callable[[memoryview], None]) -> None:
        self.views = [view for view in views if view.nbytes]
        self.seen = seen
        self.filled = 0

    def fill(self, data: memoryview) -> None:
        """What no buffer has room for is left out."""
        while data.nbytes and self.views:
            view = self.views[0]
            count = min(view.nbytes, data.nbytes)
            view[:count] = data[:count]
            self.seen(view[:count])
            self.filled += count
            data = data[count:]
            self.views[0] = view[count:]
            if count == view.nbytes:
                self.views.pop(0)
