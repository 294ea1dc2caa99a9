"""Read and write records, among them the commit record: a shard exists when its record does."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apecache.errors import DamagedError, MismatchError, one_line
from apecache.fingerprint import Json, canonical_json, content_hash
from apecache.storage.files import Files
from apecache.store.layout import (
    FORMAT_VERSION,
    PAIRS,
    SEGMENT_RECORDS,
    SOURCE,
    VIEW_FORMAT_VERSION,
    VIEW_RECORDS,
    VIEWS,
    ZARR,
    ArrayRecord,
    chunk_bytes,
    chunk_name,
    commit_name,
    quarantine_name,
    records_folder,
    require_format,
)

CHECKSUM = b'{"checksum":"'
UNREAD = "-"
"""Stands for the missing content hash of a row whose input could not be read."""
OBJECT_TYPES = {(int, str, int), (int, str, type(None))}
"""Types of bytes, blake3 and crc32c of an object's record."""


@dataclass(frozen=True)
class ObjectRecord:
    """Hold the size and the hashes of one object."""

    bytes: int
    blake3: str
    crc32c: int | None = None
    """The crc32c that ends a chunk file; None for other objects."""


@dataclass(frozen=True)
class CommitRecord:
    """Hold what was committed of one shard."""

    shard: int
    rows: tuple[int, int]
    """First row, and the row after the last one."""
    n_ok: int
    n_quarantined: int
    objects: Mapping[str, ObjectRecord]
    """Every object of the shard, by name."""
    content: Sequence[str]
    """Hash of each row's input; empty where it was unreadable."""
    fingerprint: str
    """Digest of the array's fingerprint."""

    def without_content(self) -> "CommitRecord":
        """Return the record without `content`, its largest field, to hold many in memory."""
        return CommitRecord(**{**vars(self), "content": ()})

    def to_bytes(self) -> bytes:
        """Return the record as JSON with a checksum."""
        objects = {name: asdict(entry) for name, entry in self.objects.items()}
        # One string: thousands of short ones cost a hundred times as much to read.
        content = " ".join(digest or UNREAD for digest in self.content)
        return with_checksum(
            {"format": FORMAT_VERSION, **vars(self), "objects": objects, "content": content}
        )

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "CommitRecord":
        """Parse a record.

        Args:
            data: The record's bytes.
            where: The record, for error messages.

        Raises:
            DamagedError: The record is not exactly what was committed.
            StoreError: It has a newer format.
        """
        value = parse_record(data, where)
        try:
            objects = {name: ObjectRecord(**entry) for name, entry in value["objects"].items()}
            object_types = {
                (type(entry.bytes), type(entry.blake3), type(entry.crc32c))
                for entry in objects.values()
            }
            if not object_types <= OBJECT_TYPES:
                raise ValueError("objects of other kinds than expected")
            rows = (int(value["rows"][0]), int(value["rows"][1]))
            n_ok = int(value["n_ok"])
            n_quarantined = int(value["n_quarantined"])
            content = value["content"].split()
            # Most shards have none: a look at each of a million hashes takes half a second.
            if UNREAD in value["content"]:
                content = ["" if digest == UNREAD else digest for digest in content]
            return CommitRecord(
                shard=int(value["shard"]),
                rows=rows,
                n_ok=n_ok,
                n_quarantined=n_quarantined,
                objects=objects,
                content=content,
                fingerprint=str(value["fingerprint"]),
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            OverflowError,
        ) as error:
            why = one_line(error)
            raise DamagedError(
                f"{where}: the record is damaged ({why}); run apecache extract again"
            ) from None


def read_commits(files: Files, array: ArrayRecord) -> Iterator[tuple[CommitRecord, str]]:
    """Yield the records of an array in order of shards, each with the hash of its bytes.

    They come one at a time, because `content` is long.

    Raises:
        DamagedError: A record is not what was committed, or not in its place.
        MismatchError: A record is of other features.
    """
    folder = f"{records_folder(array.modality, array.name)}/commits"
    names = [f"{folder}/{name}" for name in files.list(folder) if is_commit(name)]
    for name, data in zip(names, files.read_all(names), strict=True):
        yield _read_commit(data, array, name)


def is_commit(file: str) -> bool:
    """Return whether a file in `commits/` has the name of a record; others are foreign."""
    shard, _, ending = file.partition(".")
    return ending == "json" and shard.isdecimal() and file == f"{int(shard):08d}.json"


def read_commit(files: Files, array: ArrayRecord, shard: int) -> tuple[CommitRecord, str]:
    """Return one record and the hash of its bytes.

    Raises:
        FileNotFoundError: There is no such record.
        DamagedError: It is not what was committed, or not in its place.
        MismatchError: It is of other features.
    """
    name = commit_name(array.modality, array.name, shard)
    return _read_commit(files.read(name), array, name)


def _read_commit(data: bytes, array: ArrayRecord, name: str) -> tuple[CommitRecord, str]:
    record = CommitRecord.from_bytes(data, name)
    return _fitting(record, array, name), content_hash(data)


def digest_commits(hashes: Iterable[str]) -> str:
    """Return the digest of a seal: one hash over those of all records, in order of shards."""
    return content_hash("".join(hashes))


def _fitting(record: CommitRecord, array: ArrayRecord, name: str) -> CommitRecord:
    """Return the record if it is of this array and of the shard that its file name says.

    A valid record of another shard must not take its place.
    """
    if record.fingerprint != array.fingerprint.digest:
        raise MismatchError(
            f"{name}: shard {record.shard} of {array.name} was made by another encoder"
        )
    rows = array.layout.shard(record.shard)
    stored_sizes = {object_name: entry.bytes for object_name, entry in record.objects.items()}
    expected_sizes = {
        chunk_name(array, part_name, record.shard): size
        for part_name, size in chunk_bytes(array.layout).items()
    }
    # Every chunk with its size, and nothing else but a quarantine list.
    if (
        name != commit_name(array.modality, array.name, record.shard)
        or record.rows != (rows.start, rows.stop)
        or len(record.content) != len(rows)
        or expected_sizes.items() - stored_sizes.items()
        or stored_sizes.keys()
        - expected_sizes.keys()
        - {quarantine_name(array.modality, array.name, record.shard)}
    ):
        raise DamagedError(
            f"{name}: the record is not of this shard of {array.name}; restore the file"
        )
    return record


def read_record(files: Files, name: str) -> dict[str, Any]:
    """Read a record that `seal_record` wrote.

    Raises:
        DamagedError: The record is missing, damaged or not in its place.
        StoreError: It has a newer format.
    """
    try:
        value = parse_record(files.read(name), name)
    except FileNotFoundError:
        raise DamagedError(f"{files.where(name)} is missing; restore the file") from None
    if value.get("object") != name:
        recorded_name = one_line(value.get("object"))
        raise DamagedError(
            f"{files.where(name)} is in the wrong place ({recorded_name}); restore the file"
        )
    if not _has_fields(value, name):
        raise DamagedError(f"{files.where(name)} lacks what such a record says; restore the file")
    return value


def _has_fields(value: Mapping[str, Any], name: str) -> bool:
    """Return whether a record has the fields that its name requires.

    `ArrayRecord.from_json` checks the fields of fingerprints.
    """
    count_fields: tuple[str, ...] = ()
    if name == SOURCE or name.startswith(f"{SEGMENT_RECORDS}/"):
        count_fields = ("n_images", "n_texts")
    if name.endswith("/fingerprint.json"):
        return True
    if name == PAIRS and not _are_objects(value.get("objects"), ZARR):
        return False
    # `parse_view` checks all other fields of a view.
    if name.startswith(f"{VIEW_RECORDS}/") and not _are_objects(value.get("objects"), VIEWS):
        return False
    return isinstance(value.get("digest"), str) and all(
        type(value.get(count)) is int and value[count] >= 0 for count in count_fields
    )


def _are_objects(value: object, folder: str) -> bool:
    """Return whether these are objects of a table below a folder, each with its hash."""
    return isinstance(value, dict) and all(
        _is_below(name, folder) and isinstance(entry, dict) and isinstance(entry.get("blake3"), str)
        for name, entry in value.items()
    )


def _is_below(name: str, folder: str) -> bool:
    # Objects are read by these names, so a record must not name a file outside.
    return name.startswith(f"{folder}/") and ".." not in name.split("/") and "\0" not in name


def seal_record(name: str, body: Mapping[str, Json], of_view: bool = False) -> bytes:
    """Return a JSON record with a checksum, and its own name so that no other can replace it.

    Args:
        name: The record.
        body: Its fields.
        of_view: Whether an apecache that knows no views must refuse it.
    """
    format_version = VIEW_FORMAT_VERSION if of_view else FORMAT_VERSION
    return with_checksum({"format": format_version, **body, "object": name})


def with_checksum(body: Mapping[str, Json]) -> bytes:
    """Return canonical JSON whose first key is a checksum of all that follows.

    So the bytes of a record can be checked without parsing them.
    """
    body_json = canonical_json(body)
    return CHECKSUM + content_hash(body_json).encode() + b'",' + body_json[1:]


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """Parse a record.

    Args:
        data: The record's bytes.
        where: The record, for error messages.

    Raises:
        DamagedError: The checksum does not fit.
        StoreError: The record has a newer format.
    """
    # A BLAKE3 hash has 64 hexadecimal digits.
    start = len(CHECKSUM)
    stop = len(CHECKSUM) + 64
    has_checksum = data.startswith(CHECKSUM) and data[stop : stop + 2] == b'",'
    if not has_checksum or content_hash(b"{" + data[stop + 2 :]).encode() != data[start:stop]:
        raise DamagedError(f"{where}: the record is damaged (its checksum does not fit)")
    try:
        value: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: the record is damaged ({error})") from None
    # The checksum is checked above; what is left is what `with_checksum` got.
    value.pop("checksum", None)
    require_format(value, where)
    return value
