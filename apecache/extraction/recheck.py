"""Check that committed rows are still what the inputs and the encoder give.

This is done before rows are added to them.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.encoders.encoder import TextEncoder
from apecache.errors import MismatchError, RowError
from apecache.extraction.encode import ArrayTarget, ImageJob
from apecache.extraction.encode_texts import TextJob
from apecache.extraction.spec import LEAST_TOLERANCE
from apecache.fingerprint import content_hash
from apecache.storage.files import Files
from apecache.store.array import FeatureArray
from apecache.store.layout import ArrayLayout, ArrayRecord, records_folder
from apecache.store.quantize import quantize, restore
from apecache.store.records import CommitRecord, is_commit, read_commit

RECHECKED_ROWS = 16


class _FirstCommit(FeatureArray):
    """Open an array with one of its commit records only; a large array may have thousands."""

    @cached_property
    def commits(self) -> Mapping[int, CommitRecord]:
        folder = f"{records_folder(self.record.modality, self.name)}/commits"
        for name in self.files.list(folder):
            if is_commit(name):
                # The name of a record begins with the eight digits of its shard.
                shard = int(name[:8])
                commit = read_commit(self.files, self.record, shard)[0]
                return {shard: commit}
        return {}


def spot_check(files: Files, job: ImageJob | TextJob, place: int) -> None:
    """Encode a few committed rows again, if there are any, and compare them with the stored ones.

    A library update between two runs, or another version on the next node, can change pixels or
    kernels.

    Args:
        place: index of the job's target.

    Raises:
        MismatchError: a committed row now has a cosine with itself below what its precision
            allows, or its image cannot be read any more.
    """
    record = job.targets[place].record
    array = _FirstCommit(files=files, record=record)
    if not array.commits:
        return
    (shard,) = array.commits
    first_row = record.layout.shard(shard).start
    rows = array.rows_ok(shard)[:RECHECKED_ROWS]
    if isinstance(job, ImageJob):
        # An image that has been removed or replaced since says nothing about the encoder.
        content = array.commits[shard].content
        rows = [row for row in rows if _digest(job, row) == content[row - first_row]]
    if not rows:
        return
    rows_in_shard = [row - first_row for row in rows]
    stored = array.load_shard(shard)[rows_in_shard].astype(np.float32)
    fresh = _as_stored(_encode_rows(job, place, rows), record.layout)
    # Views and tokens of a row are compared as one long vector.
    stored = stored.reshape(len(rows), -1)
    fresh = fresh.reshape(len(rows), -1)
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
    dot_products = (stored * fresh).sum(1)
    # A row of zeros has cosine 0 and not NaN, which would pass the comparison below.
    cosines = dot_products / np.maximum(norms, 1e-12)
    worst_cosine = float(cosines.min())
    least_cosine = 1 - tolerance_of(record)
    if worst_cosine < least_cosine:
        raise MismatchError(
            f"{record.modality} features that are committed come out otherwise now (cosine "
            f"{worst_cosine:.5f}, expected at least {least_cosine:.5f}): a "
            "library, the device or an input changed; use the versions in apecache info --json, "
            "or a new --store"
        )


def tolerance_of(record: ArrayRecord) -> float:
    """Return the 1 - cosine up to which rows of an array count as equal, on any device.

    It was measured where the precision is not float32.
    """
    measured = record.environment.get("precision", {})
    return float(measured.get("tolerance", LEAST_TOLERANCE))


def _as_stored(fresh: NDArray[np.float32], layout: ArrayLayout) -> NDArray[np.float32]:
    """Round fresh features as storing and reading would: rounding is not a change."""
    if not layout.scaled:
        return fresh
    rounded = np.empty_like(fresh)
    restore(*quantize(fresh.astype(layout.read_dtype)), rounded)
    return rounded


def _encode_rows(
    job: ImageJob | TextJob, target_position: int, rows: list[int]
) -> NDArray[np.float32]:
    """Encode rows by one target alone -> float32 [n, *row_shape of the array]."""
    if isinstance(job, TextJob):
        texts = [job.source.captions[row] for row in rows]
        return _encode_texts(job.targets[target_position], texts)
    target_job = ImageJob(
        source=job.source,
        targets=(job.targets[target_position],),
        workers=1,
        views=job.views,
    )
    row_pixels: list[torch.Tensor] = []
    if target_job.decodes_on_device:
        with target_job.decoders() as decode:
            for decoded in decode(rows):
                if decoded.value is None:
                    assert decoded.error is not None
                    raise decoded.error
                row_pixels += decoded.value
    else:
        for row in rows:
            row_pixels += target_job.preprocess(target_job.load(job.key(row)))
    batch = torch.stack(row_pixels)
    encoder = job.targets[target_position].encoder
    view_features = [encoder.encode(batch[:, view]) for view in range(batch.shape[1])]
    features = torch.stack(view_features, 1) if job.views else view_features[0]
    encoded: NDArray[np.float32] = features.numpy()
    return encoded


def _encode_texts(target: ArrayTarget[TextEncoder], texts: list[str]) -> NDArray[np.float32]:
    """Encode texts -> float32 [n, *row_shape of the array]."""
    if target.record.layout.tokens is None:
        encoded: NDArray[np.float32] = target.encoder.encode(texts).numpy()
        return encoded
    # One after another: the texts differ in their number of tokens.
    features = np.zeros((len(texts), *target.record.layout.row_shape), np.float32)
    for row, ids in enumerate(target.encoder.tokenize(texts).ids):
        features[row, : len(ids)] = target.encoder.encode_ids([ids])[0].numpy()
    return features


def _digest(job: ImageJob, row: int) -> str:
    """Hash an image as it is now; an empty string if it cannot be read."""
    try:
        return content_hash(job.source.media.read(job.key(row)))
    except RowError:
        return ""
