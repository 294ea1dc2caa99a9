"""Implement `Files`, the operations of a store, on object storage.

One object is one PUT: shards have at most 64 MB, so none is sent in parts, and no unfinished object
is ever left. There are no locks. `If-None-Match: *` decides who committed a shard, and a trial
before the first write checks that the storage follows it. Storage that does not may have only one
writer, who has to say that there is no other.
"""

import contextlib
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from apecache.errors import StoreError
from apecache.fingerprint import content_hash
from apecache.storage.bucket import READERS, Bucket, open_bucket
from apecache.storage.files import TEMPORARY, Buffer, PutStaged

RANGE_BYTES = 8 << 20
LEFT_AFTER = timedelta(hours=1)
"""Age from which a trial of put-if-absent was left by a killed writer."""


def open_objects(url: str, alone: bool) -> "ObjectFiles":
    """Return the objects below a URL; raises as `open_bucket` does."""
    bucket, root = open_bucket(url)
    return ObjectFiles(bucket, root, alone)


class ObjectFiles:
    """Implement `Files` on the objects of a bucket.

    Args:
        bucket: The bucket.
        root: What all keys begin with.
        alone: Whether nobody else writes there.
    """

    def __init__(self, bucket: Bucket, root: str, alone: bool = False) -> None:
        self.bucket = bucket
        self.root = root
        self.alone = alone

    @property
    def place(self) -> str:
        return self.where("")

    def where(self, name: str) -> str:
        key = self._key(name)
        return f"{self.bucket.name}/{key}" if key else self.bucket.name

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
        """Do nothing: an object is durable once the storage has acknowledged it."""

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        """Lock nothing: several writers may be in the block at once."""
        yield

    def prepare(self) -> None:
        trial = self._key(f"{TEMPORARY}{secrets.token_hex(8)}")
        if not self.alone and not self.bucket.decides_creation(trial):
            raise StoreError(
                f"{self.place}: this storage overwrites an object that is to be created only if "
                "there is none (If-None-Match), so two writers could undo each other; use other "
                "storage, or, if nobody else writes there, add --single-writer"
            )

    def write(self, name: str, *buffers: Buffer) -> None:
        self.bucket.write(self._key(name), b"".join(buffers))

    @contextlib.contextmanager
    def stage(self, objects: Mapping[str, Sequence[Buffer]]) -> Iterator[PutStaged]:
        """Keep the objects in memory: an object is written whole, where it belongs."""
        yield functools.partial(self._put_staged, objects)

    def _put_staged(
        self,
        objects: Mapping[str, Sequence[Buffer]],
        names: Iterable[str],
    ) -> None:
        for name in names:
            self.write(name, *objects[name])

    def put_if_absent(self, name: str, *buffers: Buffer) -> bool:
        data = b"".join(buffers)
        if not self.alone:
            return self.bucket.put_if_absent(self._key(name), data)
        # Storage without put-if-absent: a look before the write is enough for a single writer.
        with contextlib.suppress(FileNotFoundError):
            return self.read(name) == data
        self.bucket.write(self._key(name), data)
        return True

    def remove(self, name: str) -> None:
        self.bucket.remove([self._key(name)])

    def remove_folder(self, folder: str) -> None:
        self.bucket.remove([entry.key for entry in self.bucket.walk(self._key(folder))])

    def remove_temporary(self, *folders: str) -> None:
        """Remove trials of put-if-absent in the root; nothing else is ever unfinished."""
        _, objects = self.bucket.list(self.root)
        # A younger trial may belong to a writer that is just starting.
        before = datetime.now(UTC) - LEFT_AFTER
        stale_keys = []
        for entry in objects:
            if _is_temporary(entry.key) and entry.modified < before:
                stale_keys.append(entry.key)
        self.bucket.remove(stale_keys)

    def read(self, name: str) -> bytes:
        return self.bucket.read(self._key(name))

    def digest(self, name: str) -> str:
        return content_hash(self.read(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        return self.bucket.read_all(map(self._key, names))

    def read_into(
        self,
        name: str,
        views: Sequence[memoryview],
        seen: Callable[[memoryview], None],
    ) -> int:
        """Fetch ranges of an object in parallel, see `Files.read_into`."""
        key = self._key(name)
        expected_bytes = sum(view.nbytes for view in views)
        # One byte more than expected, so that the answer shows whether the object is longer.
        first, size = self.bucket.read_range(key, 0, min(RANGE_BYTES, expected_bytes + 1))
        # The first answer has the size, so the other ranges can be asked for at once.
        later = []
        for start in range(RANGE_BYTES, min(size, expected_bytes), RANGE_BYTES):
            stop = start + RANGE_BYTES
            later.append(self.bucket.pool.submit(self.bucket.read_range, key, start, stop))
        target = _BufferFiller(views, seen)
        target.fill(first)
        for future in later:
            data, _ = future.result()
            target.fill(data)
        return target.filled + (size > expected_bytes)

    def exists(self, name: str) -> bool:
        return self.bucket.size(self._key(name)) is not None

    def sizes(self, folder: str) -> dict[str, int]:
        below = len(self.root) + 1 if self.root else 0
        entries = self.bucket.walk(self._key(folder))
        # Keys of the bucket begin with the root, names do not.
        return dict(sorted((entry.key[below:], entry.size) for entry in entries))

    def list(self, folder: str) -> list[str]:
        folders, objects = self.bucket.list(self._key(folder))
        names = {*folders, *(entry.key.rpartition("/")[2] for entry in objects)}
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def _key(self, name: str) -> str:
        return "/".join(filter(None, (self.root, name)))


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


class _BufferFiller:
    """Fill buffers one after another from blocks that come in order."""

    def __init__(self, views: Sequence[memoryview], on_block: Callable[[memoryview], None]) -> None:
        self.views = [view for view in views if view.nbytes]
        self.seen = on_block
        self.filled = 0

    def fill(self, data: memoryview) -> None:
        """Copy a block into the buffers; bytes that no buffer has room for are dropped."""
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
