"""Identity: two caches are the same exactly when their fingerprints are.

A fingerprint is a tree of JSON values (encoder weights by digest, resolved preprocessing, cut,
dtypes); its digest is the SHA-256 of its canonical JSON. No path, time or pickle ever enters one.
Contents (files, captions, chunk objects) are identified by BLAKE3.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from blake3 import blake3

Modality = Literal["image", "text"]

FEATURE_CODE_VERSION = 1
"""Raised by hand whenever our own code would compute other features from the same encoder and
input."""

IMAGE_DECODING = (
    "pillow; EXIF orientation applied; alpha over white; 16-bit scaled to 8; first frame; RGB"
)
"""How `apecache.data.images` turns a file into RGB: part of the identity of every image feature."""

# str | int | float | bool | None | list[Json] | dict[str, Json]; mypy has no recursive alias that
# pays here
Json = Any
MISSING = "(missing)"


def canonical_json(value: Json) -> bytes:
    """The one UTF-8 encoding of a JSON value: sorted keys, no spaces. NaN and infinities raise
    ValueError."""
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )
    return text.encode("utf-8", "surrogatepass")


def content_hash(data: bytes | memoryview | str) -> str:
    """BLAKE3 of bytes, or of a string's UTF-8, as 64 hexadecimal digits."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return blake3(raw).hexdigest()


def digest_strings(strings: Iterable[str]) -> str:
    """BLAKE3 of a sequence of strings, each preceded by its length so that no two sequences
    collide."""
    hasher = blake3()
    for string in strings:
        raw = string.encode("utf-8", "surrogatepass")
        hasher.update(len(raw).to_bytes(8, "little") + raw)
    return hasher.hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], memoryview]]) -> str:
    """BLAKE3 of a state dict: (name, dtype, shape, little-endian bytes) in the order of the
    names."""
    hasher = blake3()
    for name, dtype, shape, data in sorted(tensors, key=lambda item: item[0]):
        hasher.update(canonical_json([name, dtype, list(shape), data.nbytes]))
        hasher.update(data.cast("B") if data.nbytes else b"")
    return hasher.hexdigest()


def flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Leaves of a JSON tree as (dotted path, value)."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """`fields` is what makes the features; `digest` is its identity (64 hexadecimal digits)."""

    fields: Mapping[str, Json]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(canonical_json(self.fields)).hexdigest()

    def difference(self, expected: "Fingerprint") -> list[tuple[str, Json, Json]]:
        """(field, here, expected) for every leaf that is not the same, sorted by field."""
        here = dict(flatten(self.fields))
        there = dict(flatten(expected.fields))
        paths = sorted(here.keys() | there.keys())
        pairs = ((path, here.get(path, MISSING), there.get(path, MISSING)) for path in paths)
        return [(path, a, b) for path, a, b in pairs if a != b]


def describe_difference(differences: Iterable[tuple[str, Json, Json]], limit: int = 3) -> str:
    """`field: found x, expected y; …` on one line; long values are shortened in the middle."""
    rows = list(differences)
    shown = "; ".join(
        f"{path}: {shorten(a)} here, {shorten(b)} in the store" for path, a, b in rows[:limit]
    )
    return shown + (f"; and {len(rows) - limit} more" if len(rows) > limit else "")


def shorten(value: object, width: int = 40) -> str:
    text = str(value)
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2 - 1) :]}"
