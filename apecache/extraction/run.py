"""Extract features: encode each input once and commit it to a store, whatever interrupts the run.

The same table and encoder give the same bytes however often the run is killed (see
`apecache.extraction.encode`).
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from apecache.arguments import AnyPath, as_place, require_spec, require_type
from apecache.data.media import FolderMedia, NoMedia, ObjectMedia, base_media
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoders, load_text_encoders
from apecache.errors import BadRowsError, ManifestError, OptionError, RowError, counted
from apecache.extraction.arrays import prepare_arrays
from apecache.extraction.background import BackgroundCommits
from apecache.extraction.encode import ArrayTarget, EncodedShard, ImageJob, image_jobs
from apecache.extraction.encode_texts import TextJob, text_jobs
from apecache.extraction.precision import with_precision
from apecache.extraction.recheck import spot_check
from apecache.extraction.report import (
    ArrayCounts,
    ArrayReport,
    ExtractionProgress,
    ExtractionState,
    ExtractReport,
    ModalityCounts,
    accepting,
    count_shard,
    judge,
)
from apecache.extraction.reuse import ReusableStore, add_reusable_block
from apecache.extraction.segments import Inputs, Segment
from apecache.extraction.shard_range import ShardRange
from apecache.extraction.spec import ExtractSpec
from apecache.extraction.table_plan import plan_table
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
    "ExtractionProgress",
    "ExtractionState",
    "extract",
    "extract_pending",
    "open_encoders",
]


logger = logging.getLogger(__name__)

UNFINDABLE_SHARE = 0.5
MOST_LOOKED_FOR = 256


def extract(
    source: PairSource,
    store: AnyPath,
    spec: ExtractSpec,
    progress: ExtractionProgress = lambda *_: None,
) -> ExtractReport:
    """Encode what `store` lacks of the images and captions of `source`.

    A content that the store has is not encoded again, whatever table it came with. The table
    becomes the newest view of the store. Committed shards are not encoded again. With `spec.part`
    only the shards of that part are encoded. The part that ends last seals the store and judges it
    as one run would.

    Args:
        store: a folder, or a location on object storage (`s3://BUCKET/…`, `gs://BUCKET/…`,
            `az://CONTAINER/…`).
        progress: called after every batch and every commit.

    Raises:
        ManifestError, EncoderError, MismatchError, StoreError: before anything is encoded.
        BadRowsError: more than `max_bad` of an array's rows are unreadable; all others are in the
            store. Raised only where all parts are done.
        DataError: one image, byte for byte, is in two splits. Raised only where all parts are done.
    """
    store_path = as_place(store, "store")
    require_inputs(source, spec)
    files = open_files(store_path, spec.single_writer)
    logger.info(
        "extracting %s into %s: %d images, %d captions",
        source.origin,
        files.place,
        len(source),
        len(source.captions),
    )
    spec = with_precision(source, files, spec)
    encoders = open_encoders(spec)
    begin = time.perf_counter()
    reusable = ReusableStore.open(spec.reuse)
    if reusable is not None:
        add_reusable_block(source, files, reusable)
    plan = plan_table(source, files, spec)
    plan.begin()
    totals = new_totals([segment.part for segment in plan.segments], encoders)
    for segment in plan.segments:
        _extract_segment(
            segment,
            encoders=encoders,
            spec=spec,
            totals=totals,
            progress=progress,
            reusable=reusable,
        )
    return judge(plan, totals=totals, spec=spec, begin=begin)


def extract_pending(
    segment: Segment,
    encoders: "OpenEncoders",
    spec: ExtractSpec,
    progress: ExtractionProgress = lambda *_: None,
) -> None:
    """Encode and commit what is pending in one segment.

    Args:
        encoders: those of `spec`, loaded.

    Raises as `extract` does.
    """
    _extract_segment(
        segment,
        encoders=encoders,
        spec=spec,
        totals=new_totals([segment.part], encoders),
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class OpenEncoders:
    """Hold the loaded encoders of an extraction."""

    image: tuple[ImageEncoder, ...]
    text: tuple[TextEncoder, ...]


def open_encoders(spec: ExtractSpec) -> OpenEncoders:
    """Load the encoders of a spec. Raises OptionError if it names none."""
    if not spec.images and not spec.texts:
        raise OptionError("nothing to encode: give --image, --text, or both")
    images = load_image_encoders(spec.images, spec.device) if spec.images else ()
    texts = load_text_encoders(spec.texts, spec.device) if spec.texts else ()
    return OpenEncoders(image=tuple(images), text=tuple(texts))


def _extract_segment(
    segment: Segment,
    encoders: OpenEncoders,
    spec: ExtractSpec,
    totals: "dict[Modality, ModalityCounts]",
    progress: ExtractionProgress,
    reusable: ReusableStore | None = None,
) -> None:
    """Prepare all arrays of one segment, then encode what is pending in them."""
    opened = FeatureStore.block(segment.files)
    # A list, not an iterator: every mismatch is found before the first row is encoded.
    jobs = prepare_jobs(opened, part=segment.part, encoders=encoders, spec=spec, totals=totals)
    for job in jobs:
        modality = job.targets[0].record.modality
        _run(
            opened.files,
            job=job,
            shard_range=spec.part,
            total=totals[modality],
            progress=progress,
            reusable=reusable,
        )


def prepare_jobs(
    opened: FeatureStore,
    part: Inputs,
    encoders: OpenEncoders,
    spec: ExtractSpec,
    totals: "dict[Modality, ModalityCounts]",
) -> list[ImageJob | TextJob]:
    """Return the passes over one segment, and make the arrays that do not exist.

    Raises as `prepare_arrays` does.
    """
    image_passes = _image_jobs(
        opened, encoders=encoders.image, part_inputs=part, spec=spec, totals=totals
    )
    text_passes = _text_jobs(
        opened, encoders=encoders.text, part_inputs=part, spec=spec, totals=totals
    )
    return [*image_passes, *text_passes]


# --- before ---------------------------------------------------------------------------------------


def require_inputs(source: PairSource, spec: ExtractSpec) -> None:
    """Refuse a source that cannot give what is asked for before anything is written."""
    require_type(source, PairSource, "source")
    require_spec(spec, ExtractSpec, "spec")
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
        _require_findable(source, spec)


def _require_findable(source: PairSource, spec: ExtractSpec) -> None:
    """Refuse a wrong --root; single missing images are quarantined later."""
    media = base_media(source.media)
    task_part = spec.part
    # Parts run side by side, so each looks for its share of the rows only.
    keys = source.keys[task_part.number - 1 :: task_part.count]
    if isinstance(media, ObjectMedia):
        # Looking for an object costs a request, so a sample has to do.
        stride = -(-len(keys) // MOST_LOOKED_FOR) or 1
        keys = keys[::stride]
    missing = [key for key in keys if not source.media.exists(key)]
    if len(missing) > max(UNFINDABLE_SHARE, spec.max_bad) * len(keys):
        if isinstance(media, FolderMedia | ObjectMedia):
            preposition = "below"
            remedy = "give the folder that the paths are relative to as --root"
        else:
            preposition = "in"
            remedy = "every row needs its image"
        raise BadRowsError(
            f"{source.origin}: {len(missing)} of {counted(len(keys), 'image')} are not "
            f"{preposition} "
            f"{source.media.place} (the first: {missing[0]}); {remedy}, or accept this share with "
            f"{accepting(len(missing), len(keys))}"
        )


# --- the loop -------------------------------------------------------------------------------------


def new_totals(
    parts: Sequence[Inputs],
    encoders: OpenEncoders,
) -> dict[Modality, ModalityCounts]:
    """Return empty totals of some blocks for each modality that has encoders."""
    totals: dict[Modality, ModalityCounts] = {}
    if encoders.image:
        n_images = sum(len(part_inputs) for part_inputs in parts)
        totals["image"] = ModalityCounts(modality="image", rows=n_images)
    if encoders.text:
        n_texts = sum(len(part_inputs.captions) for part_inputs in parts)
        totals["text"] = ModalityCounts(modality="text", rows=n_texts)
    return totals


def _image_jobs(
    store: FeatureStore,
    encoders: tuple[ImageEncoder, ...],
    part_inputs: Inputs,
    spec: ExtractSpec,
    totals: dict[Modality, ModalityCounts],
) -> Iterator[ImageJob]:
    if encoders:
        records = _prepared(
            store,
            encoders=encoders,
            rows=len(part_inputs),
            spec=spec,
            total=totals["image"],
            captions=(),
        )
        targets = [
            ArrayTarget(encoder=encoder, record=record)
            for encoder, record in zip(encoders, records, strict=True)
        ]
        jobs = image_jobs(
            part_inputs,
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
    part_inputs: Inputs,
    spec: ExtractSpec,
    totals: dict[Modality, ModalityCounts],
) -> Iterator[TextJob]:
    if encoders:
        records = _prepared(
            store,
            encoders=encoders,
            rows=len(part_inputs.captions),
            spec=spec,
            total=totals["text"],
            captions=part_inputs.captions,
        )
        targets = [
            ArrayTarget(encoder=encoder, record=record)
            for encoder, record in zip(encoders, records, strict=True)
        ]
        jobs = text_jobs(part_inputs, targets)
        totals["text"].passes = len(jobs)
        yield from jobs


def _prepared(
    store: FeatureStore,
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    spec: ExtractSpec,
    total: ModalityCounts,
    captions: Sequence[str],
) -> list[ArrayRecord]:
    """Prepare the arrays of one modality, and begin a tally for each new one."""
    # Tallies hold the layouts of the first segment, which later segments follow.
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
        total.tallies.setdefault(record.name, ArrayCounts(layout=record.layout))
    return records


def _run(
    files: Files,
    job: ImageJob | TextJob,
    shard_range: ShardRange,
    total: ModalityCounts,
    progress: ExtractionProgress,
    reusable: ReusableStore | None = None,
) -> None:
    """Encode and commit every pending shard of the part in one segment.

    Arrays that are complete then are sealed.
    """
    writers = [ArrayWriter(files, target.record) for target in job.targets]
    part_shards = [shard for shard in range(job.layout.n_shards) if shard in shard_range]
    if reusable is not None:
        for writer in writers:
            missing = [shard for shard in writer.pending() if shard in shard_range]
            reusable.copy_shards(writer, job, missing)
    committed = [writer.committed().keys() for writer in writers]
    # A shard is encoded for all arrays of the job if any of them lacks it.
    pending: list[int] = []
    for shard in part_shards:
        if not all(shard in committed_shards for committed_shards in committed):
            pending.append(shard)
    for target_index, committed_shards in enumerate(committed):
        # An array that is complete gets no new rows, so it needs no check.
        if committed_shards and not committed_shards >= set(part_shards):
            spot_check(files, job, target_index)

    def advance(count: int) -> None:
        total.done += count
        progress(total.standing)

    n_part_rows = count_rows(job.layout, part_shards)
    n_pending_rows = count_rows(job.layout, pending)
    total.elsewhere += job.layout.rows - n_part_rows
    names = ", ".join(writer.record.name for writer in writers)
    logger.info(
        "%s features %s: encoding %d of %d rows",
        total.modality,
        names,
        n_pending_rows,
        n_part_rows,
    )
    advance(n_part_rows - n_pending_rows)
    begin = time.perf_counter()

    def commit(shard: int, encoded: EncodedShard) -> None:
        for target_index, writer in enumerate(writers):
            if shard not in committed[target_index]:
                commit_shard(writer, shard, target_index, encoded, job)

    def count(shard: int, encoded: EncodedShard) -> None:
        for writer, committed_shards in zip(writers, committed, strict=True):
            if shard not in committed_shards:
                count_shard(total.tallies[writer.record.name], encoded)
        total.n_bad += len(encoded.bad)
        logger.debug("%s features %s: shard %d is committed", total.modality, names, shard)
        # No new row, but the progress shows the commit.
        advance(0)

    # Commits run beside the encoding: the thread that feeds the device waits for no disk.
    with BackgroundCommits() as commits:
        for shard, encoded in zip(pending, job.shards(pending, advance), strict=True):
            commits.put(partial(commit, shard, encoded), partial(count, shard, encoded))
    # Of several parts the one that ends last finds nothing pending, and seals.
    for writer in writers:
        if shard_range.whole or not writer.pending():
            writer.seal()
        total.tallies[writer.record.name].seconds += time.perf_counter() - begin


def count_rows(layout: ArrayLayout, shards: Iterable[int]) -> int:
    """Count the rows of some shards."""
    return sum(len(layout.shard(shard)) for shard in shards)


def commit_shard(
    writer: ArrayWriter,
    shard: int,
    target_index: int,
    encoded: EncodedShard,
    job: ImageJob | TextJob,
) -> None:
    """Commit one shard of one array; rows that are not finite are quarantined as well.

    Args:
        writer: of the array.
        shard: its index.
        target_index: index of the array among the job's targets.
        encoded: the shard as it was encoded for all arrays of the job.
        job: what encoded it.
    """
    layout = writer.record.layout
    features = encoded.features[target_index]
    bad = dict(encoded.bad)
    is_finite = np.isfinite(features).reshape(len(features), -1).all(1)
    for row_in_shard in np.flatnonzero(~is_finite).tolist():
        # Finite in float32: the storage dtype is at fault, and not the model.
        if encoded.finite[target_index][row_in_shard]:
            detail = f"a value is beyond {layout.read_dtype}; use --storage float32"
            error = RowError("overflow", detail)
        else:
            error = RowError("not-finite", "NaN or infinity")
        bad.setdefault(row_in_shard, error)
    first_row = layout.shard(shard).start
    quarantined: list[QuarantinedRow] = []
    for row_in_shard, error in sorted(bad.items()):
        row = first_row + row_in_shard
        quarantined_row = QuarantinedRow(
            row=row,
            key=job.key(row),
            reason=error.reason,
            detail=error.detail,
        )
        quarantined.append(quarantined_row)
    writer.commit(
        shard,
        features=features,
        content=encoded.content,
        quarantined=quarantined,
        lengths=encoded.lengths if layout.ragged else None,
    )
