"""Remember the size, time and hash of each image file, so that unchanged files are not read again.

This is a cache and no identity: without it, or where a file's size or time differs, the file is
hashed. One object holds all rows, with a hash of itself; a damaged one is as good as none.
"""

import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from apecache.data.media import (
    FolderMedia,
    Media,
    NoMedia,
    ObjectMedia,
    RenamedMedia,
    RuledMedia,
    TarMedia,
    resolve_below,
)
from apecache.data.row_groups import TableMedia
from apecache.errors import DamagedError, RowError
from apecache.fingerprint import content_hash
from apecache.storage.bucket import open_bucket
from apecache.storage.files import Files
from apecache.store.stamp_file import read_stamp_file, write_stamp_file

HASH_BYTES = 32
READERS = 8
UNKNOWN_SIZE = -1
MISSING_SIZE = -2
UNHASHED = 0
HASHED = 1
UNREADABLE = 2
ROW = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("size", "<i8"),
        ("time", "<i8"),
        ("state", "u1"),
        ("content", "u1", (HASH_BYTES,)),
    ]
)
"""Half of the key's BLAKE3, size in bytes, time in ns, whether it was hashed, and the hash."""


@dataclass(frozen=True, kw_only=True)
class FileStamps:
    """Hold the size and the time of each image file, as they are now."""

    sizes: NDArray[np.int64]
    """Bytes; UNKNOWN_SIZE where the medium does not say, MISSING_SIZE where there is no file."""
    times: NDArray[np.int64]
    """Time of the last change in ns; 0 where the medium does not say."""
    tells: bool
    """Whether size and time tell a changed file."""


def stamp_files(media: Media, keys: Sequence[str]) -> FileStamps:
    """Look at the files of images, without reading them."""
    file_sizes = np.full(len(keys), UNKNOWN_SIZE, np.int64)
    times = np.zeros(len(keys), np.int64)
    match media:
        case RuledMedia():
            return stamp_files(media.media, keys)
        case RenamedMedia():
            return stamp_files(media.media, [media.names.get(key, key) for key in keys])
        case FolderMedia():
            for row, key in enumerate(keys):
                file_sizes[row], times[row] = _file_stamp(media, key)
        case TarMedia():
            tar_times = [os.stat(tar).st_mtime_ns for tar in media.tars]
            for row, key in enumerate(keys):
                member = media.members.get(key)
                file_sizes[row] = MISSING_SIZE if member is None else member.size
                times[row] = 0 if member is None else tar_times[member.tar]
        case ObjectMedia():
            file_sizes, times = _object_stamps(media, keys)
        case TableMedia():
            # Sizes of single images would have to be decoded; the files' own times tell enough.
            file_times = [os.stat(path).st_mtime_ns for path in media.groups.paths]
            for row, key in enumerate(keys):
                row_place = media.places.get(key)
                times[row] = 0 if row_place is None else file_times[row_place.file]
        case _:
            return FileStamps(sizes=file_sizes, times=times, tells=isinstance(media, NoMedia))
    return FileStamps(sizes=file_sizes, times=times, tells=True)


def _file_stamp(media: FolderMedia, key: str) -> tuple[int, int]:
    try:
        status = os.stat(resolve_below(key, media.root, media.allowed))
    except (RowError, OSError, ValueError):
        return MISSING_SIZE, 0
    return status.st_size, status.st_mtime_ns


def _object_stamps(
    media: ObjectMedia,
    keys: Sequence[str],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Look at objects by one listing of their folder."""
    bucket, folder = open_bucket(media.root)
    entries = {entry.key: entry for entry in bucket.walk(folder)}
    object_sizes = np.full(len(keys), MISSING_SIZE, np.int64)
    times = np.zeros(len(keys), np.int64)
    for row, key in enumerate(keys):
        name = posixpath.normpath(key)
        entry = entries.get(f"{folder}/{name}" if folder else name)
        if entry is not None:
            object_sizes[row] = entry.size
            times[row] = int(entry.modified.timestamp() * 1e6) * 1000
    return object_sizes, times


def hash_files(media: Media, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return the BLAKE3 of each image, or an empty hash and why it cannot be read."""

    def digest(key: str) -> tuple[str, str]:
        try:
            return content_hash(media.read(key)), ""
        except RowError as error:
            return "", f"{error.reason}: {error.detail}"

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, keys))


@dataclass(frozen=True, kw_only=True)
class StampTable:
    """Hold what was recorded of image files, sorted by key."""

    rows: NDArray[Any]
    """Structured as ROW, sorted by key."""

    @cached_property
    def _row_of_key(self) -> dict[tuple[int, int], int]:
        return {(int(row[0]), int(row[1])): i for i, row in enumerate(self.rows["key"])}

    def has(self, keys: Sequence[str]) -> list[bool]:
        """Return whether each file was recorded, as it is now or otherwise."""
        return [_key_hash(key) in self._row_of_key for key in keys]

    def hashes(self, keys: Sequence[str]) -> list[str]:
        """Return the recorded hash of each file; empty where there is none."""
        hashes: list[str] = []
        for key in keys:
            row = self._row_of_key.get(_key_hash(key))
            is_hashed = row is not None and self.rows[row]["state"] == HASHED
            hashes.append(bytes(self.rows[row]["content"]).hex() if is_hashed else "")
        return hashes

    def find(self, keys: Sequence[str], stamps: FileStamps) -> list[str | None]:
        """Return what is known of each file that is as it was recorded.

        Returns:
            For each file its hash, an empty text where it was unreadable, `-` where it was seen but
            not hashed, and None where the file is not as it was recorded, or never was.
        """
        hashes: list[str | None] = []
        for row, key in enumerate(keys):
            recorded = self._row_of_key.get(_key_hash(key))
            if recorded is None or not stamps.tells:
                hashes.append(None)
                continue
            entry = self.rows[recorded]
            if entry["size"] != stamps.sizes[row] or entry["time"] != stamps.times[row]:
                hashes.append(None)
            elif entry["state"] == HASHED:
                hashes.append(bytes(entry["content"]).hex())
            else:
                hashes.append("" if entry["state"] == UNREADABLE else "-")
        return hashes


def _key_hash(key: str) -> tuple[int, int]:
    digest = blake3(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def stamp_table(
    keys: Sequence[str],
    stamps: FileStamps,
    contents: Sequence[str | None],
) -> StampTable:
    """Return what is to be recorded of files.

    Args:
        keys: Keys of the images.
        stamps: Their sizes and times.
        contents: As `StampTable.find` returns them; None is recorded as seen but not hashed.
    """
    rows = np.zeros(len(keys), ROW)
    for row, (key, content) in enumerate(zip(keys, contents, strict=True)):
        rows["key"][row] = _key_hash(key)
        if content == "":
            rows["state"][row] = UNREADABLE
        elif content is not None and content != "-":
            rows["state"][row] = HASHED
            rows["content"][row] = np.frombuffer(bytes.fromhex(content), np.uint8)
    rows["size"] = stamps.sizes
    rows["time"] = stamps.times
    order = np.lexsort((rows["key"][:, 1], rows["key"][:, 0]))
    return StampTable(rows=rows[order])


def write_stamps(files: Files, table: StampTable) -> None:
    """Record what was seen of image files, unless it is recorded already."""
    write_stamp_file(files, table.rows.tobytes())


def read_stamps(files: Files) -> StampTable:
    """Read what was recorded of image files; an empty table if it is lost or damaged."""
    try:
        body = read_stamp_file(files)
    except DamagedError:
        body = b""
    if len(body) % ROW.itemsize:
        body = b""
    return StampTable(rows=np.frombuffer(body, ROW))
