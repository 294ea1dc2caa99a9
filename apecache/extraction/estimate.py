"""Estimate what an extraction would take: rows, bytes, seconds and money. Nothing is written."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from apecache.arguments import AnyPath, as_place, require_spec
from apecache.data.pairs import PairSource
from apecache.device import is_accelerator
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.errors import OptionError
from apecache.extraction.arrays import array_name, arrays_and_layouts, room_bytes
from apecache.extraction.encode import (
    ArrayTarget,
    ImageJob,
    encode_or_halve,
    image_jobs,
)
from apecache.extraction.encode_texts import TextJob, caption_error, divide_captions, text_jobs
from apecache.extraction.precision import with_precision
from apecache.extraction.run import ExtractSpec, count_rows, open_encoders, require_inputs
from apecache.extraction.segments import Inputs
from apecache.extraction.table_plan import plan_table
from apecache.fingerprint import Fingerprint, Modality
from apecache.storage.open import open_files
from apecache.store.layout import PAIRS, ArrayLayout, ArrayRecord
from apecache.store.reader import FeatureStore

CALIBRATION_BATCHES = 2
MAX_SAMPLED_CAPTIONS = 256
Encoder = TypeVar("Encoder", ImageEncoder, TextEncoder)
Job = TypeVar("Job", ImageJob, TextJob)


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """Say what an extraction would do for one array."""

    modality: Modality
    name: str
    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    n_pending: int
    """Rows that would be encoded now."""
    n_bytes: int
    """Bytes of files that would be written."""


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """Say what an extraction would take.

    The seconds are extrapolated from two batches of each job, timed on this machine. Loading the
    encoders is not counted.
    """

    store: str | Path
    arrays: tuple[ArrayPlan, ...]
    image_seconds: float
    """Of encoding all pending images."""
    text_seconds: float
    """Of encoding all pending captions."""
    free_bytes: int | None
    """None on object storage."""
    price: float | None
    """Of these seconds, in the currency of the price per hour."""

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
class _PendingArray(Generic[Encoder]):
    """Hold an array of one segment, and the shards that are pending in it."""

    target: ArrayTarget[Encoder]
    source: Inputs
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
    """Estimate what `extract` with the same arguments would do.

    Args:
        price_per_hour: of this machine, in any currency.

    Raises:
        OptionError: a negative price. All that `extract` raises before it encodes anything is
            raised too.
    """
    require_spec(spec, ExtractSpec, "spec")
    store_path = as_place(store, "store")
    if price_per_hour is not None and not price_per_hour >= 0:
        raise OptionError(f"a price of {price_per_hour} an hour: expected 0 or more")
    require_inputs(source, spec)
    files = open_files(store_path)
    spec = with_precision(source, files, spec)
    encoders = open_encoders(spec)
    images = list[_PendingArray[ImageEncoder]]()
    texts = list[_PendingArray[TextEncoder]]()
    image_seconds = _Stopwatch()
    text_seconds = _Stopwatch()
    for segment in plan_table(source, files, spec).segments:
        segment_source = segment.part
        # A segment that does not exist yet has no store to open.
        opened = FeatureStore.block(segment.files) if segment.files.exists(PAIRS) else None
        new_images = list(
            _parts(opened, encoders=encoders.image, source=segment_source, spec=spec, before=images)
        )
        new_texts = list(
            _parts(opened, encoders=encoders.text, source=segment_source, spec=spec, before=texts)
        )
        pending_images = [image.target for image in new_images if image.pending]
        for job in image_jobs(
            segment_source,
            targets=pending_images,
            workers=spec.decoders,
            views=spec.views,
            hang_seconds=spec.hang_seconds,
        ):
            image_seconds.add(job, _pending_rows(job, new_images), _time_images)
        pending_texts = [text.target for text in new_texts if text.pending]
        for text_job in text_jobs(segment_source, pending_texts):
            text_seconds.add(text_job, _pending_rows(text_job, new_texts), _time_texts)
        images = images + new_images
        texts = texts + new_texts
    total_seconds = image_seconds.total + text_seconds.total
    price = None if price_per_hour is None else price_per_hour * total_seconds / 3600
    return ExtractPlan(
        store=files.place,
        arrays=(*_array_plans(images), *_array_plans(texts)),
        image_seconds=image_seconds.total,
        text_seconds=text_seconds.total,
        free_bytes=files.free_bytes(),
        price=price,
    )


def _parts(
    store: FeatureStore | None,
    encoders: Sequence[Encoder],
    source: Inputs,
    spec: ExtractSpec,
    before: Sequence[_PendingArray[Encoder]],
) -> Iterator[_PendingArray[Encoder]]:
    """Describe the arrays of one segment, one for each encoder.

    Args:
        before: the arrays of all earlier segments.
    """
    if not encoders:
        return
    # Reversed, so that of several segments the first one decides.
    like = {earlier.target.record.name: earlier.layout for earlier in reversed(before)}
    is_text = encoders[0].spec.modality == "text"
    captions = source.captions if is_text else ()
    rows = len(captions) if is_text else len(source)
    existing, layouts = arrays_and_layouts(
        store,
        encoders=encoders,
        rows=rows,
        spec=spec,
        like=like,
        captions=captions,
    )
    for encoder, array, layout in zip(encoders, existing, layouts, strict=True):
        record = array.record if array else _record(encoder, layout, spec)
        committed_shards = frozenset(array.commits) if array else frozenset[int]()
        planned_shards = frozenset(shard for shard in range(layout.n_shards) if shard in spec.part)
        yield _PendingArray(
            target=ArrayTarget(encoder=encoder, record=record),
            source=source,
            pending=planned_shards - committed_shards,
        )


def _record(
    encoder: ImageEncoder | TextEncoder,
    layout: ArrayLayout,
    spec: ExtractSpec,
) -> ArrayRecord:
    """Describe an array that does not exist, as far as timing needs it."""
    return ArrayRecord(
        modality=encoder.spec.modality,
        name=array_name(encoder, spec),
        spec=encoder.spec,
        fingerprint=Fingerprint(fields={}),
        layout=layout,
        metadata={},
        environment={},
        table="",
    )


def _array_plans(segment_arrays: Sequence[_PendingArray[Encoder]]) -> Iterator[ArrayPlan]:
    """Sum up the segments of each array."""
    by_name: dict[str, list[_PendingArray[Encoder]]] = {}
    for segment_array in segment_arrays:
        by_name.setdefault(segment_array.target.record.name, []).append(segment_array)
    for name, segments in by_name.items():
        first = segments[0]
        yield ArrayPlan(
            modality=first.target.record.modality,
            name=name,
            rows=sum(segment.layout.rows for segment in segments),
            row_shape=first.layout.row_shape,
            dtype=first.layout.dtype,
            n_pending=sum(segment.n_pending for segment in segments),
            n_bytes=sum(room_bytes(segment.layout, len(segment.pending)) for segment in segments),
        )


def _pending_rows(job: ImageJob | TextJob, segment_arrays: Sequence[_PendingArray[Encoder]]) -> int:
    """Count the rows of the shards that are pending for any of the job's arrays."""
    # All arrays of a job are encoded together, so a shard counts once.
    names = {target.record.name for target in job.targets}
    pending_shards: set[int] = set()
    for segment_array in segment_arrays:
        if segment_array.target.record.name in names:
            pending_shards |= segment_array.pending
    return count_rows(job.layout, pending_shards)


# --- timing ---------------------------------------------------------------------------------------


class _Stopwatch:
    """Add up the seconds of jobs; jobs that fill the same arrays are timed once."""

    def __init__(self) -> None:
        self.total = 0.0
        self.timed: dict[tuple[str, ...], float] = {}

    def add(self, job: Job, rows: int, time_row: Callable[[Job], float]) -> None:
        # Segments have the same arrays, so their jobs take the same time for a row.
        names = tuple(target.record.name for target in job.targets)
        if names not in self.timed:
            self.timed[names] = time_row(job)
        self.total += rows * self.timed[names]


def _time_images(job: ImageJob) -> float:
    """Return the seconds that one row takes."""
    batch_size = job.layout.batch_size
    rows = _spread(len(job.source), CALIBRATION_BATCHES * batch_size)
    begin = time.perf_counter()
    with job.decoders() as decode:
        for _ in decode(rows):
            pass
    decoding_seconds = (time.perf_counter() - begin) / len(rows)
    models: list[list[ImageEncoder]] = []
    batches: list[Tensor] = []
    for targets in job.models:
        cuts = [target.encoder for target in targets]
        models.append(cuts)
        batches.append(torch.zeros(batch_size, *cuts[0].input_shape))
    n_views = job.views.count if job.views else 1

    def encode() -> None:
        for cuts, batch in zip(models, batches, strict=True):
            encode_cuts = partial(encode_images, cuts)
            _fetch(encode_or_halve(encode_cuts, batch, cuts[0].device))

    encoding_seconds = n_views * _seconds_of(encode) / batch_size
    # On the CPU decoding and models share the cores; beside an accelerator the slower one counts.
    if _share_cores(models[0][0].device):
        return decoding_seconds + encoding_seconds
    return max(decoding_seconds, encoding_seconds)


def _share_cores(device: torch.device) -> bool:
    return not is_accelerator(device)


def _time_texts(job: TextJob) -> float:
    """Return the seconds that one row takes."""
    captions = job.source.captions
    # As many as a few batches of the default size, whatever this layout's limits are.
    n_sampled = CALIBRATION_BATCHES * min(job.layout.batch_size, MAX_SAMPLED_CAPTIONS)
    encoders = [target.encoder for target in job.targets]
    encode_cuts = partial(encode_texts, encoders)
    sample_rows = _spread(len(captions), n_sampled)
    sample = [captions[row] for row in sample_rows]
    good_captions = [caption for caption in sample if not caption_error(caption)]
    if not good_captions:
        return 0.0
    # Sorted as TextJob does, so that batches have captions of like length.
    ids = sorted(encoders[0].tokenize(good_captions).ids, key=len)
    lengths = [len(caption_ids) for caption_ids in ids]
    batches = [
        [ids[i] for i in batch.captions]
        for batch in divide_captions(lengths, job.layout, encoders[0])
    ]

    def encode() -> None:
        for batch in batches:
            _fetch(encode_or_halve(encode_cuts, batch, encoders[0].device))

    return _seconds_of(encode, 1) / len(good_captions)


def _seconds_of(work: Callable[[], None], times: int = CALIBRATION_BATCHES) -> float:
    """Return the mean seconds of a call."""
    # The first call warms up and does not count.
    work()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def _fetch(results: Sequence[Tensor]) -> None:
    """Wait for results, as an extraction does by storing them."""
    for result in results:
        result.cpu()


def _spread(n_rows: int, max_sampled: int) -> list[int]:
    """Choose at most `max_sampled` rows, evenly spread over the table."""
    n_sampled = min(n_rows, max_sampled)
    return [n_rows * index // n_sampled for index in range(n_sampled)]
