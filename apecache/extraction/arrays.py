"""Prepare the arrays of an extraction before anything is encoded.

Decide which arrays to fill and how they are laid out, and refuse what does not fit the store.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import numpy as np
import torch

from apecache.device import device_name, is_accelerator, timed_seconds
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.encoders.spec import EncoderSpec
from apecache.errors import MismatchError, StoreError
from apecache.extraction.compilation import _require_compiler, decide_compiled
from apecache.extraction.device_decoding import (
    DecodeDevice,
    decode_device,
    require_device_decoding,
)
from apecache.extraction.encode import encode_or_halve
from apecache.extraction.spec import ExtractSpec
from apecache.fingerprint import Fingerprint, Json, Modality, describe_difference
from apecache.store.array import FeatureArray
from apecache.store.layout import (
    MAX_SHARD_BYTES,
    ArrayLayout,
    ArrayRecord,
    chunk_bytes,
    with_metadata,
)
from apecache.store.reader import FeatureStore
from apecache.store.writer import create_array

CPU_BATCH: dict[Modality, int] = {"image": 32, "text": 64}
CUDA_BATCH = 256
CUDA_BATCH_TOKENS = 16_384
MAX_CAPTIONS = 4096
"""Most captions of a batch that is limited by its tokens."""
MIN_SHARD_ROWS = 256
MAX_SHARD_ROWS = 4096
SHARD_SECONDS = 60


def prepare_arrays(
    store: FeatureStore,
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    like: Mapping[str, ArrayLayout] | None = None,
    captions: Sequence[str] = (),
) -> list[ArrayRecord]:
    """Return the records of the arrays to fill, all of one modality, and make new arrays.

    New arrays get shards of equally many rows, so that one pass over the inputs fills all of them.
    Several processes may do this at the same time. The one that puts an array's record first
    decides its layout for all.

    Args:
        like: layouts of the arrays of an earlier segment, by name; those of a later segment are
            laid out alike.
        captions: for text encoders: what they are timed on. Token arrays are as wide as the longest
            caption.

    Returns:
        One record for each encoder, of an array that exists or of a new one.

    Raises:
        MismatchError: features of another encoder, preprocessing or batch size.
        StoreError: the disk is too small.
    """
    existing, layouts = arrays_and_layouts(
        store,
        encoders=encoders,
        rows=rows,
        spec=spec,
        like=like or {},
        captions=captions,
    )
    new_encoders: list[ImageEncoder | TextEncoder] = []
    new_layouts: list[ArrayLayout] = []
    for array, encoder, layout in zip(existing, encoders, layouts, strict=True):
        if array is None:
            new_encoders.append(encoder)
            new_layouts.append(layout)
    _require_room(store, new_layouts)
    # A later segment takes this decision from the first one.
    if not like and new_encoders:
        compile_new = decide_compiled(
            new_encoders,
            layout=new_layouts[0],
            requested=spec.compiled,
        )
        if compile_new:
            layouts = [replace(layout, compiled=True) for layout in layouts]
    _require_compiler(encoders, layouts)
    records: list[ArrayRecord] = []
    for array, encoder, layout in zip(existing, encoders, layouts, strict=True):
        if array is not None:
            records.append(array.record)
        else:
            records.append(_new_record(store, encoder=encoder, layout=layout, spec=spec))
    decided_layout = _create_arrays(store, records, existing)
    if decided_layout is not None:
        # Another process was first: begin again with what it decided, for all arrays alike.
        decided_layouts = dict.fromkeys((record.name for record in records), decided_layout)
        layouts_by_name = {**decided_layouts, **(like or {})}
        return prepare_arrays(
            store,
            encoders=encoders,
            rows=rows,
            spec=spec,
            like=layouts_by_name,
            captions=captions,
        )
    return records


def _create_arrays(
    store: FeatureStore,
    records: Sequence[ArrayRecord],
    existing: Sequence[FeatureArray | None],
) -> ArrayLayout | None:
    """Make the new arrays, and finish those that a killed run began.

    Returns:
        The layout of a new array that another process has just made differently, else None.
    """
    for record, array in zip(records, existing, strict=True):
        try:
            create_array(store.files, record)
        except MismatchError:
            if array is not None:
                raise
            return store.array(record.modality, record.name).record.layout
    return None


def arrays_and_layouts(
    store: FeatureStore | None,
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    like: Mapping[str, ArrayLayout],
    captions: Sequence[str],
) -> tuple[list[FeatureArray | None], list[ArrayLayout]]:
    """Find the array of each encoder, and how it is or would be laid out; nothing is written.

    Returns:
        For each encoder the existing array or None, and the layout.

    Raises:
        MismatchError: as `prepare_arrays`.
        OptionError: images are to be decoded on a device that cannot.
    """
    names = [array_name(encoder, spec) for encoder in encoders]
    existing: list[FeatureArray | None] = []
    new_encoders: list[ImageEncoder | TextEncoder] = []
    for encoder in encoders:
        array = _find_array(store, encoder=encoder, spec=spec, names=names) if store else None
        existing.append(array)
        if array is None:
            new_encoders.append(encoder)
        decode = spec.decode if array is None else decode_device(array.record)
        if decode == "cuda" and isinstance(encoder, ImageEncoder):
            require_device_decoding(encoder, of_views=spec.views is not None)
    new_layouts = _layouts(new_encoders, rows=rows, spec=spec, like=like, captions=captions)
    remaining_layouts = iter(new_layouts)
    layouts: list[ArrayLayout] = []
    for array in existing:
        layouts.append(next(remaining_layouts) if array is None else array.record.layout)
    return existing, layouts


def array_name(encoder: ImageEncoder | TextEncoder, spec: ExtractSpec) -> str:
    """Return the name of an encoder's array: the encoder's slug and the number of views.

    A text encoder may take fewer tokens than were asked for; the name says how many it takes.
    """
    if isinstance(encoder, TextEncoder):
        used = encoder.max_tokens if encoder.spec.max_tokens is not None else None
        return replace(encoder.spec, max_tokens=used).slug
    return encoder.spec.slug + (f"-{spec.views.count}views" if spec.views else "")


def _new_record(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    layout: ArrayLayout,
    spec: ExtractSpec,
) -> ArrayRecord:
    """Describe a new array. Nothing is written."""
    fingerprint = _fingerprint(
        encoder,
        spec=spec,
        batch=_Batching(size=layout.batch_size, tokens=layout.batch_tokens),
        compiled=layout.compiled,
        decode=spec.decode,
    )
    record = ArrayRecord(
        modality=encoder.spec.modality,
        name=array_name(encoder, spec),
        spec=encoder.spec,
        fingerprint=fingerprint,
        layout=layout,
        metadata={},
        environment=environment(encoder.device) | _precision(encoder.spec, spec),
        table=store.source["digest"],
    )
    return with_metadata(record)


def _precision(encoder: EncoderSpec, spec: ExtractSpec) -> Json:
    """Return what was measured of the encoder's precision, as a record keeps it; empty without."""
    model = replace(encoder, pooling="default", layer=None)
    for measured in spec.measured:
        if measured.model == model:
            return {"precision": measured.to_json()}
    return {}


def _find_array(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
    names: Sequence[str],
) -> FeatureArray | None:
    """Find the array of that name, or else of that encoder.

    Args:
        names: of all arrays that are asked for.

    Raises:
        MismatchError: the array has other settings; or, without `add`, there is one that was not
            asked for.
    """
    existing = store.arrays(encoder.spec.modality)
    name = array_name(encoder, spec)
    # Batch size and compilation are not compared here, so any values will do.
    asked_fields = _fingerprint(
        encoder,
        spec=spec,
        batch=_Batching(size=0),
        compiled=False,
        decode=None,
    ).fields
    identity = _kind(asked_fields)
    same_name = None
    same_encoder = None
    unasked = None
    for array in existing:
        if same_name is None and array.name == name:
            same_name = array
        fields = array.record.fingerprint.fields
        if same_encoder is None and _kind(fields) == identity:
            same_encoder = array
        if unasked is None and not spec.add and array.name not in names:
            unasked = array
    nearest_array = same_name or same_encoder or unasked
    if nearest_array is not None:
        _require_same(store, array=nearest_array, encoder=encoder, spec=spec)
    return same_name or same_encoder


def _kind(fields: Mapping[str, Json]) -> Json:
    return {key: fields.get(key) for key in ("encoder", "views")}


def _fingerprint(
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
    batch: "_Batching",
    compiled: bool,
    decode: DecodeDevice | None,
) -> Fingerprint:
    """Return the identity of an array: its encoder's, how it is stored, and its views."""
    storage: Json = {"dtype": spec.storage_dtype, "batch_size": batch.size}
    if batch.tokens is not None:
        storage["batch_tokens"] = batch.tokens
    if compiled:
        storage["compile"] = "inductor"
    fields: Json = {"encoder": encoder.fingerprint.fields, "storage": storage}
    if decode == "cuda" and isinstance(encoder, ImageEncoder):
        fields["decode"] = "cuda"
    if spec.views and isinstance(encoder, ImageEncoder):
        fields["views"] = spec.views.to_json()
    return Fingerprint(fields=fields)


def _require_same(
    store: FeatureStore,
    array: FeatureArray,
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
) -> None:
    """Raise MismatchError unless an array has the encoder and storage that are asked for.

    Batch size and compilation are taken as recorded where they are not asked for.
    """
    recorded = array.record
    # Whether a text encoder can be compiled is found out when its array is made.
    compiled_option = spec.compiled if isinstance(encoder, ImageEncoder) else None
    compiled = recorded.layout.compiled if compiled_option is None else compiled_option
    recorded_batching = _Batching(
        size=recorded.layout.batch_size,
        tokens=recorded.layout.batch_tokens,
    )
    expected = _fingerprint(
        encoder,
        spec=spec,
        batch=_asked_batching(encoder, spec) or recorded_batching,
        compiled=compiled,
        decode=spec.decode or decode_device(recorded),
    )
    differences = expected.difference(recorded.fingerprint)
    if differences:
        # Under the same name there is no room for both.
        has_other_name = array.name != array_name(encoder, spec)
        remedy = ", or add --add to keep both" if has_other_name else ""
        raise MismatchError(
            f"{store.path} holds {recorded.modality} features {array.name} of another encoder or "
            "setting: "
            f"{describe_difference(differences)}; choose another --store{remedy}",
            differences,
        )


def _layouts(
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    like: Mapping[str, ArrayLayout],
    captions: Sequence[str],
) -> list[ArrayLayout]:
    """Lay out one array for each encoder.

    Shards have the same number of rows in all of them, unless an earlier segment decides.
    """
    if not encoders:
        return []
    batching = _asked_batching(encoders[0], spec) or _default_batching(encoders[0])
    names = [array_name(encoder, spec) for encoder in encoders]
    unsharded = [
        _layout(encoder, rows=rows, batching=batching, spec=spec, captions=captions)
        for encoder in encoders
    ]
    shard_rows = spec.shard_rows
    if shard_rows is None and not all(name in like for name in names):
        shard_rows = _calibrated_rows(encoders, batching, captions)
    # The array with the widest rows limits all of them.
    max_shard_rows = min(max(1, MAX_SHARD_BYTES // layout.row_bytes) for layout in unsharded)
    new_shard_rows = max(1, min(shard_rows or 1, rows, max_shard_rows))
    layouts: list[ArrayLayout] = []
    for name, layout in zip(names, unsharded, strict=True):
        if name in like:
            layouts.append(_as_before(layout, like[name]))
        else:
            layouts.append(replace(layout, shard_rows=new_shard_rows))
    return layouts


@dataclass(frozen=True, kw_only=True)
class _Batching:
    """Limit the batches of an array."""

    size: int
    """Images, or most captions."""
    tokens: int | None = None
    """Most tokens of a batch of captions."""


def _asked_batching(encoder: ImageEncoder | TextEncoder, spec: ExtractSpec) -> _Batching | None:
    """Return the limits that are asked for, if any."""
    size = spec.batch(encoder)
    tokens = spec.text_batch_tokens if isinstance(encoder, TextEncoder) else None
    if size is None and tokens is None:
        return None
    return _Batching(size=size or MAX_CAPTIONS, tokens=tokens)


def _default_batching(encoder: ImageEncoder | TextEncoder) -> _Batching:
    """Return the limits of new arrays where none are asked for."""
    if not is_accelerator(encoder.device):
        return _Batching(size=CPU_BATCH[encoder.spec.modality])
    if isinstance(encoder, TextEncoder):
        return _Batching(size=MAX_CAPTIONS, tokens=CUDA_BATCH_TOKENS)
    return _Batching(size=CUDA_BATCH)


def _as_before(layout: ArrayLayout, like: ArrayLayout) -> ArrayLayout:
    """Lay an array out like that of an earlier segment, as far as its rows allow."""
    max_shard_rows = MAX_SHARD_BYTES // layout.row_bytes
    return replace(
        layout,
        shard_rows=max(1, min(like.shard_rows, layout.rows, max_shard_rows)),
        batch_size=like.batch_size,
        batch_tokens=like.batch_tokens,
        threads=like.threads,
        compiled=like.compiled,
    )


def _layout(
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    batching: _Batching,
    spec: ExtractSpec,
    captions: Sequence[str],
) -> ArrayLayout:
    """Lay an array out, with shards of one row until their size is decided."""
    n_tokens = encoder.row_shape[0] if len(encoder.row_shape) > 1 else None
    ragged = False
    if n_tokens is not None and isinstance(encoder, TextEncoder):
        ragged = True
        # As wide as the longest caption: the encoder's own limit would waste space.
        caption_ids = encoder.tokenize(captions).ids
        n_tokens = max((len(ids) for ids in caption_ids), default=1)
    n_views = spec.views.count if spec.views and isinstance(encoder, ImageEncoder) else None
    return ArrayLayout(
        rows=rows,
        dim=encoder.dim,
        dtype=spec.storage_dtype,
        shard_rows=1,
        batch_size=batching.size,
        batch_tokens=batching.tokens,
        threads=torch.get_num_threads(),
        views=n_views,
        tokens=n_tokens,
        ragged=ragged,
    )


def _calibrated_rows(
    encoders: Sequence[ImageEncoder | TextEncoder],
    batching: _Batching,
    captions: Sequence[str],
) -> int:
    """Return the rows of about a minute of encoding, as a power of two.

    A kill costs at most one shard.
    """
    # Cuts of one model share their forward pass.
    models = {id(encoder.module): encoder for encoder in encoders}
    # Timed on a batch of usual size: how many captions fit into so many tokens varies.
    batch = batching.size if batching.tokens is None else min(batching.size, CUDA_BATCH)

    def encode_batch() -> None:
        for encoder in models.values():
            if isinstance(encoder, ImageEncoder):
                pixels = torch.zeros(batch, *encoder.input_shape)
                encode_or_halve(partial(encode_images, [encoder]), pixels, encoder.device)
            else:
                ids = encoder.tokenize(list(captions[:batch]) or ["a"]).ids
                encode_or_halve(partial(encode_texts, [encoder]), ids, encoder.device)

    # The first batch warms up: allocations and the choice of kernels are not to be counted.
    encode_batch()
    batch_seconds = timed_seconds(encode_batch, encoders[0].device)
    rows = SHARD_SECONDS * batch / max(batch_seconds, 1e-6)
    power_of_two = 2 ** int(np.log2(rows))
    return int(min(MAX_SHARD_ROWS, max(MIN_SHARD_ROWS, power_of_two)))


def _require_room(store: FeatureStore, layouts: Sequence[ArrayLayout]) -> None:
    """Raise StoreError if new arrays do not fit on the disk."""
    needed_bytes = sum(room_bytes(layout, layout.n_shards) for layout in layouts)
    free_bytes = store.files.free_bytes()
    # Object storage has no limit that could be asked for.
    if free_bytes is not None and needed_bytes > free_bytes:
        raise StoreError(
            f"{store.path}: {needed_bytes / 1e6:,.1f} MB needed for the features, "
            f"{free_bytes / 1e6:,.1f} MB free"
        )


def room_bytes(layout: ArrayLayout, shards: int) -> int:
    """Return the bytes that so many shards take on disk, records included."""
    shard_bytes = sum(chunk_bytes(layout).values())
    # 5 % more for the records of the shards.
    return int(1.05 * shards * shard_bytes)


def environment(device: torch.device) -> Json:
    """Return versions and device, which are recorded but never part of the identity."""
    names = ("apecache", "torch", "timm", "transformers", "numpy", "pillow", "zarr")
    versions = {name: version(name) for name in names}
    hardware = device_name(device) or platform.machine()
    return {
        "versions": versions,
        "device": device.type,
        "hardware": hardware,
        "python": platform.python_version(),
    }
