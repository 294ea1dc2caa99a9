"""Before anything is encoded: which array to fill, laid out how, and whether it fits what is there."""

import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from os import cpu_count
from typing import Literal

import numpy as np
import torch

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.spec import EncoderSpec
from apecache.errors import MismatchError, StoreError
from apecache.fingerprint import Fingerprint, Json, describe_difference
from apecache.store.layout import MAX_SHARD_BYTES, ArrayLayout, ArrayRecord, chunk_bytes, with_metadata
from apecache.store.reader import FeatureArray, FeatureStore
from apecache.store.writer import create_array

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 256, 4096
SHARD_SECONDS = 60


@dataclass(frozen=True)
class ExtractSpec:
    """What to encode and how. `None` leaves a choice to the store (when resuming) or to the machine (when new).

    `max_bad`: share of rows that may be unreadable before the run ends as an error (after encoding all others).
    `add`: put features of another encoder beside those that the store has. `append`: the table has grown at its end;
    put the new rows into a new segment. `recheck`: read every input again and compare it with what was encoded.
    """

    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    image_batch: int | None = None
    text_batch: int | None = None
    shard_rows: int | None = None
    storage_dtype: Literal["float16", "float32"] = "float16"
    workers: int = field(default_factory=lambda: min(16, cpu_count() or 1))
    max_bad: float = 0.01
    device: str = "auto"
    add: bool = False
    append: bool = False
    recheck: bool = False

    def batch(self, encoder: ImageEncoder | TextEncoder) -> int | None:
        return self.image_batch if isinstance(encoder, ImageEncoder) else self.text_batch


def prepare_array(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    spec: ExtractSpec,
    like: ArrayLayout | None = None,
    captions: Sequence[str] = (),
) -> ArrayRecord:
    """The array to fill: the one that is there, if it is of this encoder, else a new one.

    Args:
        like: how an earlier segment of the same array is laid out; a later one is batched and sharded alike.
        captions: what a text encoder is timed on.

    Raises:
        MismatchError: features of another encoder, preprocessing or batch size. StoreError: the disk is too small.
    """
    found = _find_array(store, encoder, spec)
    if found is not None:
        create_array(store.files, found.record)  # finishes what a killed run began
        record = found.record
    else:
        layout = _layout(encoder, rows, spec, like, captions)
        _require_room(store, layout)
        fingerprint = _fingerprint(encoder, spec.storage_dtype, layout.batch_size)
        where = environment(encoder.device)
        name, modality = encoder.spec.slug, encoder.spec.modality
        table = store.source["digest"]
        record = with_metadata(ArrayRecord(modality, name, encoder.spec, fingerprint, layout, {}, where, table))
        create_array(store.files, record)
    torch.set_num_threads(record.layout.threads)  # the last bits of features depend on it
    return record


def _find_array(store: FeatureStore, encoder: ImageEncoder | TextEncoder, spec: ExtractSpec) -> FeatureArray | None:
    """The array of that name or of that encoder; without `add`, any other one is a mismatch."""
    existing = store.arrays(encoder.spec.modality)
    same = next((array for array in existing if array.name == encoder.spec.slug), None)
    alike = next((array for array in existing if array.record.encoder.digest == encoder.fingerprint.digest), None)
    nearest_array = same or alike or (existing[0] if existing and not spec.add else None)
    if nearest_array is not None:
        _require_same(store, nearest_array, encoder, spec)
    return same or alike


def _fingerprint(encoder: ImageEncoder | TextEncoder, dtype: str, batch: int) -> Fingerprint:
    return Fingerprint({"encoder": encoder.fingerprint.fields, "storage": {"dtype": dtype, "batch_size": batch}})


def _require_same(
    store: FeatureStore, array: FeatureArray, encoder: ImageEncoder | TextEncoder, spec: ExtractSpec
) -> None:
    """Without a batch size asked for, the recorded one is taken; the encoder and the storage must be the same."""
    recorded = array.record
    wanted = _fingerprint(encoder, spec.storage_dtype, spec.batch(encoder) or recorded.layout.batch_size)
    differences = wanted.difference(recorded.fingerprint)
    if differences:
        raise MismatchError(
            f"{store.path} holds {recorded.modality} features {array.name} of another encoder or setting: "
            f"{describe_difference(differences)}; choose another --store"
            + (", or add --add to keep both" if array.name != encoder.spec.slug else ""),
            differences,
        )


def _layout(
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    spec: ExtractSpec,
    like: ArrayLayout | None,
    captions: Sequence[str],
) -> ArrayLayout:
    if like is not None:
        shard_rows, size, threads = like.shard_rows, like.batch_size, like.threads
    else:
        size = spec.batch(encoder) or (256 if encoder.device.type == "cuda" else 32)
        shard_rows = spec.shard_rows or _calibrated_rows(encoder, size, captions)
        threads = torch.get_num_threads()
    per_row = encoder.dim * np.dtype(spec.storage_dtype).itemsize
    shard_rows = max(1, min(shard_rows, rows, MAX_SHARD_BYTES // per_row))
    return ArrayLayout(rows, encoder.dim, spec.storage_dtype, shard_rows, size, threads)


def _calibrated_rows(encoder: ImageEncoder | TextEncoder, batch: int, captions: Sequence[str]) -> int:
    """Rows of about a minute of encoding, as a power of two: what a kill can cost at most."""

    def once() -> float:
        begin = time.perf_counter()
        if isinstance(encoder, ImageEncoder):
            encoder.encode(torch.zeros(batch, *encoder.input_shape))
        else:
            encoder.encode(list(captions[:batch]) or ["a"], batch)
        return time.perf_counter() - begin

    once()
    rows = SHARD_SECONDS * batch / max(once(), 1e-6)
    return int(min(MAX_SHARD_ROWS, max(MIN_SHARD_ROWS, 2 ** int(np.log2(rows)))))


def _require_room(store: FeatureStore, layout: ArrayLayout) -> None:
    needed = int(1.05 * layout.n_shards * sum(chunk_bytes(layout).values()))
    free = shutil.disk_usage(store.path).free
    if needed > free:
        raise StoreError(f"{store.path}: {needed / 1e6:,.1f} MB needed for the features, {free / 1e6:,.1f} MB free")


def environment(device: torch.device) -> Json:
    """Versions and device: recorded, never part of the identity."""
    names = ("apecache", "torch", "timm", "transformers", "numpy", "pillow", "zarr")
    versions = {name: version(name) for name in names}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"versions": versions, "device": device.type, "hardware": gpu, "python": platform.python_version()}
