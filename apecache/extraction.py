"""Extraction: pairs -> frozen encoders -> store, each input once, whatever interrupts it.

The same table and encoder give the same bytes however often the run is killed (see `apecache.encode`).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.data.images import load_image
from apecache.data.media import FolderMedia, NoMedia
from apecache.data.pairs import PairSource
from apecache.encode import EncodedShard, ImageJob, TextJob
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.errors import BadRowsError, DataError, ManifestError, MismatchError, OptionError, RowError
from apecache.fingerprint import Modality, content_hash, shorten
from apecache.preparation import ExtractSpec, prepare_array
from apecache.store.commit import read_record
from apecache.store.files import LocalFiles
from apecache.store.layout import SEGMENTS, SOURCE, ArrayLayout, ArrayRecord, storable
from apecache.store.reader import FeatureArray, FeatureStore
from apecache.store.writer import ArrayWriter, PairColumns, QuarantinedRow, add_segment, create_store

__all__ = [
    "ArrayReport",
    "ExtractReport",
    "ExtractSpec",
    "Progress",
    "extract",
    "extract_pending",
    "load_encoders",
    "pair_columns",
    "split_source",
]

Progress = Callable[[str, int, int], None]
"""Called with (modality, rows done, rows in all) after every batch."""

RECHECKED_ROWS, RECHECK_COSINE = 16, 0.9999
UNFINDABLE_SHARE = 0.5


@dataclass(frozen=True)
class ArrayReport:
    """One array after the run. `n_encoded` rows were encoded by this run, in `seconds`; `n_truncated` captions cut."""

    modality: Modality
    name: str
    rows: int
    dim: int
    n_encoded: int
    n_quarantined: int
    n_truncated: int
    reasons: dict[str, int]
    examples: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ExtractReport:
    """`duplicates`: images whose files have the same bytes as an earlier one's (each is encoded all the same)."""

    store: Path
    arrays: tuple[ArrayReport, ...]
    duplicates: int = 0

    @property
    def nothing_to_do(self) -> bool:
        return not any(array.n_encoded for array in self.arrays)


def extract(source: PairSource, store: Path, spec: ExtractSpec, progress: Progress = lambda *_: None) -> ExtractReport:
    """Encode every image and caption of `source` once into `store`; what is committed already is not done again.

    Raises:
        ManifestError, EncoderError, MismatchError, StoreError: before anything is encoded.
        BadRowsError: more than `max_bad` of an array's rows are unreadable; all others are in the store.
        DataError: one image, byte for byte, stands in two splits.
    """
    _require_inputs(source, spec)
    encoders = load_encoders(spec)
    segments = split_source(source, store, spec.append)
    totals = {encoder.spec.modality: _Total(_n_rows(source, encoder)) for encoder in encoders}
    for path, part in segments:
        _extract_segment(path, part, encoders, spec, totals, progress)
    opened = FeatureStore.open(store)
    reports = tuple(_report(opened, modality, total) for modality, total in totals.items())
    duplicates = _duplicates(opened, reports)
    _require_few_bad(reports, spec.max_bad)
    return ExtractReport(store, reports, duplicates)


def extract_pending(
    segment: Path,
    part: PairSource,
    encoders: Sequence[ImageEncoder | TextEncoder],
    spec: ExtractSpec,
    progress: Progress = lambda *_: None,
) -> None:
    """Encode and commit what is pending in one segment, given its part of the table and the encoders of `spec`.

    Raises as `extract` does.
    """
    totals = {encoder.spec.modality: _Total(_n_rows(part, encoder)) for encoder in encoders}
    _extract_segment(segment, part, encoders, spec, totals, progress)


def _extract_segment(
    path: Path,
    part: PairSource,
    encoders: Sequence[ImageEncoder | TextEncoder],
    spec: ExtractSpec,
    totals: Mapping[Modality, "_Total"],
    progress: Progress,
) -> None:
    """All arrays are prepared, and every mismatch found, before the first row is encoded."""
    make_segment(path, part)
    opened = FeatureStore.open(path)
    jobs = [_job(opened, encoder, part, spec, totals[encoder.spec.modality]) for encoder in encoders]
    for job in jobs:
        if spec.recheck:
            _require_same_content(opened, job)
        _run(opened.files, job, totals[job.record.modality], progress)


def make_segment(path: Path, part: PairSource) -> None:
    """The store, or a segment of one, that is at `path`; what is there already stays. Raises as `create_store` does."""
    about = (pair_columns(part), part.media.place, version("apecache"))
    if path.parent.name == SEGMENTS:
        add_segment(LocalFiles(path.parents[1]), path.name, *about)
    else:
        create_store(LocalFiles(path), *about)


def load_encoders(spec: ExtractSpec) -> list[ImageEncoder | TextEncoder]:
    if spec.image is None and spec.text is None:
        raise OptionError("nothing to encode: give --image, --text, or both")
    encoders: list[ImageEncoder | TextEncoder] = []
    if spec.image:
        encoders.append(load_image_encoder(spec.image, spec.device))
    if spec.text:
        encoders.append(load_text_encoder(spec.text, spec.device))
    return encoders


# --- the table -------------------------------------------------------------------------------------------------------


def pair_columns(source: PairSource) -> PairColumns:
    splits, labels = [pair.split for pair in source], [pair.label for pair in source]
    return PairColumns(
        source.keys, splits, labels, source.captions, source.languages, source.image_rows, source.digest, source.origin
    )


def split_source(source: PairSource, store: Path, append: bool = False) -> list[tuple[Path, PairSource]]:
    """Each segment's folder and its part of the table; with `append`, a new segment for what is new at its end.

    Raises:
        MismatchError: the table is not that of the store, or has grown without `append`.
    """
    segments, position = [], 0
    for path in _begun_segments(store):
        record = read_record(LocalFiles(path), SOURCE)
        part = source.part(position, position + record["n_images"])
        if part.digest != record["digest"]:
            raise MismatchError(_other_table(path, part, position))
        segments.append((path, part))
        position += record["n_images"]
    rest = source.part(position)
    if not segments:
        return [(store, source)]
    if len(rest) and not append:
        raise MismatchError(
            f"{source.origin} has {len(rest)} images more than {store} was made from; add --append to encode them too"
        )
    return [*segments, (store / SEGMENTS / f"{len(segments):04d}", rest)] if len(rest) else segments


def _begun_segments(store: Path) -> list[Path]:
    """Folders that are claimed for a table, whether or not they were finished being made."""
    if not LocalFiles(store).exists(SOURCE):
        return []
    return [store, *sorted(path.parents[1] for path in (store / SEGMENTS).glob(f"*/{SOURCE}"))]


def _other_table(path: Path, part: PairSource, first_row: int) -> str:
    """Where a table departs from the one that a segment was made from."""
    other = f"{path} was made from another table"
    remedy = "a store belongs to one table (--append takes it with new rows at its end): choose another --store"
    try:
        pairs = FeatureStore.open(path).pairs
    except DataError:
        return f"{other} than {part.origin}; {remedy}"
    captions: list[list[str]] = [[] for _ in pairs.keys]
    languages: list[list[str]] = [[] for _ in pairs.keys]
    for text, image in enumerate(pairs.image_rows):
        captions[image].append(str(pairs.captions[text]))
        languages[image].append(str(pairs.languages[text]))
    there = zip(pairs.keys, pairs.splits, pairs.labels, captions, languages, strict=True)
    for row, (pair, (key, split, label, texts, tongues)) in enumerate(zip(part, there, strict=False)):
        compared: list[tuple[str, str, str]] = [("image", pair.key, key), ("split", pair.split, split)]
        compared += [("label", pair.label, label), ("number of captions", str(len(pair.captions)), str(len(texts)))]
        compared += [("caption", *both) for both in zip(map(storable, pair.captions), texts, strict=False)]
        compared += [("language", *both) for both in zip(pair.languages, tongues, strict=False)]
        for what, a, b in compared:
            if a != b:
                return f"{other}: row {first_row + row} has {what} {shorten(a)!r}, not {shorten(b)!r}; {remedy}"
    return f"{other}: {len(pairs.keys)} images there, {len(part)} here; {remedy}"


def _require_inputs(source: PairSource, spec: ExtractSpec) -> None:
    """Refuse a source that cannot give what is asked for before anything is written."""
    if spec.text and not source.captions:
        raise ManifestError(f"{source.origin} has no captions to encode; leave --text out, or give a source that has")
    if spec.image and isinstance(source.media, NoMedia):
        raise ManifestError(f"{source.origin} has no images to encode; leave --image out, or give a source that has")
    if spec.image:
        _require_findable(source)


def _require_findable(source: PairSource) -> None:
    """Refuse a wrong --root; single missing images are quarantined later."""
    missing = [key for key in source.keys if not source.media.exists(key)]
    if len(missing) > UNFINDABLE_SHARE * len(source):
        below = isinstance(source.media, FolderMedia)
        remedy = "give the folder that the paths are relative to as --root" if below else "every row needs its image"
        raise BadRowsError(
            f"{source.origin}: {len(missing)} of {len(source)} images are not {'below' if below else 'in'} "
            f"{source.media.place} (the first: {missing[0]}); {remedy}"
        )


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class _Total:
    """What a run did with one modality, over all segments. `layout` is that of the first."""

    rows: int
    layout: ArrayLayout | None = None
    name: str = ""
    done: int = 0
    n_encoded: int = 0
    n_truncated: int = 0
    seconds: float = 0.0


def _n_rows(source: PairSource, encoder: ImageEncoder | TextEncoder) -> int:
    return len(source) if isinstance(encoder, ImageEncoder) else len(source.captions)


def _job(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    part: PairSource,
    spec: ExtractSpec,
    total: _Total,
) -> ImageJob | TextJob:
    captions = () if isinstance(encoder, ImageEncoder) else part.captions
    record = prepare_array(store, encoder, _n_rows(part, encoder), spec, total.layout, captions)
    total.layout, total.name = total.layout or record.layout, record.name
    if isinstance(encoder, ImageEncoder):
        return ImageJob(part, encoder, record, spec.workers)
    return TextJob(part, encoder, record)


def _run(files: LocalFiles, job: ImageJob | TextJob, total: _Total, progress: Progress) -> None:
    """Encode and commit every pending shard of one segment, then seal it."""
    writer, record = ArrayWriter(files, job.record), job.record
    committed = writer.committed()
    pending = [shard for shard in range(record.layout.n_shards) if shard not in committed]
    if pending and committed:
        _spot_check(files, job)

    def advance(count: int) -> None:
        total.done += count
        progress(record.modality, total.done, total.rows)

    advance(sum(stop - start for start, stop in (commit.rows for commit in committed.values())))
    begin, done_before = time.perf_counter(), total.done
    for shard, encoded in zip(pending, job.shards(pending, advance), strict=True):
        features, quarantined = _storable(encoded, record, shard, job)
        writer.commit(shard, features, encoded.content, quarantined)
        total.n_truncated += encoded.n_truncated
    writer.seal()
    total.n_encoded += total.done - done_before
    total.seconds += time.perf_counter() - begin


def _storable(
    encoded: EncodedShard, record: ArrayRecord, shard: int, job: ImageJob | TextJob
) -> tuple[NDArray[Any], list[QuarantinedRow]]:
    """Features in the storage dtype; rows that are not finite are quarantined as well."""
    with np.errstate(over="ignore"):
        features = encoded.features.astype(record.layout.dtype)
    bad = dict(encoded.bad)
    for row in np.flatnonzero(~np.isfinite(features).all(1)):
        overflow = bool(np.isfinite(encoded.features[row]).all())
        detail = f"a value is beyond {record.layout.dtype}; use --storage float32" if overflow else "NaN or infinity"
        bad.setdefault(int(row), RowError("overflow" if overflow else "not-finite", detail))
    start = record.layout.shard(shard).start
    rows = [QuarantinedRow(start + row, job.key(start + row), e.reason, e.detail) for row, e in sorted(bad.items())]
    return features, rows


# --- checks ----------------------------------------------------------------------------------------------------------


def _spot_check(files: LocalFiles, job: ImageJob | TextJob) -> None:
    """Encode a few committed rows again: a library update between two runs can change pixels or kernels.

    Raises:
        MismatchError: a committed row now has cosine below 0.9999 with itself, or its image cannot be read any more.
    """
    array = FeatureArray(files, job.record)
    shard = min(array.commits)
    first = job.record.layout.shard(shard).start
    rows = [row for row in array.rows_ok(shard) if row < first + RECHECKED_ROWS]
    if not rows:
        return
    stored = array.load_shard(shard)[[row - first for row in rows]].astype(np.float32)
    fresh = _encode_rows(job, rows)
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
    cosine = float(((stored * fresh).sum(1) / np.maximum(norms, 1e-12)).min())
    if cosine < RECHECK_COSINE:
        raise MismatchError(
            f"{job.record.modality} features that are committed come out otherwise now (cosine {cosine:.5f}): a "
            "library, the device or an input changed; use the versions in apecache info --json, or a new --store"
        )


def _encode_rows(job: ImageJob | TextJob, rows: list[int]) -> NDArray[np.float32]:
    if isinstance(job, TextJob):
        encoded: NDArray[np.float32] = job.encoder.encode([job.source.captions[row] for row in rows]).numpy()
        return encoded
    try:
        pixels = [job.encoder.preprocess(load_image(job.key(row), job.source.media).image) for row in rows]
    except RowError as error:
        raise MismatchError(f"an image that is committed cannot be read any more: {error.detail}") from None
    encoded = job.encoder.encode(torch.stack(pixels)).numpy()
    return encoded


def _require_same_content(store: FeatureStore, job: ImageJob | TextJob) -> None:
    """Read every committed row's input again.

    Raises:
        MismatchError: some have other bytes than when they were encoded.
    """
    recorded = FeatureArray(store.files, job.record).content()
    changed = [row for row, digest in enumerate(recorded) if digest and _content(job, row) != digest]
    if changed:
        keys = ", ".join(job.key(row) for row in changed[:3])
        raise MismatchError(
            f"{len(changed)} of {len(recorded)} {job.record.modality} rows are not what was encoded ({keys}); "
            "bring the old files back, or make a new --store"
        )


def _content(job: ImageJob | TextJob, row: int) -> str:
    if isinstance(job, TextJob):
        return content_hash(job.source.captions[row])
    try:
        return content_hash(job.source.media.read(job.key(row)))
    except RowError:
        return ""


def _report(store: FeatureStore, modality: Modality, total: _Total) -> ArrayReport:
    array = store.array(modality, total.name)
    bad = array.quarantined() if array.n_quarantined else []
    reasons = dict(Counter(row["reason"] for row in bad))
    examples = tuple(f"row {row['row']}: {row['reason']}: {row['detail']}" for row in bad[:5])
    counts = (total.n_encoded, len(bad), total.n_truncated)
    return ArrayReport(modality, array.name, array.rows, array.dim, *counts, reasons, examples, total.seconds)


def _require_few_bad(reports: Iterable[ArrayReport], max_bad: float) -> None:
    for report in reports:
        if report.n_quarantined > max_bad * report.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
            raise BadRowsError(
                f"{report.n_quarantined} of {report.rows} {report.modality} rows could not be encoded ({reasons}; the "
                f"first: {report.examples[0]}); all others are in the store: mend the inputs, or accept with --max-bad"
            )


def _duplicates(store: FeatureStore, reports: Iterable[ArrayReport]) -> int:
    """Images whose file has the bytes of an earlier one's.

    Raises:
        DataError: two of them stand in different splits, so that what is reported would have been trained on.
    """
    name = next((report.name for report in reports if report.modality == "image"), None)
    if name is None:
        return 0
    pairs, first, count = store.pairs, dict[str, int](), 0
    for row, digest in enumerate(store.array("image", name).content()):
        other = first.setdefault(digest, row) if digest else row
        count += other != row
        if pairs.splits[other] != pairs.splits[row]:
            raise DataError(
                f"{pairs.keys[other]} ({pairs.splits[other]}) and {pairs.keys[row]} ({pairs.splits[row]}) are the same "
                "file in two splits; all features are in the store: take one of them out of the table"
            )
    return count
