"""The commit record: the one thing that makes a shard exist."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apecache.errors import DamagedError
from apecache.fingerprint import Json, canonical_json, content_hash
from apecache.store.layout import FORMAT_VERSION, require_format


@dataclass(frozen=True)
class ObjectRecord:
    """Size in bytes, BLAKE3, and for chunk files the crc32c that ends them."""

    bytes: int
    blake3: str
    crc32c: int | None = None


@dataclass(frozen=True)
class CommitRecord:
    """`rows` is (first, past the last). `content` has the hash of each row's input, empty where it was unreadable."""

    shard: int
    rows: tuple[int, int]
    n_ok: int
    n_quarantined: int
    objects: Mapping[str, ObjectRecord]
    content: Sequence[str]
    fingerprint: str

    def to_bytes(self) -> bytes:
        body = {"format": FORMAT_VERSION, **asdict(self)}
        return canonical_json({**body, "checksum": content_hash(canonical_json(body))})

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "CommitRecord":
        """Raises DamagedError if the record is not exactly what was committed, StoreError for a newer format."""
        value = parse_record(data, where)
        try:
            objects = {name: ObjectRecord(**entry) for name, entry in value["objects"].items()}
            rows = (int(value["rows"][0]), int(value["rows"][1]))
            counts = (int(value["n_ok"]), int(value["n_quarantined"]))
            return CommitRecord(
                int(value["shard"]), rows, *counts, objects, value["content"], str(value["fingerprint"])
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DamagedError(f"{where}: the record is damaged ({error}); run apecache extract again") from None


def seal_record(body: Mapping[str, Json]) -> bytes:
    """A JSON record with a checksum of itself."""
    full = {"format": FORMAT_VERSION, **body}
    return canonical_json({**full, "checksum": content_hash(canonical_json(full))})


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """Raises DamagedError if the checksum does not fit, StoreError for a newer format."""
    try:
        value = json.loads(data)
        checksum = value.pop("checksum")
        damaged = checksum != content_hash(canonical_json(value))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged, value = True, None
    if damaged or not isinstance(value, dict):
        raise DamagedError(f"{where}: the record is damaged (its checksum does not fit)")
    require_format(value, where)
    return value
