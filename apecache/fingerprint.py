"""Identify features: two caches are the same exactly if their fingerprints are the same.

A fingerprint is a tree of JSON values (encoder weights by digest, resolved preprocessing, cut,
dtypes). Its digest is the SHA-256 of its canonical JSON. It never holds a path, a time or a pickle.
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
"""Increased by hand whenever a change of this package makes other features from the same encoder
and input."""

IMAGE_DECODING = (
    "pillow; EXIF orientation applied; alpha over white; 16-bit scaled to 8; first frame; RGB"
)
"""How `apecache.data.images` turns a file into RGB: part of the identity of every image feature."""

# str | int | float | bool | None | list[Json] | dict[str, Json]: as a recursive alias it would need
# a cast at every access.
Json = Any
MISSING = "(missing)"


def canonical_json(value: Json) -> bytes:
    """Encode a JSON value in its only canonical form: UTF-8, sorted keys, no spaces.

    Raises:
        ValueError: NaN or an infinity.
    """
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )
    # File names may hold bytes that are not UTF-8, which Python keeps as surrogates.
    return text.encode("utf-8", "surrogatepass")


def content_hash(data: bytes | memoryview | str) -> str:
    """Return the BLAKE3 of bytes, or of a string's UTF-8, as 64 hexadecimal digits."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return blake3(raw).hexdigest()


def hash_buffers(buffers: Iterable[bytes | memoryview]) -> str:
    """Return the `content_hash` of buffers that follow one another, without joining them."""
    hasher = blake3()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


def digest_strings(strings: Iterable[str]) -> str:
    """Return the BLAKE3 of a sequence of strings."""
    hasher = blake3()
    for string in strings:
        raw = string.encode("utf-8", "surrogatepass")
        # The length comes first, so that no two sequences have the same bytes.
        hasher.update(len(raw).to_bytes(8, "little") + raw)
    return hasher.hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], memoryview]]) -> str:
    """Return the BLAKE3 of a state dict.

    Args:
        tensors: name, dtype, shape and little-endian bytes of each tensor, in any order.
    """
    hasher = blake3()
    for name, dtype, shape, data in sorted(tensors, key=lambda item: item[0]):
        hasher.update(canonical_json([name, dtype, list(shape), data.nbytes]))
        # An empty view cannot be cast.
        hasher.update(data.cast("B") if data.nbytes else b"")
    return hasher.hexdigest()


def flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Yield the leaves of a JSON tree as (dotted path, value), sorted by key."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from flatten(value[key], path)
    else:
        yield prefix, value


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Hold what determines the features of an encoder."""

    fields: Mapping[str, Json]

    @cached_property
    def digest(self) -> str:
        """Return the identity of the fields, 64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.fields)).hexdigest()

    def difference(self, expected: "Fingerprint") -> list[tuple[str, Json, Json]]:
        """Return (field, own value, expected value) of every differing leaf, sorted by field."""
        own_fields = dict(flatten(self.fields))
        expected_fields = dict(flatten(expected.fields))
        paths = sorted(own_fields.keys() | expected_fields.keys())
        differences = []
        for path in paths:
            own_value = own_fields.get(path, MISSING)
            expected_value = expected_fields.get(path, MISSING)
            if own_value != expected_value:
                differences.append((path, own_value, expected_value))
        return differences


def describe_difference(differences: Iterable[tuple[str, Json, Json]], limit: int = 3) -> str:
    """Describe differences on one line: `field: x here, y in the store; …`.

    Args:
        differences: as `Fingerprint.difference` returns them.
        limit: differences that are shown; of the others only the number is.
    """
    rows = list(differences)
    shown = [
        f"{path}: {shorten(own_value)} here, {shorten(expected_value)} in the store"
        for path, own_value, expected_value in rows[:limit]
    ]
    suffix = f"; and {len(rows) - limit} more" if len(rows) > limit else ""
    return "; ".join(shown) + suffix


def shorten(value: object, width: int = 40) -> str:
    """Return the text of a value, shortened in the middle if it is longer than `width`."""
    text = str(value)
    if len(text) <= width:
        return text
    half = width // 2 - 1
    return f"{text[:half]}…{text[-half:]}"
