"""Where the bytes of images come from: files below a folder, objects of a bucket, or members of tar
files.

A medium is small to pickle and safe to share between threads: it opens what it reads, and keeps
nothing open.
"""

import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from apecache.arguments import AnyPath, as_place
from apecache.errors import RowError
from apecache.storage.bucket import Bucket, is_object_url, open_bucket

MAX_IMAGE_BYTES = 1 << 30
"""Larger files are refused before they are read: far beyond any image within the pixel limit."""
READ_AT_ONCE = 8 << 20
"""Of an object, before its size is known."""


class Media(Protocol):
    @property
    def place(self) -> str:
        """Where the images lie, for people, for the store's record and to tell two places with the
        same keys apart."""

    def read(self, key: str) -> bytes:
        """The bytes of the image that the table calls `key`; never empty.

        Raises:
            RowError: outside-root, missing, not-a-file, empty, too-large, truncated.
        """

    def exists(self, key: str) -> bool:
        """Whether there is something to read; it may still be no image."""

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Bytes of each image, None where there is nothing to read; no image is read whole if its
        place tells."""


@dataclass(frozen=True, kw_only=True)
class NoMedia:
    """For sources of captions only."""

    place = ""

    def read(self, key: str) -> bytes:
        raise RowError("missing", f"{key}: the source has no images")

    def exists(self, key: str) -> bool:
        return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [None] * len(keys)


@dataclass(frozen=True, kw_only=True)
class FolderMedia:
    """Keys are paths relative to `root`, or absolute ones below it; nothing outside it is read."""

    root: Path

    @property
    def place(self) -> str:
        return str(self.root.resolve())

    def read(self, key: str) -> bytes:
        return read_file(resolve_below(key, self.root), key)

    def exists(self, key: str) -> bool:
        try:
            return resolve_below(key, self.root).exists()
        except (RowError, OSError, ValueError):
            return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(key) for key in keys]

    def _size(self, key: str) -> int | None:
        try:
            return resolve_below(key, self.root).stat().st_size
        except (RowError, OSError, ValueError):
            return None


@dataclass(frozen=True)
class ObjectMedia:
    """Keys are names of objects below `root`, a URL of object storage; nothing outside it is read.

    Threads may share it, forked processes may not.
    """

    root: str

    @property
    def place(self) -> str:
        return self.root.rstrip("/")

    def __reduce__(self) -> tuple[type["ObjectMedia"], tuple[str]]:
        return ObjectMedia, (self.root,)

    @cached_property
    def _opened(self) -> tuple[Bucket, str]:
        return open_bucket(self.root)

    def read(self, key: str) -> bytes:
        """Raises StoreError, which ends the run, where the storage does not answer: another row
        would do no better."""
        name = self._name(key)
        bucket, _ = self._opened
        try:
            first, size = bucket.read_range(name, 0, READ_AT_ONCE)
            check_bytes(size, key)
            rest = bucket.read_range(name, READ_AT_ONCE, size)[0] if size > READ_AT_ONCE else b""
        except FileNotFoundError:
            raise RowError("missing", f"{key!r}: no such object") from None
        return b"".join((first, rest))

    def exists(self, key: str) -> bool:
        try:
            return self._opened[0].size(self._name(key)) is not None
        except RowError:
            return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """By listing the root, a request for every thousand objects below it. Raises StoreError as
        `read` does."""
        bucket, folder = self._opened
        known = {entry.key: entry.size for entry in bucket.walk(folder)}
        return [self._size(key, known) for key in keys]

    def _size(self, key: str, known: Mapping[str, int]) -> int | None:
        try:
            return known.get(self._name(key))
        except RowError:
            return None

    def _name(self, key: str) -> str:
        name = posixpath.normpath(key)
        if "\0" in key or name.startswith(("/", "../")) or name in (".", ".."):
            raise RowError(
                "outside-root",
                f"{key!r} leads outside {self.place}; keys are names below --root",
            )
        return "/".join(part for part in (self._opened[1], name) if part)


def media_below(root: AnyPath) -> Media:
    """Of keys that are names below a folder or a URL of object storage."""
    place = as_place(root, "root")
    return ObjectMedia(str(place)) if is_object_url(place) else FolderMedia(root=Path(place))


def media_at(place: str) -> Media:
    """What a store or index remembers as `place`; nothing where it is no folder (any more)."""
    return (
        media_below(place)
        if is_object_url(place) or (place and Path(place).is_dir())
        else NoMedia()
    )


class Member(NamedTuple):
    """A file inside a tar: the tar's number in `TarMedia.tars`, where its bytes begin, and how many
    they are."""

    tar: int
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class TarMedia:
    """Members of uncompressed tars, read in place and never extracted, so their names lead
    nowhere."""

    tars: tuple[Path, ...]
    members: Mapping[str, Member]

    @property
    def place(self) -> str:
        """The tars from the first to the last."""
        return " … ".join(
            str(path.resolve()) for path in dict.fromkeys((self.tars[0], self.tars[-1]))
        )

    def read(self, key: str) -> bytes:
        member = self.members.get(key)
        if member is None:
            raise RowError("missing", f"{key}: its sample has no image")
        check_bytes(member.size, key)
        try:
            with self.tars[member.tar].open("rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise RowError("missing", f"{key}: {self.tars[member.tar]}: {error.strerror}") from None
        if len(data) < member.size:
            raise RowError("truncated", f"{key}: {self.tars[member.tar]} ends inside it")
        return data

    def exists(self, key: str) -> bool:
        return key in self.members

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self.members[key].size if key in self.members else None for key in keys]


def resolve_below(key: str, root: Path) -> Path:
    """The real path of `key`; symbolic links are followed and must stay below `root`."""
    if "\0" in key:
        raise RowError("outside-root", f"{key!r} contains a NUL byte")
    base = os.path.realpath(root)
    try:
        path = os.path.realpath(os.path.join(base, key))
    except UnicodeEncodeError:
        raise RowError(
            "missing",
            f"{key!r} holds a lone surrogate, which no file name can",
        ) from None
    if os.path.commonpath([base, path]) != base:
        raise RowError(
            "outside-root",
            f"{key} leads outside {root}; give --root for absolute paths",
        )
    return Path(path)


def read_file(path: Path, key: str) -> bytes:
    """The bytes of a regular file."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise RowError("not-a-file", f"{key} is no regular file")
        check_bytes(found.st_size, key)
        return path.read_bytes()
    except FileNotFoundError:
        raise RowError("missing", f"{key}: no such file") from None
    except OSError as error:
        raise RowError("missing", f"{key}: {error.strerror}") from None
    except ValueError as error:  # a NUL byte, or a lone surrogate
        raise RowError("missing", f"{key!r} is no name of a file: {error}") from None


def check_bytes(size: int, key: str) -> None:
    """Refuse an image by the size that its file declares."""
    if not size:
        raise RowError("empty", f"{key} has 0 bytes")
    if size > MAX_IMAGE_BYTES:
        raise RowError("too-large", f"{key} has {size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
