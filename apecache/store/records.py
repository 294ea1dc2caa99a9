"""The commit record: the one thing that makes a shard exist."""

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
"""Stands for the content hash of a row whose input could not be read."""


@dataclass(frozen=True)
class ObjectRecord:
    """Size in bytes, BLAKE3, and for chunk files the crc32c that ends them."""

    bytes: int
    blake3: str
    crc32c: int | None = None


@dataclass(frozen=True)
class CommitRecord:
    """`rows` is (first, past the last). `content` has the hash of each row's input, empty where it
    was unreadable; it is most of a record, and `without_content` is what can be kept of very
    many."""

    shard: int
    rows: tuple[int, int]
    n_ok: int
    n_quarantined: int
    objects: Mapping[str, ObjectRecord]
    content: Sequence[str]
    fingerprint: str

    def without_content(self) -> "CommitRecord":
        return CommitRecord(**{**vars(self), "content": ()})

    def to_bytes(self) -> bytes:
        """JSON. The hashes stand in one string: thousands of short ones cost a hundred times as
        much to read."""
        objects = {name: asdict(entry) for name, entry in self.objects.items()}
        content = " ".join(digest or UNREAD for digest in self.content)
        return with_checksum(
            {"format": FORMAT_VERSION, **vars(self), "objects": objects, "content": content}
        )

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "CommitRecord":
        """Raises DamagedError if the record is not exactly what was committed, StoreError for a
        newer format."""
        value = parse_record(data, where)
        try:
            objects = {name: ObjectRecord(**entry) for name, entry in value["objects"].items()}
            kinds = {
                (type(entry.bytes), type(entry.blake3), type(entry.crc32c))
                for entry in objects.values()
            }
            if not kinds <= {(int, str, int), (int, str, type(None))}:
                raise ValueError("objects of other kinds than expected")
            rows = (int(value["rows"][0]), int(value["rows"][1]))
            counts = (int(value["n_ok"]), int(value["n_quarantined"]))
            content = ["" if digest == UNREAD else digest for digest in value["content"].split()]
            return CommitRecord(
                int(value["shard"]),
                rows,
                *counts,
                objects,
                content,
                str(value["fingerprint"]),
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
    """Records of an array in order of shards, each with the hash of its bytes; one at a time, for
    `content` is long.

    Raises:
        DamagedError: a record is not what was committed, or not in its place.
        MismatchError: a record of other features.
    """
    folder = f"{records_folder(array.modality, array.name)}/commits"
    names = [f"{folder}/{name}" for name in files.list(folder) if is_commit(name)]
    for name, data in zip(names, files.read_all(names), strict=True):
        yield _read_commit(data, array, name)


def is_commit(file: str) -> bool:
    """Whether a file in `commits/` has the name of a record; any other one is not ours."""
    shard, _, ending = file.partition(".")
    return ending == "json" and shard.isdecimal() and file == f"{int(shard):08d}.json"


def read_commit(files: Files, array: ArrayRecord, shard: int) -> tuple[CommitRecord, str]:
    """One record and the hash of its bytes. Raises FileNotFoundError if there is none, else as
    `read_commits` does."""
    name = commit_name(array.modality, array.name, shard)
    return _read_commit(files.read(name), array, name)


def _read_commit(data: bytes, array: ArrayRecord, name: str) -> tuple[CommitRecord, str]:
    return _fitting(CommitRecord.from_bytes(data, name), array, name), content_hash(data)


def digest_commits(hashes: Iterable[str]) -> str:
    """What the seal keeps: one hash over those of all records, in order of shards."""
    return content_hash("".join(hashes))


def _fitting(record: CommitRecord, array: ArrayRecord, name: str) -> CommitRecord:
    """A record is good for one shard of one array; a valid one of another shard must not take its
    place."""
    if record.fingerprint != array.fingerprint.digest:
        raise MismatchError(
            f"{name}: shard {record.shard} of {array.name} was made by another encoder"
        )
    rows = array.layout.shard(record.shard)
    sizes = {part: entry.bytes for part, entry in record.objects.items()}
    wanted = {
        chunk_name(array, part, record.shard): size
        for part, size in chunk_bytes(array.layout).items()
    }
    if (
        name != commit_name(array.modality, array.name, record.shard)
        or record.rows != (rows.start, rows.stop)
        or len(record.content) != len(rows)
        or wanted.items() - sizes.items()
        or sizes.keys()
        - wanted.keys()
        - {quarantine_name(array.modality, array.name, record.shard)}
    ):
        raise DamagedError(
            f"{name}: the record is not of this shard of {array.name}; restore the file"
        )
    return record


def read_record(files: Files, name: str) -> dict[str, Any]:
    """Raises DamagedError if a record is missing, damaged or not in its place, StoreError for a
    newer format."""
    try:
        value = parse_record(files.read(name), name)
    except FileNotFoundError:
        raise DamagedError(f"{files.where(name)} is missing; restore the file") from None
    if value.get("object") != name:
        place = one_line(value.get("object"))
        raise DamagedError(f"{files.where(name)} is in the wrong place ({place}); restore the file")
    if not _has_fields(value, name):
        raise DamagedError(f"{files.where(name)} lacks what such a record says; restore the file")
    return value


def _has_fields(value: Mapping[str, Any], name: str) -> bool:
    """Whether a record says what one of its place must say. Fingerprints are looked at by
    `ArrayRecord.from_json`."""
    counts: tuple[str, ...] = ()
    if name == SOURCE or name.startswith(f"{SEGMENT_RECORDS}/"):
        counts = ("n_images", "n_texts")
    if name.endswith("/fingerprint.json"):
        return True
    if name == PAIRS and not _are_objects(value.get("objects")):
        return False
    return isinstance(value.get("digest"), str) and all(
        type(value.get(count)) is int and value[count] >= 0 for count in counts
    )


def _are_objects(value: Any) -> bool:
    """Whether these are Zarr's objects of a pair table, each with its hash; nothing outside is ever
    read."""
    return isinstance(value, dict) and all(
        name.startswith(f"{ZARR}/")
        and ".." not in name.split("/")
        and "\0" not in name
        and isinstance(entry, dict)
        and isinstance(entry.get("blake3"), str)
        for name, entry in value.items()
    )


def seal_record(name: str, body: Mapping[str, Json]) -> bytes:
    """A JSON record with its own name, lest it is taken for another, and a checksum of itself."""
    return with_checksum({"format": FORMAT_VERSION, **body, "object": name})


def with_checksum(body: Mapping[str, Json]) -> bytes:
    """Canonical JSON whose first key is a checksum of all the rest: it is checked without being
    written anew."""
    rest = canonical_json(body)
    return CHECKSUM + content_hash(rest).encode() + b'",' + rest[1:]


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """Raises DamagedError if the checksum does not fit, StoreError for a newer format."""
    start = len(CHECKSUM)
    stop = len(CHECKSUM) + 64
    whole = data.startswith(CHECKSUM) and data[stop : stop + 2] == b'",'
    if not whole or content_hash(b"{" + data[stop + 2 :]).encode() != data[start:stop]:
        raise DamagedError(f"{where}: the record is damaged (its checksum does not fit)")
    try:
        value: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: the record is damaged ({error})") from None
    value.pop("checksum", None)
    require_format(value, where)
    return value
