"""Identify imported features: by their encoder where it is named, else by the name they are given.

Whether a named encoder is the right one is tried on a few rows whose inputs can be read.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from apecache.encoders.spec import IMPORTED, EncoderSpec
from apecache.fingerprint import Fingerprint, Json, Modality, content_hash, digest_strings
from apecache.store.feature_files.rows import FeatureRows
from apecache.store.import_sides import NamedRows
from apecache.store.import_spec import StorageDtype
from apecache.store.layout import MAX_SHARD_BYTES, ArrayLayout

HASH_BLOCK_BYTES = 8 << 20
SHARD_BYTES = 16 << 20
"""Of a new array. Each shard costs some seven syncs of the disk, and an interrupted import has
little to do again."""
NORMALIZED = "normalized"
"""Field of an encoder's identity: its features were divided by their length before the import."""


@dataclass(frozen=True, kw_only=True)
class KnownEncoder:
    """Name the encoder of imported features, with what identifies it."""

    spec: EncoderSpec
    fields: Json
    """Its fingerprint."""


def unknown_encoder(named: NamedRows, modality: Modality) -> KnownEncoder:
    """Return the identity of features whose encoder is not named: their name and their shape."""
    rows = named.rows
    has_tokens = token_count(named) is not None
    spec = EncoderSpec(
        IMPORTED,
        name=named.name,
        modality=modality,
        pooling="tokens" if has_tokens else "default",
    )
    fields: Json = {
        "library": IMPORTED,
        "name": named.name,
        "modality": modality,
        "cut": "tokens" if has_tokens else "pooled",
        "dim": rows.row_shape[-1],
    }
    return KnownEncoder(spec=spec, fields=fields)


def token_count(named: NamedRows) -> int | None:
    """Return the number of tokens of a row, of the longest if they differ; None if pooled."""
    shape = named.rows.row_shape[1 if named.views else 0 :]
    return shape[0] if len(shape) > 1 else None


def layout_of(
    named: NamedRows,
    n_rows: int,
    storage_dtype: StorageDtype | None,
    shard_rows: int | None,
) -> ArrayLayout:
    """Lay out an imported array."""
    rows = named.rows
    layout = ArrayLayout(
        rows=n_rows,
        dim=rows.row_shape[-1],
        dtype=storage_dtype or rows.dtype.name,
        shard_rows=1,
        batch_size=1,
        threads=1,
        views=rows.row_shape[0] if named.views else None,
        tokens=token_count(named),
        ragged=rows.lengths is not None,
    )
    most_rows = max(1, MAX_SHARD_BYTES // layout.row_bytes)
    usual_rows = max(1, SHARD_BYTES // layout.row_bytes)
    return replace(layout, shard_rows=max(1, min(shard_rows or usual_rows, most_rows, n_rows)))


def import_fingerprint(
    encoder: KnownEncoder,
    layout: ArrayLayout,
    source_digest: str,
    row_map: NDArray[np.int64],
) -> Fingerprint:
    """Return the identity of an imported array.

    Args:
        encoder: What made the features.
        layout: How they are stored.
        source_digest: Content hash of the files, or of the array in memory.
        row_map: The row of the source of each row.
    """
    # Another list of keys gives other rows from the same files.
    map_hash = content_hash(np.ascontiguousarray(row_map, "<i8").tobytes())
    fields: dict[str, Json] = {
        "encoder": encoder.fields,
        "storage": {"dtype": layout.dtype},
        "import": {"source": source_digest, "rows": map_hash},
    }
    if layout.views is not None:
        fields["views"] = {"count": layout.views, "augmentation": "unknown: imported"}
    return Fingerprint(fields=fields)


def digest_source(paths: Sequence[Path], rows: FeatureRows) -> str:
    """Return the content hash of files, whatever their names; of an array if there are none."""
    if not paths:
        values: Any = getattr(rows, "values", None)
        block = np.ascontiguousarray(values)
        shape = ",".join(map(str, block.shape))
        return digest_strings([block.dtype.str, shape, content_hash(block.data.cast("B"))])
    hashes = [_hash_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else digest_strings(hashes)


def _hash_file(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = bytearray(HASH_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:count])
    return hasher.hexdigest()


def import_environment() -> Json:
    """Return versions and the machine, which are recorded but never part of the identity."""
    names = ("apecache", "numpy", "zarr")
    return {
        "versions": {name: version(name) for name in names},
        "device": "imported",
        "hardware": platform.machine(),
        "python": platform.python_version(),
    }
