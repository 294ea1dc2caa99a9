"""Before anything is encoded: which array to fill, laid out how, and whether it fits what is
there."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from os import cpu_count
from typing import Any, Literal

import numpy as np
import torch

from apecache.arguments import require_type
from apecache.data.augment import Views
from apecache.encoders.encoder import ImageEncoder, TextEncoder, compile_images, encode_images
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, MismatchError, OptionError, StoreError, one_line
from apecache.extraction.shard_range import WHOLE, Part
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

FEW_CORES = 2
MAX_WORKERS = 16
CPU_BATCH: dict[Modality, int] = {"image": 32, "text": 64}
CUDA_BATCH = 256
MIN_SHARD_ROWS = 256
MAX_SHARD_ROWS = 4096
SHARD_SECONDS = 60
COMPILE_FROM_ROWS = 4096
COMPILE_FROM_SECONDS = 600
COMPILED_SHARE = 0.9


def default_workers(cores: int | None = None) -> int:
    """Decoding processes, one for each core (None: of this machine). On few cores they take them
    from the model's own threads, and threads are faster (benchmarks/speed/extract compares
    both)."""
    cores = cores or cpu_count() or 1
    return 0 if cores <= FEW_CORES else min(MAX_WORKERS, cores)


@dataclass(frozen=True)
class ExtractSpec:
    """What to encode and how. `None` leaves a choice to the store (when resuming) or to the machine
    (when new).

    `image`, `text`: one encoder, or several (cuts of one model cost one forward pass). `views`:
    augmentations to encode in place of each image. `workers`: processes that decode, 0 for threads
    of this one; None: `default_workers`. `hang_seconds`: how long one of them may take for one
    image. `max_bad`: share of rows that may be unreadable before the run ends as an error (after
    encoding all others). `add`: put features of another encoder beside those that the store has.
    `append`: the table has grown at its end; put the new rows into a new segment. `recheck`: read
    every input again and compare it with what was encoded. `single_writer`: nobody else writes to
    the store, so that object storage without put-if-absent will do. `compiled`: image encoders by
    TorchInductor, not after a block; None: where 4,096 images and ten minutes of encoding or more
    are ahead and a compiled batch was measured to take less than 0.9 of the time. `part`: the
    shards to encode, while others encode the rest; all of them may begin at once.
    """

    image: EncoderSpec | tuple[EncoderSpec, ...] | None = None
    text: EncoderSpec | tuple[EncoderSpec, ...] | None = None
    image_batch: int | None = None
    text_batch: int | None = None
    shard_rows: int | None = None
    storage_dtype: Literal["float16", "float32", "int8"] = "float16"
    workers: int | None = None
    hang_seconds: float = 30.0
    max_bad: float = 0.01
    device: str = "auto"
    add: bool = False
    append: bool = False
    recheck: bool = False
    single_writer: bool = False
    views: Views | None = None
    compiled: bool | None = None
    part: Part = WHOLE

    @property
    def images(self) -> tuple[EncoderSpec, ...]:
        return _several(self.image, "image")

    @property
    def texts(self) -> tuple[EncoderSpec, ...]:
        return _several(self.text, "text")

    @property
    def decoders(self) -> int:
        return default_workers() if self.workers is None else self.workers

    def batch(self, encoder: ImageEncoder | TextEncoder) -> int | None:
        return self.image_batch if isinstance(encoder, ImageEncoder) else self.text_batch


def _several(
    specs: EncoderSpec | tuple[EncoderSpec, ...] | None,
    name: str,
) -> tuple[EncoderSpec, ...]:
    if specs is None:
        return ()
    several = specs if isinstance(specs, tuple | list) else (specs,)
    for spec in several:
        require_type(spec, EncoderSpec, name)
    return tuple(dict.fromkeys(several))


def prepare_arrays(
    store: FeatureStore,
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    like: Mapping[str, ArrayLayout] | None = None,
    captions: Sequence[str] = (),
) -> list[ArrayRecord]:
    """The arrays to fill, all of one modality: for each encoder the one that is there, or a new
    one.

    New ones get shards of equally many rows, so that one pass over the inputs fills all of them.
    Several processes may do this at the same time: what was measured by the one that puts an
    array's record first holds for all.

    Args:
        like: how the arrays of an earlier segment are laid out, by name; those of a later one are
            laid out alike.
        captions: what text encoders are timed on, and their longest one in tokens is what token
            arrays are as wide as.

    Raises:
        MismatchError: features of another encoder, preprocessing or batch size. StoreError: the
            disk is too small.
    """
    found, layouts = arrays_and_layouts(
        store,
        encoders=encoders,
        rows=rows,
        spec=spec,
        like=like or {},
        captions=captions,
    )
    _require_room(
        store,
        [layout for array, layout in zip(found, layouts, strict=True) if array is None],
    )
    new = [encoder for encoder, array in zip(encoders, found, strict=True) if array is None]
    if (
        not like
        and new
        and _decide_compiled(
            new,
            rows=layouts[0].rows,
            batch=layouts[0].batch_size,
            told=spec.compiled,
        )
    ):
        layouts = [replace(layout, compiled=True) for layout in layouts]
    _require_compiler(encoders, layouts)
    records = [
        array.record
        if array is not None
        else _new_record(store, encoder=encoder, layout=layout, spec=spec)
        for array, encoder, layout in zip(found, encoders, layouts, strict=True)
    ]
    decided = _create_arrays(store, records, found)
    if decided is not None:
        alike = {**dict.fromkeys((record.name for record in records), decided), **(like or {})}
        return prepare_arrays(
            store,
            encoders=encoders,
            rows=rows,
            spec=spec,
            like=alike,
            captions=captions,
        )
    return records


def _create_arrays(
    store: FeatureStore,
    records: Sequence[ArrayRecord],
    found: Sequence[FeatureArray | None],
) -> ArrayLayout | None:
    """Make the new ones, and finish what a killed run began. The layout of one that another process
    has just made otherwise, if there is such a one."""
    for record, array in zip(records, found, strict=True):
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
    """For each encoder the array that is there, if any, and how it is or would be laid out; nothing
    is written.

    Raises:
        MismatchError: as `prepare_arrays`.
    """
    names = [array_name(encoder, spec) for encoder in encoders]
    found = [
        _find_array(store, encoder=encoder, spec=spec, names=names) if store else None
        for encoder in encoders
    ]
    new = [encoder for encoder, array in zip(encoders, found, strict=True) if array is None]
    layouts = iter(_layouts(new, rows=rows, spec=spec, like=like, captions=captions))
    return found, [array.record.layout if array is not None else next(layouts) for array in found]


def array_name(encoder: ImageEncoder | TextEncoder, spec: ExtractSpec) -> str:
    """The encoder's, and how many views."""
    views = spec.views if isinstance(encoder, ImageEncoder) else None
    return encoder.spec.slug + (f"-{views.count}views" if views else "")


def _new_record(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    layout: ArrayLayout,
    spec: ExtractSpec,
) -> ArrayRecord:
    fingerprint = _fingerprint(
        encoder,
        spec=spec,
        batch=layout.batch_size,
        compiled=layout.compiled,
    )
    modality = encoder.spec.modality
    name = array_name(encoder, spec)
    where = environment(encoder.device)
    record = ArrayRecord(
        modality=modality,
        name=name,
        spec=encoder.spec,
        fingerprint=fingerprint,
        layout=layout,
        metadata={},
        environment=where,
        table=store.source["digest"],
    )
    return with_metadata(record)


def _find_array(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
    names: Sequence[str],
) -> FeatureArray | None:
    """The array of that name or of that encoder; without `add`, any other one that was not asked
    for is a mismatch."""
    existing = store.arrays(encoder.spec.modality)
    name = array_name(encoder, spec)
    wanted = _fingerprint(encoder, spec=spec, batch=0, compiled=False).fields
    same = next((array for array in existing if array.name == name), None)
    alike = next(
        (array for array in existing if _kind(array.record.fingerprint.fields) == _kind(wanted)),
        None,
    )
    others = [array for array in existing if array.name not in names] if not spec.add else []
    nearest_array = same or alike or (others[0] if others else None)
    if nearest_array is not None:
        _require_same(store, array=nearest_array, encoder=encoder, spec=spec)
    return same or alike


def _kind(fields: Mapping[str, Json]) -> Json:
    return {key: fields.get(key) for key in ("encoder", "views")}


def _fingerprint(
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
    batch: int,
    compiled: bool,
) -> Fingerprint:
    views = (
        {"views": spec.views.to_json()} if spec.views and isinstance(encoder, ImageEncoder) else {}
    )
    storage: Json = {"dtype": spec.storage_dtype, "batch_size": batch}
    storage |= {"compile": "inductor"} if compiled else {}
    return Fingerprint(fields={"encoder": encoder.fingerprint.fields, "storage": storage, **views})


def _require_same(
    store: FeatureStore,
    array: FeatureArray,
    encoder: ImageEncoder | TextEncoder,
    spec: ExtractSpec,
) -> None:
    """What is not asked for, batch size and compilation, is taken as recorded; encoder and storage
    must be the same."""
    recorded = array.record
    told = spec.compiled if isinstance(encoder, ImageEncoder) else None
    compiled = recorded.layout.compiled if told is None else told
    wanted = _fingerprint(
        encoder,
        spec=spec,
        batch=spec.batch(encoder) or recorded.layout.batch_size,
        compiled=compiled,
    )
    differences = wanted.difference(recorded.fingerprint)
    if differences:
        raise MismatchError(
            f"{store.path} holds {recorded.modality} features {array.name} of another encoder or "
            "setting: "
            f"{describe_difference(differences)}; choose another --store"
            + (", or add --add to keep both" if array.name != array_name(encoder, spec) else ""),
            differences,
        )


def _layouts(
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    like: Mapping[str, ArrayLayout],
    captions: Sequence[str],
) -> list[ArrayLayout]:
    """One for each encoder, with shards of the same rows unless an earlier segment says
    otherwise."""
    if not encoders:
        return []
    size = spec.batch(encoders[0]) or _default_batch(encoders[0])
    plain = [
        _layout(encoder, rows=rows, size=size, spec=spec, captions=captions) for encoder in encoders
    ]
    wanted = spec.shard_rows
    if wanted is None and not all(array_name(encoder, spec) in like for encoder in encoders):
        wanted = _calibrated_rows(encoders, size, captions)
    most = min(max(1, MAX_SHARD_BYTES // layout.row_bytes) for layout in plain)
    return [
        _as_before(layout, like[name])
        if (name := array_name(encoder, spec)) in like
        else replace(layout, shard_rows=max(1, min(wanted or 1, rows, most)))
        for encoder, layout in zip(encoders, plain, strict=True)
    ]


def _default_batch(encoder: ImageEncoder | TextEncoder) -> int:
    return CUDA_BATCH if encoder.device.type == "cuda" else CPU_BATCH[encoder.spec.modality]


def _as_before(layout: ArrayLayout, like: ArrayLayout) -> ArrayLayout:
    shard_rows = max(1, min(like.shard_rows, layout.rows, MAX_SHARD_BYTES // layout.row_bytes))
    same: dict[str, Any] = {
        "batch_size": like.batch_size,
        "threads": like.threads,
        "compiled": like.compiled,
    }
    return replace(layout, shard_rows=shard_rows, **same)


def _layout(
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    size: int,
    spec: ExtractSpec,
    captions: Sequence[str],
) -> ArrayLayout:
    """Without the rows of its shards."""
    tokens = encoder.row_shape[0] if len(encoder.row_shape) > 1 else None
    ragged = tokens is not None and isinstance(encoder, TextEncoder)
    if ragged and isinstance(encoder, TextEncoder):
        tokens = max((len(ids) for ids in encoder.tokenise(captions).ids), default=1)
    views = spec.views.count if spec.views and isinstance(encoder, ImageEncoder) else None
    threads = torch.get_num_threads()
    return ArrayLayout(
        rows=rows,
        dim=encoder.dim,
        dtype=spec.storage_dtype,
        shard_rows=1,
        batch_size=size,
        threads=threads,
        views=views,
        tokens=tokens,
        ragged=ragged,
    )


def _calibrated_rows(
    encoders: Sequence[ImageEncoder | TextEncoder],
    batch: int,
    captions: Sequence[str],
) -> int:
    """Rows of about a minute of encoding, as a power of two: what a kill can cost at most."""
    models = {id(encoder.module): encoder for encoder in encoders}

    def once() -> float:
        begin = time.perf_counter()
        for encoder in models.values():
            if isinstance(encoder, ImageEncoder):
                encoder.encode(torch.zeros(batch, *encoder.input_shape))
            else:
                encoder.encode_ids(encoder.tokenise(list(captions[:batch]) or ["a"]).ids)
        return time.perf_counter() - begin

    once()
    rows = SHARD_SECONDS * batch / max(once(), 1e-6)
    return int(min(MAX_SHARD_ROWS, max(MIN_SHARD_ROWS, 2 ** int(np.log2(rows)))))


def _decide_compiled(
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    batch: int,
    told: bool | None,
) -> bool:
    """Whether new arrays are filled by compiled models; see `ExtractSpec.compiled`. Texts, whose
    batches have no one shape, never are.

    Raises:
        OptionError: told to, for a cut after a block.
    """
    images = [encoder for encoder in encoders if isinstance(encoder, ImageEncoder)]
    able = bool(images) and all(encoder.spec.layer is None for encoder in images)
    if told and images and not able:
        raise OptionError(
            "--compile: a cut after a block (@LAYER) is caught by hooks and not compiled; "
            "leave it out"
        )
    if told is not None or not able or rows < COMPILE_FROM_ROWS:
        return bool(told) and able
    models = list({id(encoder.module): encoder for encoder in images}.values())
    eager = sum(_seconds(partial(encode_images, [encoder]), encoder, batch) for encoder in models)
    if eager * rows / batch < COMPILE_FROM_SECONDS:
        return False
    try:
        return sum(_seconds(compile_images([e]), e, batch) for e in models) < COMPILED_SHARE * eager
    except (
        RuntimeError,
        OSError,
    ):  # no compiler on this machine, or an operation that it does not know
        return False


def _require_compiler(
    encoders: Sequence[ImageEncoder | TextEncoder],
    layouts: Sequence[ArrayLayout],
) -> None:
    """Compiles what will be needed compiled, before anything is written.

    Raises:
        EncoderError: that cannot be done here.
    """
    for encoder, layout in zip(encoders, layouts, strict=True):
        if layout.compiled and isinstance(encoder, ImageEncoder):
            try:
                compile_images([encoder])(torch.zeros(layout.batch_size, *encoder.input_shape))
            except (RuntimeError, OSError) as error:
                raise EncoderError(
                    f"encoder {encoder.spec} cannot be compiled here ({one_line(error)}); install "
                    "a C++ compiler, or "
                    "make another --store with --no-compile"
                ) from None


def _seconds(encode: Callable[[torch.Tensor], object], encoder: ImageEncoder, batch: int) -> float:
    """Of one batch, the second of two, results fetched."""
    pixels = torch.zeros(batch, *encoder.input_shape)
    encode(pixels)
    begin = time.perf_counter()
    encode(pixels)
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    return time.perf_counter() - begin


def _require_room(store: FeatureStore, layouts: Sequence[ArrayLayout]) -> None:
    needed = sum(room_bytes(layout, layout.n_shards) for layout in layouts)
    free = store.files.free_bytes()
    if free is not None and needed > free:
        raise StoreError(
            f"{store.path}: {needed / 1e6:,.1f} MB needed for the features, {free / 1e6:,.1f} "
            "MB free"
        )


def room_bytes(layout: ArrayLayout, shards: int) -> int:
    """On disk, records included."""
    return int(1.05 * shards * sum(chunk_bytes(layout).values()))


def environment(device: torch.device) -> Json:
    """Versions and device: recorded, never part of the identity."""
    names = ("apecache", "torch", "timm", "transformers", "numpy", "pillow", "zarr")
    versions = {name: version(name) for name in names}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": versions,
        "device": device.type,
        "hardware": gpu,
        "python": platform.python_version(),
    }
