"""Extraction: pairs -> frozen encoders -> store, each input once, whatever interrupts it.

The same table and encoder give the same bytes however often the run is killed (see `apecache.encode`).
"""

import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.data.images import load_image, resolve_below
from apecache.data.pairs import PairSource
from apecache.encode import EncodedShard, ImageJob, TextJob
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, Modality
from apecache.errors import BadRowsError, MismatchError, OptionError, RowError, StoreError
from apecache.fingerprint import Fingerprint, Json, describe_difference
from apecache.store.files import LocalFiles
from apecache.store.layout import MAX_SHARD_BYTES, ArrayLayout, ArrayRecord, with_metadata
from apecache.store.reader import FeatureArray, FeatureStore
from apecache.store.writer import ArrayWriter, PairColumns, QuarantinedRow, create_array, create_store

Progress = Callable[[str, int, int], None]
"""Called with (modality, rows done, rows in all) after every batch."""

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 256, 4096
SHARD_SECONDS = 60
RECHECKED_ROWS, RECHECK_COSINE = 16, 0.9999
UNFINDABLE_SHARE = 0.5


@dataclass(frozen=True)
class ExtractSpec:
    """What to encode and how. `None` leaves a choice to the store (when resuming) or to the machine (when new).

    `max_bad`: share of rows that may be unreadable before the run ends as an error (after encoding all others).
    `add`: put features of another encoder beside those that the store has.
    """

    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    image_batch: int | None = None
    text_batch: int | None = None
    shard_rows: int | None = None
    storage_dtype: Literal["float16", "float32"] = "float16"
    workers: int = field(default_factory=lambda: min(16, os.cpu_count() or 1))
    max_bad: float = 0.01
    device: str = "auto"
    add: bool = False


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
    store: Path
    arrays: tuple[ArrayReport, ...]

    @property
    def nothing_to_do(self) -> bool:
        return not any(array.n_encoded for array in self.arrays)


def extract(
    source: PairSource, root: Path, store: Path, spec: ExtractSpec, progress: Progress = lambda *_: None
) -> ExtractReport:
    """Encode every image and caption of `source` once into `store`; what is committed already is not done again.

    Args:
        root: the folder that the table's image paths are relative to; nothing outside it is read.

    Raises:
        EncoderError, MismatchError, StoreError: before anything is encoded.
        BadRowsError: more than `max_bad` of an array's rows are unreadable; all others are in the store.
    """
    if spec.image is None and spec.text is None:
        raise OptionError("nothing to encode: give --image, --text, or both")
    image = load_image_encoder(spec.image, spec.device) if spec.image else None
    text = load_text_encoder(spec.text, spec.device) if spec.text else None
    if image:
        _require_findable(source, root)
    files = LocalFiles(store)
    create_store(files, pair_columns(source), str(root.resolve()), version("apecache"))
    opened = FeatureStore.open(store)
    jobs: list[ImageJob | TextJob] = []
    if image:
        record = _prepare(opened, image, len(source), spec, spec.image_batch)
        jobs.append(ImageJob(source, root, image, record, spec.workers))
    if text:
        record = _prepare(opened, text, len(source.captions), spec, spec.text_batch, source.captions)
        jobs.append(TextJob(source, text, record))
    reports = tuple(_run(files, job, progress) for job in jobs)
    _require_few_bad(reports, spec.max_bad)
    return ExtractReport(store, reports)


def pair_columns(source: PairSource) -> PairColumns:
    splits, labels = [pair.split for pair in source], [pair.label for pair in source]
    return PairColumns(
        source.keys, splits, labels, source.captions, source.languages, source.image_rows, source.digest, source.origin
    )


def _require_findable(source: PairSource, root: Path) -> None:
    """Refuse a wrong --root before anything is written; single missing images are quarantined later."""
    missing = [key for key in source.keys if not _findable(key, root)]
    if len(missing) > UNFINDABLE_SHARE * len(source):
        raise BadRowsError(
            f"{source.origin}: {len(missing)} of {len(source)} images are not below {root} (the first: {missing[0]}); "
            "give the folder that the paths are relative to as --root"
        )


def _findable(key: str, root: Path) -> bool:
    try:
        return resolve_below(key, root).exists()
    except (RowError, OSError, ValueError):
        return False


# --- which array, laid out how ---------------------------------------------------------------------------------------


def _prepare(
    store: FeatureStore,
    encoder: ImageEncoder | TextEncoder,
    rows: int,
    spec: ExtractSpec,
    batch: int | None,
    captions: Sequence[str] = (),
) -> ArrayRecord:
    """The array to fill: the one that is there, if it is of this encoder, else a new one.

    Raises:
        MismatchError: features of another encoder, preprocessing or batch size. StoreError: the disk is too small.
    """
    modality, name = encoder.spec.modality, encoder.spec.slug
    existing = store.arrays(modality)
    same = next((array for array in existing if array.name == name), None)
    if same is None and existing and not spec.add:
        _require_same(store, existing[0], encoder, spec, batch)
    if same is not None:
        _require_same(store, same, encoder, spec, batch)
    found = same or next((a for a in existing if a.record.encoder.digest == encoder.fingerprint.digest), None)
    if found is not None:
        create_array(store.files, found.record)  # finishes what a killed run began
        _recheck_environment(found.record)
        return found.record
    layout = _layout(encoder, rows, spec, batch, captions)
    _require_room(store, layout)
    fingerprint = _fingerprint(encoder, spec.storage_dtype, layout.batch_size)
    where = environment(encoder.device)
    record = with_metadata(ArrayRecord(modality, name, encoder.spec, fingerprint, layout, {}, where))
    create_array(store.files, record)
    return record


def _fingerprint(encoder: ImageEncoder | TextEncoder, dtype: str, batch: int) -> Fingerprint:
    return Fingerprint({"encoder": encoder.fingerprint.fields, "storage": {"dtype": dtype, "batch_size": batch}})


def _require_same(
    store: FeatureStore, array: FeatureArray, encoder: ImageEncoder | TextEncoder, spec: ExtractSpec, batch: int | None
) -> None:
    """Without a batch size asked for, the recorded one is taken; the encoder and the storage must be the same."""
    recorded = array.record
    wanted = _fingerprint(encoder, spec.storage_dtype, batch or recorded.layout.batch_size)
    differences = wanted.difference(recorded.fingerprint)
    if differences:
        raise MismatchError(
            f"{store.path} holds {recorded.modality} features {array.name} of another encoder or setting: "
            f"{describe_difference(differences)}; choose another --store"
            + (", or add --add to keep both" if array.name != encoder.spec.slug else ""),
            differences,
        )


def _layout(
    encoder: ImageEncoder | TextEncoder, rows: int, spec: ExtractSpec, batch: int | None, captions: Sequence[str]
) -> ArrayLayout:
    on_gpu = encoder.device.type == "cuda"
    size = batch or (256 if on_gpu else 32)
    per_row = encoder.dim * np.dtype(spec.storage_dtype).itemsize
    shard_rows = spec.shard_rows or _calibrated_rows(encoder, size, captions)
    shard_rows = max(1, min(shard_rows, rows, MAX_SHARD_BYTES // per_row))
    return ArrayLayout(rows, encoder.dim, spec.storage_dtype, shard_rows, size, torch.get_num_threads())


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
    needed = int(1.05 * layout.n_shards * layout.shard_rows * (layout.dim * np.dtype(layout.dtype).itemsize + 1))
    free = shutil.disk_usage(store.path).free
    if needed > free:
        raise StoreError(f"{store.path}: {needed / 1e9:.1f} GB needed for the features, {free / 1e9:.1f} GB free")


def environment(device: torch.device) -> Json:
    """Versions and device: recorded, never part of the identity."""
    names = ("apecache", "torch", "timm", "transformers", "numpy", "pillow", "zarr")
    versions = {name: version(name) for name in names}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"versions": versions, "device": device.type, "hardware": gpu, "python": platform.python_version()}


def _recheck_environment(record: ArrayRecord) -> None:
    """A resume computes with the recorded number of threads."""
    torch.set_num_threads(record.layout.threads)


# --- the loop --------------------------------------------------------------------------------------------------------


def _run(files: LocalFiles, job: ImageJob | TextJob, progress: Progress) -> ArrayReport:
    """Encode and commit every pending shard, then seal."""
    writer, record = ArrayWriter(files, job.record), job.record
    committed = writer.committed()
    pending = [shard for shard in range(record.layout.n_shards) if shard not in committed]
    done = sum(stop - start for start, stop in (commit.rows for commit in committed.values()))
    if pending and committed:
        _spot_check(files, job)
    begin, n_truncated, total = time.perf_counter(), 0, record.layout.rows
    position = [done]

    def advance(count: int) -> None:
        position[0] += count
        progress(record.modality, position[0], total)

    progress(record.modality, done, total)
    for shard, encoded in zip(pending, job.shards(pending, advance), strict=True):
        features, quarantined = _storable(encoded, record, shard, job)
        writer.commit(shard, features, encoded.content, quarantined)
        n_truncated += encoded.n_truncated
    writer.seal()
    return _report(files, record, total - done, n_truncated, time.perf_counter() - begin)


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


def _spot_check(files: LocalFiles, job: ImageJob | TextJob) -> None:
    """Encode a few committed rows again: a library update between two runs can change pixels or kernels.

    Raises:
        MismatchError: a committed row now has cosine below 0.9999 with itself.
    """
    array = FeatureArray(files, job.record)
    shard = min(array.commits)
    rows = [row for row in array.rows_ok(shard) if row < job.record.layout.shard(shard).start + RECHECKED_ROWS]
    if not rows:
        return
    stored = array.load_shard(shard)[[row - job.record.layout.shard(shard).start for row in rows]].astype(np.float32)
    if isinstance(job, ImageJob):
        images = [job.encoder.preprocess(load_image(job.key(row), job.root).image) for row in rows]
        fresh = job.encoder.encode(torch.stack(images)).numpy()
    else:
        fresh = job.encoder.encode([job.source.captions[row] for row in rows]).numpy()
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
    cosine = float(((stored * fresh).sum(1) / np.maximum(norms, 1e-12)).min())
    if cosine < RECHECK_COSINE:
        raise MismatchError(
            f"{job.record.modality} features that are committed come out otherwise now (cosine {cosine:.5f}): a "
            "library, the device or an input changed; use the versions in apecache info --json, or a new --store"
        )


def _report(files: LocalFiles, record: ArrayRecord, n_encoded: int, n_truncated: int, seconds: float) -> ArrayReport:
    array = FeatureArray(files, record)
    bad = array.quarantined() if array.n_quarantined else []
    reasons = dict(Counter(row["reason"] for row in bad))
    examples = tuple(f"row {row['row']}: {row['reason']}: {row['detail']}" for row in bad[:5])
    counts = (n_encoded, len(bad), n_truncated)
    return ArrayReport(record.modality, record.name, array.rows, array.dim, *counts, reasons, examples, seconds)


def _require_few_bad(reports: Iterable[ArrayReport], max_bad: float) -> None:
    for report in reports:
        if report.n_quarantined > max_bad * report.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
            raise BadRowsError(
                f"{report.n_quarantined} of {report.rows} {report.modality} rows could not be encoded ({reasons}; the "
                f"first: {report.examples[0]}); all others are in the store: mend the inputs, or accept with --max-bad"
            )
