"""Is what is committed still what the inputs and the encoder give? Asked before rows are added to
it."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.encoders.encoder import TextEncoder
from apecache.errors import MismatchError, RowError
from apecache.extraction.encode import ImageJob, Target, TextJob
from apecache.fingerprint import content_hash
from apecache.storage.files import Files
from apecache.store.array import FeatureArray
from apecache.store.layout import ArrayLayout, records_folder
from apecache.store.quantize import quantise, restore
from apecache.store.reader import FeatureStore
from apecache.store.records import CommitRecord, is_commit, read_commit

RECHECKED_ROWS = 16
RECHECK_COSINE = 0.9999


class _FirstCommit(FeatureArray):
    """An array of which one commit record is read, not all of them."""

    @cached_property
    def commits(self) -> Mapping[int, CommitRecord]:
        folder = f"{records_folder(self.record.modality, self.name)}/commits"
        first = next((int(name[:8]) for name in self.files.list(folder) if is_commit(name)), None)
        return {} if first is None else {first: read_commit(self.files, self.record, first)[0]}


def spot_check(files: Files, job: ImageJob | TextJob, place: int) -> None:
    """Encode a few committed rows of the job's target `place` again, if there are any: a library
    update between two runs, or another one on the next node, can change pixels or kernels.

    Raises:
        MismatchError: a committed row now has cosine below 0.9999 with itself, or its image cannot
            be read any more.
    """
    record = job.targets[place].record
    array = _FirstCommit(files=files, record=record)
    if not array.commits:
        return
    (shard,) = array.commits
    first = record.layout.shard(shard).start
    rows = [row for row in array.rows_ok(shard) if row < first + RECHECKED_ROWS]
    if not rows:
        return
    stored = (
        array.load_shard(shard)[[row - first for row in rows]]
        .astype(np.float32)
        .reshape(len(rows), -1)
    )
    fresh = _as_stored(_encode_rows(job, place, rows), record.layout).reshape(len(rows), -1)
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
    cosine = float(((stored * fresh).sum(1) / np.maximum(norms, 1e-12)).min())
    if cosine < RECHECK_COSINE:
        raise MismatchError(
            f"{record.modality} features that are committed come out otherwise now (cosine "
            f"{cosine:.5f}): a "
            "library, the device or an input changed; use the versions in apecache info --json, "
            "or a new --store"
        )


def _as_stored(fresh: NDArray[np.float32], layout: ArrayLayout) -> NDArray[np.float32]:
    """What reading gives of what was just encoded: rounding is no change."""
    if not layout.scaled:
        return fresh
    rounded = np.empty_like(fresh)
    restore(*quantise(fresh.astype(layout.read_dtype)), rounded)
    return rounded


def _encode_rows(job: ImageJob | TextJob, place: int, rows: list[int]) -> NDArray[np.float32]:
    """Float32 [n, *row_shape of the array] by one target alone."""
    if isinstance(job, TextJob):
        return _encode_texts(job.targets[place], [job.source.captions[row] for row in rows])
    alone = ImageJob(source=job.source, targets=(job.targets[place],), workers=1, views=job.views)
    try:
        (views,) = zip(*(alone.preprocess(alone.load(job.key(row))) for row in rows), strict=True)
    except RowError as error:
        raise MismatchError(
            f"an image that is committed cannot be read any more: {error.detail}"
        ) from None
    pixels = torch.stack(views)
    found = [job.targets[place].encoder.encode(pixels[:, view]) for view in range(pixels.shape[1])]
    encoded: NDArray[np.float32] = (torch.stack(found, 1) if job.views else found[0]).numpy()
    return encoded


def _encode_texts(target: Target[TextEncoder], texts: list[str]) -> NDArray[np.float32]:
    """One after another: each text's tokens have a length of their own."""
    if target.record.layout.tokens is None:
        encoded: NDArray[np.float32] = target.encoder.encode(texts).numpy()
        return encoded
    out = np.zeros((len(texts), *target.record.layout.row_shape), np.float32)
    for row, ids in enumerate(target.encoder.tokenise(texts).ids):
        out[row, : len(ids)] = target.encoder.encode_ids([ids])[0].numpy()
    return out


def require_same_content(store: FeatureStore, job: ImageJob | TextJob) -> None:
    """Read every committed row's input again.

    Raises:
        MismatchError: some have other bytes than when they were encoded.
    """
    for target in job.targets:
        recorded = FeatureArray(files=store.files, record=target.record).content()
        changed = [
            row for row, digest in enumerate(recorded) if digest and _content(job, row) != digest
        ]
        if changed:
            keys = ", ".join(job.key(row) for row in changed[:3])
            raise MismatchError(
                f"{len(changed)} of {len(recorded)} {target.record.modality} rows are not what "
                f"was encoded ({keys}); "
                "bring the old files back, or make a new --store"
            )


def _content(job: ImageJob | TextJob, row: int) -> str:
    if isinstance(job, TextJob):
        return content_hash(job.source.captions[row])
    try:
        return content_hash(job.source.media.read(job.key(row)))
    except RowError:
        return ""
