"""What an extraction would take, before it runs: rows, bytes, seconds and money. Nothing is
written."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from apecache.arguments import AnyPath, as_place
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.errors import OptionError
from apecache.extraction.arrays import array_name, arrays_and_layouts, room_bytes
from apecache.extraction.encode import (
    ImageJob,
    Target,
    TextJob,
    caption_error,
    image_jobs,
    text_jobs,
)
from apecache.extraction.run import ExtractSpec, count_rows, load_encoders, require_inputs
from apecache.extraction.segments import split_source
from apecache.fingerprint import Fingerprint, Modality
from apecache.storage.open import open_files
from apecache.store.layout import SOURCE, ArrayLayout, ArrayRecord
from apecache.store.reader import FeatureStore

CALIBRATION_BATCHES = 2
Encoder = TypeVar("Encoder", ImageEncoder, TextEncoder)
Job = TypeVar("Job", ImageJob, TextJob)


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """One array: `n_pending` of its rows would be encoded now, into `n_bytes` of files."""

    modality: Modality
    name: str
    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    n_pending: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """`image_seconds` and `text_seconds`: of encoding what is pending, from two batches of each job
    timed here and now; loading the encoders is not in them. `free_bytes`: None on object storage.
    `price`: of these seconds, in the currency of the price per hour."""

    store: str | Path
    arrays: tuple[ArrayPlan, ...]
    image_seconds: float
    text_seconds: float
    free_bytes: int | None
    price: float | None

    @property
    def seconds(self) -> float:
        return self.image_seconds + self.text_seconds

    @property
    def n_bytes(self) -> int:
        return sum(array.n_bytes for array in self.arrays)

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.n_bytes <= self.free_bytes


@dataclass(frozen=True, kw_only=True)
class _Part(Generic[Encoder]):
    """An array of one segment."""

    target: Target[Encoder]
    source: PairSource
    pending: frozenset[int]

    @property
    def layout(self) -> ArrayLayout:
        return self.target.record.layout

    @property
    def n_pending(self) -> int:
        return count_rows(self.layout, self.pending)


def plan_extraction(
    source: PairSource,
    store: AnyPath,
    spec: ExtractSpec,
    price_per_hour: float | None = None,
) -> ExtractPlan:
    """What `extract` with the same arguments would do.

    Raises:
        OptionError: a negative price. And what `extract` raises before it encodes anything.
    """
    place = as_place(store, "store")
    if price_per_hour is not None and not price_per_hour >= 0:
        raise OptionError(f"a price of {price_per_hour} an hour: expected 0 or more")
    require_inputs(source, spec)
    encoders = load_encoders(spec)
    images = list[_Part[ImageEncoder]]()
    texts = list[_Part[TextEncoder]]()
    image_seconds = _Stopwatch()
    text_seconds = _Stopwatch()
    files = open_files(place)
    for segment in split_source(source, files, spec.append):
        part = segment.part
        opened = FeatureStore.at(segment.files) if segment.files.exists(SOURCE) else None
        new_images = list(
            _parts(opened, encoders=encoders.image, source=part, spec=spec, before=images)
        )
        new_texts = list(
            _parts(opened, encoders=encoders.text, source=part, spec=spec, before=texts)
        )
        to_do = [image.target for image in new_images if image.pending]
        for job in image_jobs(
            part,
            targets=to_do,
            workers=spec.decoders,
            views=spec.views,
            hang_seconds=spec.hang_seconds,
        ):
            image_seconds.add(job, _pending_rows(job, new_images), _time_images)
        for text_job in text_jobs(part, [text.target for text in new_texts if text.pending]):
            text_seconds.add(text_job, _pending_rows(text_job, new_texts), _time_texts)
        images = images + new_images
        texts = texts + new_texts
    seconds = (image_seconds.total, text_seconds.total)
    price = None if price_per_hour is None else price_per_hour * sum(seconds) / 3600
    arrays = (*_array_plans(images), *_array_plans(texts))
    image_seconds_value, text_seconds_value = seconds
    return ExtractPlan(
        store=files.place,
        arrays=arrays,
        image_seconds=image_seconds_value,
        text_seconds=text_seconds_value,
        free_bytes=files.free_bytes(),
        price=price,
    )


def _parts(
    store: FeatureStore | None,
    encoders: Sequence[Encoder],
    source: PairSource,
    spec: ExtractSpec,
    before: Sequence[_Part[Encoder]],
) -> Iterator[_Part[Encoder]]:
    if not encoders:
        return
    like = {part.target.record.name: part.layout for part in reversed(before)}
    captions = source.captions if encoders[0].spec.modality == "text" else ()
    rows = len(captions) if encoders[0].spec.modality == "text" else len(source)
    found, layouts = arrays_and_layouts(
        store,
        encoders=encoders,
        rows=rows,
        spec=spec,
        like=like,
        captions=captions,
    )
    for encoder, array, layout in zip(encoders, found, layouts, strict=True):
        record = array.record if array else _record(encoder, layout, spec)
        done = frozenset(array.commits) if array else frozenset[int]()
        own = frozenset(shard for shard in range(layout.n_shards) if shard in spec.part)
        yield _Part(
            target=Target(encoder=encoder, record=record),
            source=source,
            pending=own - done,
        )


def _record(
    encoder: ImageEncoder | TextEncoder,
    layout: ArrayLayout,
    spec: ExtractSpec,
) -> ArrayRecord:
    """Of an array that is not there: enough of one to time it."""
    name = array_name(encoder, spec)
    return ArrayRecord(
        modality=encoder.spec.modality,
        name=name,
        spec=encoder.spec,
        fingerprint=Fingerprint(fields={}),
        layout=layout,
        metadata={},
        environment={},
        table="",
    )


def _array_plans(parts: Sequence[_Part[Encoder]]) -> Iterator[ArrayPlan]:
    """One for each array, its segments together."""
    for name in dict.fromkeys(part.target.record.name for part in parts):
        own = [part for part in parts if part.target.record.name == name]
        record = own[0].target.record
        layout = own[0].layout
        n_bytes = sum(room_bytes(part.layout, len(part.pending)) for part in own)
        rows = sum(part.layout.rows for part in own)
        n_pending = sum(part.n_pending for part in own)
        yield ArrayPlan(
            modality=record.modality,
            name=name,
            rows=rows,
            row_shape=layout.row_shape,
            dtype=layout.dtype,
            n_pending=n_pending,
            n_bytes=n_bytes,
        )


def _pending_rows(job: ImageJob | TextJob, parts: Sequence[_Part[Encoder]]) -> int:
    """Rows of the shards that are pending for any of the job's arrays: all of them are encoded
    together."""
    names = {target.record.name for target in job.targets}
    return count_rows(
        job.layout,
        {shard for part in parts if part.target.record.name in names for shard in part.pending},
    )


# --- timing ---------------------------------------------------------------------------------------


class _Stopwatch:
    """Seconds of jobs, each kind of them timed once."""

    def __init__(self) -> None:
        self.total = 0.0
        self.timed: dict[tuple[str, ...], float] = {}

    def add(self, job: Job, rows: int, time_row: Callable[[Job], float]) -> None:
        names = tuple(target.record.name for target in job.targets)
        if names not in self.timed:
            self.timed[names] = time_row(job)
        self.total += rows * self.timed[names]


def _time_images(job: ImageJob) -> float:
    """Seconds a row: on the CPU decoding and models share the cores, beside an accelerator the
    slower one counts."""
    size = job.layout.batch_size
    rows = _spread(len(job.source), CALIBRATION_BATCHES * size)
    begin = time.perf_counter()
    with job.decode([job.key(row) for row in rows]) as decoded:
        for _ in decoded:
            pass
    decoding = (time.perf_counter() - begin) / len(rows)
    encoders = [[target.encoder for target in targets] for targets in job.models]
    pixels = [torch.zeros(size, *first.input_shape) for first, *_ in encoders]
    views = job.views.count if job.views else 1

    def encode() -> None:
        for group, batch in zip(encoders, pixels, strict=True):
            _fetch(encode_images(group, batch))

    encoding = views * _seconds_of(encode) / size
    return decoding + encoding if _share_cores(encoders[0][0].device) else max(decoding, encoding)


def _share_cores(device: torch.device) -> bool:
    return device.type == "cpu"


def _time_texts(job: TextJob) -> float:
    """Seconds a row, in batches of like length as `TextJob` makes them."""
    captions = job.source.captions
    size = job.layout.batch_size
    encoders = [target.encoder for target in job.targets]
    sample = [captions[row] for row in _spread(len(captions), CALIBRATION_BATCHES * size)]
    good = [caption for caption in sample if not caption_error(caption)]
    if not good:
        return 0.0
    ids = sorted(encoders[0].tokenise(good).ids, key=len)
    batches = [ids[begin : begin + size] for begin in range(0, len(ids), size)]

    def encode() -> None:
        for batch in batches:
            _fetch(encode_texts(encoders, batch))

    return _seconds_of(encode, 1) / len(good)


def _seconds_of(work: Callable[[], None], times: int = CALIBRATION_BATCHES) -> float:
    """Of one call, after one that warms up."""
    work()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def _fetch(results: Sequence[Tensor]) -> None:
    for result in results:
        result.cpu()


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` rows from all over the table."""
    return [count * place // min(count, wanted) for place in range(min(count, wanted))]
