"""Extraction: pairs -> frozen encoders -> store, each input once, whatever interrupts it.

The same table and encoder give the same bytes however often the run is killed (see
`apecache.extraction.encode`).
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_place, require_type
from apecache.data.media import FolderMedia, NoMedia, ObjectMedia
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoders, load_text_encoders
from apecache.errors import BadRowsError, ManifestError, OptionError, RowError
from apecache.extraction.arrays import ExtractSpec, prepare_arrays
from apecache.extraction.encode import (
    EncodedShard,
    ImageJob,
    Target,
    TextJob,
    image_jobs,
    text_jobs,
)
from apecache.extraction.recheck import require_same_content, spot_check
from apecache.extraction.report import (
    ArrayReport,
    ExtractReport,
    Progress,
    Standing,
    Tally,
    Total,
    count_shard,
    judge,
)
from apecache.extraction.segments import Segment, make_segment, split_source
from apecache.extraction.shard_range import Part
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.layout import ArrayLayout, ArrayRecord
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter, QuarantinedRow

__all__ = [
    "ArrayReport",
    "ExtractReport",
    "ExtractSpec",
    "Progress",
    "Standing",
    "extract",
    "extract_pending",
    "load_encoders",
]


UNFINDABLE_SHARE = 0.5
MOST_LOOKED_FOR = 256


def extract(
    source: PairSource,
    store: AnyPath,
    spec: ExtractSpec,
    progress: Progress = lambda *_: None,
) -> ExtractReport:
    """Encode every image and caption of `source` once into `store`; what is committed already is
    not done again.

    With `spec.part` only the shards of that part. The part that ends last seals the store, and
    judges it as one run would: of the errors below the last two are raised only where all parts are
    done.

    Args:
        store: a folder, or a place on object storage (`s3://BUCKET/…`, `gs://BUCKET/…`,
            `az://CONTAINER/…`).

    Raises:
        ManifestError, EncoderError, MismatchError, StoreError: before anything is encoded.
        BadRowsError: more than `max_bad` of an array's rows are unreadable; all others are in the
            store.
        DataError: one image, byte for byte, stands in two splits.
    """
    place = as_place(store, "store")
    require_inputs(source, spec)
    encoders = load_encoders(spec)
    begin = time.perf_counter()
    files = open_files(place, spec.single_writer)
    segments = split_source(source, files, spec.append)
    totals = new_totals(source, encoders)
    for segment in segments:
        _extract_segment(segment, encoders=encoders, spec=spec, totals=totals, progress=progress)
    return judge(files, totals=totals, spec=spec, begin=begin)


def extract_pending(
    segment: Segment,
    encoders: "Encoders",
    spec: ExtractSpec,
    progress: Progress = lambda *_: None,
) -> None:
    """Encode and commit what is pending in one segment, given the encoders of `spec`. Raises as
    `extract` does."""
    _extract_segment(
        segment,
        encoders=encoders,
        spec=spec,
        totals=new_totals(segment.part, encoders),
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class Encoders:
    image: tuple[ImageEncoder, ...]
    text: tuple[TextEncoder, ...]


def load_encoders(spec: ExtractSpec) -> Encoders:
    if not spec.images and not spec.texts:
        raise OptionError("nothing to encode: give --image, --text, or both")
    images = load_image_encoders(spec.images, spec.device) if spec.images else ()
    texts = load_text_encoders(spec.texts, spec.device) if spec.texts else ()
    return Encoders(image=tuple(images), text=tuple(texts))


def _extract_segment(
    segment: Segment,
    encoders: Encoders,
    spec: ExtractSpec,
    totals: "dict[Modality, Total]",
    progress: Progress,
) -> None:
    """All arrays are prepared, and every mismatch found, before the first row is encoded."""
    make_segment(segment)
    opened = FeatureStore.at(segment.files)
    for job in prepare_jobs(opened, part=segment.part, encoders=encoders, spec=spec, totals=totals):
        if spec.recheck:
            require_same_content(opened, job)
        _run(
            opened.files,
            job=job,
            part=spec.part,
            total=totals[job.targets[0].record.modality],
            progress=progress,
        )


def prepare_jobs(
    opened: FeatureStore,
    part: PairSource,
    encoders: Encoders,
    spec: ExtractSpec,
    totals: "dict[Modality, Total]",
) -> list[ImageJob | TextJob]:
    """The passes over one segment, their arrays made where they were not there. Raises as
    `prepare_arrays` does."""
    images = _image_jobs(opened, encoders=encoders.image, part=part, spec=spec, totals=totals)
    return [
        *images,
        *_text_jobs(opened, encoders=encoders.text, part=part, spec=spec, totals=totals),
    ]


# --- before ---------------------------------------------------------------------------------------


def require_inputs(source: PairSource, spec: ExtractSpec) -> None:
    """Refuse a source that cannot give what is asked for before anything is written."""
    require_type(source, PairSource, "source")
    require_type(spec, ExtractSpec, "spec")
    if spec.texts and not source.captions:
        raise ManifestError(
            f"{source.origin} has no captions to encode; leave --text out, or give a source "
            "that has"
        )
    if spec.images and isinstance(source.media, NoMedia):
        raise ManifestError(
            f"{source.origin} has no images to encode; leave --image out, or give a source that has"
        )
    if spec.images:
        _require_findable(source, spec.part)


def _require_findable(source: PairSource, part: Part) -> None:
    """Refuse a wrong --root; single missing images are quarantined later. A part looks at a share
    of the rows."""
    keys = source.keys[part.number - 1 :: part.count]
    if isinstance(source.media, ObjectMedia):  # one request each
        keys = keys[:: -(-len(keys) // MOST_LOOKED_FOR) or 1]
    missing = [key for key in keys if not source.media.exists(key)]
    if len(missing) > UNFINDABLE_SHARE * len(keys):
        below = isinstance(source.media, FolderMedia | ObjectMedia)
        remedy = (
            "give the folder that the paths are relative to as --root"
            if below
            else "every row needs its image"
        )
        raise BadRowsError(
            f"{source.origin}: {len(missing)} of {len(keys)} images are not "
            f"{'below' if below else 'in'} "
            f"{source.media.place} (the first: {missing[0]}); {remedy}"
        )


# --- the loop -------------------------------------------------------------------------------------


def new_totals(source: PairSource, encoders: Encoders) -> dict[Modality, Total]:
    totals: dict[Modality, Total] = {}
    if encoders.image:
        totals["image"] = Total(modality="image", rows=len(source))
    if encoders.text:
        totals["text"] = Total(modality="text", rows=len(source.captions))
    return totals


def _image_jobs(
    store: FeatureStore,
    encoders: tuple[ImageEncoder, ...],
    part: PairSource,
    spec: ExtractSpec,
    totals: dict[Modality, Total],
) -> Iterator[ImageJob]:
    if encoders:
        records = _prepared(
            store,
            encoders=encoders,
            rows=len(part),
            spec=spec,
            total=totals["image"],
            captions=(),
        )
        targets = [
            Target(encoder=encoder, record=record)
            for encoder, record in zip(encoders, records, strict=True)
        ]
        jobs = image_jobs(
            part,
            targets=targets,
            workers=spec.decoders,
            views=spec.views,
            hang_seconds=spec.hang_seconds,
        )
        totals["image"].passes = len(jobs)
        yield from jobs


def _text_jobs(
    store: FeatureStore,
    encoders: tuple[TextEncoder, ...],
    part: PairSource,
    spec: ExtractSpec,
    totals: dict[Modality, Total],
) -> Iterator[TextJob]:
    if encoders:
        records = _prepared(
            store,
            encoders=encoders,
            rows=len(part.captions),
            spec=spec,
            total=totals["text"],
            captions=part.captions,
        )
        targets = [
            Target(encoder=encoder, record=record)
            for encoder, record in zip(encoders, records, strict=True)
        ]
        jobs = text_jobs(part, targets)
        totals["text"].passes = len(jobs)
        yield from jobs


def _prepared(
    store: FeatureStore,
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    total: Total,
    captions: Sequence[str],
) -> list[ArrayRecord]:
    like = {name: tally.layout for name, tally in total.tallies.items()}
    records = prepare_arrays(
        store,
        encoders=encoders,
        rows=rows,
        spec=spec,
        like=like,
        captions=captions,
    )
    for record in records:
        total.tallies.setdefault(record.name, Tally(layout=record.layout))
    return records


def _run(
    files: Files,
    job: ImageJob | TextJob,
    part: Part,
    total: Total,
    progress: Progress,
) -> None:
    """Encode and commit every pending shard of the part in one segment, then seal its arrays if
    they are complete."""
    writers = [ArrayWriter(files, target.record) for target in job.targets]
    committed = [writer.committed().keys() for writer in writers]
    own = [shard for shard in range(job.layout.n_shards) if shard in part]
    pending = [shard for shard in own if any(shard not in done for done in committed)]
    for place, done in enumerate(committed):
        if done and not done >= set(own):
            spot_check(files, job, place)

    def advance(count: int) -> None:
        total.done += count
        progress(total.standing)

    own_rows = count_rows(job.layout, own)
    total.elsewhere += job.layout.rows - own_rows
    advance(own_rows - count_rows(job.layout, pending))
    begin = time.perf_counter()
    for shard, encoded in zip(pending, job.shards(pending, advance), strict=True):
        for writer, done, features in zip(writers, committed, encoded.features, strict=True):
            if shard not in done:
                commit_shard(writer, shard, features, encoded, job)
                count_shard(total.tallies[writer.record.name], encoded)
        total.n_bad += len(encoded.bad)
        advance(0)
    for writer in writers:
        if part.whole or not writer.pending():
            writer.seal()
        total.tallies[writer.record.name].seconds += time.perf_counter() - begin


def count_rows(layout: ArrayLayout, shards: Iterable[int]) -> int:
    return sum(len(layout.shard(shard)) for shard in shards)


def commit_shard(
    writer: ArrayWriter,
    shard: int,
    encoded: NDArray[np.float32],
    whole: EncodedShard,
    job: ImageJob | TextJob,
) -> None:
    """Features in the storage dtype; rows that are not finite are quarantined as well."""
    layout = writer.record.layout
    with np.errstate(over="ignore"):
        features = encoded.astype(layout.read_dtype)
    bad = dict(whole.bad)
    for row in np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(1)):
        overflow = bool(np.isfinite(encoded[row]).all())
        detail = (
            f"a value is beyond {layout.read_dtype}; use --storage float32"
            if overflow
            else "NaN or infinity"
        )
        bad.setdefault(int(row), RowError("overflow" if overflow else "not-finite", detail))
    start = layout.shard(shard).start
    rows = [
        QuarantinedRow(row=start + row, key=job.key(start + row), reason=e.reason, detail=e.detail)
        for row, e in sorted(bad.items())
    ]
    writer.commit(
        shard,
        features=features,
        content=whole.content,
        quarantined=rows,
        lengths=whole.lengths if layout.ragged else None,
    )
