"""Read the bytes of images: files below a folder, objects of a bucket, or members of tar files.

A medium is small to pickle and safe to share between threads: it opens what it reads and keeps
nothing open.
"""

import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from apecache.arguments import AnyPath, as_path, as_place
from apecache.data.pixels import PixelRules
from apecache.errors import RowError
from apecache.storage.bucket import Bucket, is_object_url, open_bucket

MAX_IMAGE_BYTES = 1 << 30
"""Larger files are refused before they are read. No image within the pixel limit is that large."""
READ_AT_ONCE = 8 << 20
"""Bytes of an object that the first request asks for, before its size is known."""


class Media(Protocol):
    """Read the images of a source by their keys."""

    @property
    def place(self) -> str:
        """Return where the images are: a folder, a URL, or tars.

        People read it, the store records it, and it distinguishes two sources with the same keys.
        """

    def read(self, key: str) -> bytes:
        """Return the bytes of the image that the table calls `key`; never empty.

        Raises:
            RowError: outside-root, missing, not-a-file, empty, too-large, truncated.
        """

    def exists(self, key: str) -> bool:
        """Return whether there is something to read, which may still not be an image."""

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the number of bytes of each image, None where there is nothing to read.

        Images are not read, unless there is no other way to know their sizes.
        """


@dataclass(frozen=True, kw_only=True)
class NoMedia:
    """Stand for the images of a source that has only captions."""

    place = ""

    def read(self, key: str) -> bytes:
        raise RowError("missing", f"{key}: the source has no images")

    def exists(self, key: str) -> bool:
        return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [None] * len(keys)


@dataclass(frozen=True, kw_only=True)
class FolderMedia:
    """Read files below `root`; keys are paths relative to it, or absolute paths below it."""

    root: Path
    allowed: tuple[Path, ...] = ()
    """Further folders that links may lead to."""

    @property
    def place(self) -> str:
        return str(self.root.resolve())

    def read(self, key: str) -> bytes:
        return read_file(resolve_below(key, self.root, self.allowed), key)

    def exists(self, key: str) -> bool:
        try:
            return resolve_below(key, self.root, self.allowed).exists()
        except (RowError, OSError, ValueError):
            return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(key) for key in keys]

    def _size(self, key: str) -> int | None:
        try:
            return resolve_below(key, self.root, self.allowed).stat().st_size
        except (RowError, OSError, ValueError):
            return None


@dataclass(frozen=True)
class ObjectMedia:
    """Read objects below `root`, a URL of object storage; keys are names below it.

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
        """Return the bytes of one object.

        Raises:
            RowError: As `Media.read` raises.
            StoreError: The storage does not answer. That ends the run, because another row would
                fail too.
        """
        name = self._name(key)
        bucket, _ = self._opened
        try:
            first, size = bucket.read_range(name, 0, READ_AT_ONCE)
            check_bytes(size, key)
            remainder: bytes | memoryview = b""
            if size > READ_AT_ONCE:
                remainder, _ = bucket.read_range(name, READ_AT_ONCE, size)
        except FileNotFoundError:
            raise RowError("missing", f"{key!r}: no such object") from None
        return b"".join((first, remainder))

    def exists(self, key: str) -> bool:
        bucket, _ = self._opened
        try:
            return bucket.size(self._name(key)) is not None
        except RowError:
            return False

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the sizes from a listing of the root: one request per thousand objects below it.

        Raises:
            StoreError: The storage does not answer.
        """
        bucket, folder = self._opened
        size_by_name = {entry.key: entry.size for entry in bucket.walk(folder)}
        return [self._size(key, size_by_name) for key in keys]

    def _size(self, key: str, size_by_name: Mapping[str, int]) -> int | None:
        try:
            return size_by_name.get(self._name(key))
        except RowError:
            return None

    def _name(self, key: str) -> str:
        name = posixpath.normpath(key)
        if "\0" in key or name.startswith(("/", "../")) or name in (".", ".."):
            raise RowError(
                "outside-root",
                f"{key!r} leads outside {self.place}; keys are names below --root",
            )
        _, folder = self._opened
        return f"{folder}/{name}" if folder else name


@dataclass(frozen=True, kw_only=True)
class RenamedMedia:
    """Read images under other names, such as SKUs."""

    media: Media
    names: Mapping[str, str]
    """The name of each key to `media`."""

    @property
    def place(self) -> str:
        return self.media.place

    def read(self, key: str) -> bytes:
        return self.media.read(self.names.get(key, key))

    def exists(self, key: str) -> bool:
        return self.media.exists(self.names.get(key, key))

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return self.media.sizes([self.names.get(key, key) for key in keys])


@dataclass(frozen=True, kw_only=True)
class RuledMedia:
    """Read images whose files become pixels by other rules than the default ones."""

    media: Media
    rules: PixelRules

    @property
    def place(self) -> str:
        return self.media.place

    def read(self, key: str) -> bytes:
        return self.media.read(key)

    def exists(self, key: str) -> bool:
        return self.media.exists(key)

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return self.media.sizes(keys)


def base_media(media: Media) -> Media:
    """Return what reads the files of a medium."""
    return media.media if isinstance(media, RenamedMedia) else media


def moved_media(media: Media, base: Media) -> Media:
    """Return a medium with the same names whose files are read by `base`."""
    return replace(media, media=base) if isinstance(media, RenamedMedia) else base


def media_below(root: AnyPath, allowed: Sequence[AnyPath] = ()) -> Media:
    """Return the media of keys that are names below a folder or a URL of object storage.

    Args:
        root: The folder or URL.
        allowed: Further folders that links may lead to. The files of a snapshot of a model hub are
            links into the folder `blobs` of its repository, which is always allowed.
    """
    location = as_place(root, "root")
    if is_object_url(location):
        return ObjectMedia(str(location))
    folder = Path(location)
    folders = [as_path(allowed_root, "allow_root") for allowed_root in allowed]
    return FolderMedia(root=folder, allowed=(*folders, *_hub_blobs(folder)))


def _hub_blobs(folder: Path) -> list[Path]:
    """Return the folder of files that a snapshot of a hub links to: REPO/snapshots/REVISION."""
    parents = Path(os.path.abspath(folder)).parents
    blobs = [parent.parent / "blobs" for parent in parents if parent.name == "snapshots"]
    return [path for path in blobs if path.is_dir()]


def media_at(place: str, allowed: Sequence[AnyPath] = ()) -> Media:
    """Return the media at a recorded place, or `NoMedia` where there is no such folder any more."""
    if is_object_url(place) or (place and Path(place).is_dir()):
        return media_below(place, allowed)
    return NoMedia()


class Member(NamedTuple):
    """Locate a file inside a tar."""

    tar: int
    """Index in `TarMedia.tars`."""
    offset: int
    """Position of its first byte in the tar."""
    size: int
    """Number of bytes."""


@dataclass(frozen=True, kw_only=True)
class TarMedia:
    """Read members of uncompressed tars in place.

    Nothing is extracted, so a member's name cannot lead to a file outside.
    """

    tars: tuple[Path, ...]
    members: Mapping[str, Member]

    @property
    def place(self) -> str:
        """Return the paths of the first and the last tar, or of the only one."""
        first_and_last = dict.fromkeys((self.tars[0], self.tars[-1]))
        return " … ".join(str(path.resolve()) for path in first_and_last)

    def read(self, key: str) -> bytes:
        member = self.members.get(key)
        if member is None:
            raise RowError("missing", f"{key}: its sample has no image")
        check_bytes(member.size, key)
        tar = self.tars[member.tar]
        try:
            with tar.open("rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise RowError("missing", f"{key}: {tar}: {error.strerror}") from None
        if len(data) < member.size:
            raise RowError("truncated", f"{key}: {tar} ends inside it")
        return data

    def exists(self, key: str) -> bool:
        return key in self.members

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self.members[key].size if key in self.members else None for key in keys]


def resolve_below(key: str, root: Path, allowed: Sequence[Path] = ()) -> Path:
    """Return the real path of `key`; symbolic links are followed and must stay below `root`.

    Args:
        key: Path below `root`.
        root: The folder of the images.
        allowed: Further folders that the real path may be in.

    Raises:
        RowError: outside-root, missing.
    """
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
    # Compared after links are resolved, so that a link below the root cannot lead outside.
    bases = [base, *map(os.path.realpath, allowed)]
    if not any(os.path.commonpath([parent, path]) == parent for parent in bases):
        is_link = os.path.commonpath([base, os.path.abspath(os.path.join(base, key))]) == base
        remedy = "add --root for absolute paths"
        if is_link:
            remedy = f"it is a link to {path}: allow its folder with --allow-root"
        raise RowError("outside-root", f"{key} leads outside {root}; {remedy}")
    return Path(path)


def read_file(path: Path, key: str) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        RowError: missing, not-a-file, empty, too-large.
    """
    try:
        status = os.stat(path)
        # Reading a pipe or a device could block forever.
        if not stat.S_ISREG(status.st_mode):
            raise RowError("not-a-file", f"{key} is not a regular file")
        check_bytes(status.st_size, key)
        return path.read_bytes()
    except FileNotFoundError:
        raise RowError("missing", f"{key}: no such file") from None
    except OSError as error:
        raise RowError("missing", f"{key}: {error.strerror}") from None
    except ValueError as error:
        # The path has a NUL byte or a lone surrogate.
        raise RowError("missing", f"{key!r} is not the name of a file: {error}") from None


def check_bytes(size: int, key: str) -> None:
    """Refuse an image by the size that its file declares.

    Raises:
        RowError: empty, too-large.
    """
    if not size:
        raise RowError("empty", f"{key} has 0 bytes")
    if size > MAX_IMAGE_BYTES:
        raise RowError("too-large", f"{key} has {size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
