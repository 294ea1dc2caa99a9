"""Extraction by a Ray cluster: the store of a local run, byte for byte, where the devices are of
the same kind.

The driver divides the table, hands out shards, seals and judges; the encoders are loaded by the
actors alone, and the first of them that is ready makes the arrays. Every actor encodes whole shards
with the batch size and threads that are recorded and commits them itself, so features never travel.
The store and the images must be reachable by every node under the same path (a shared folder) or
URL (object storage), and by the driver.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_place, require_type
from apecache.cluster.filling import Filling, ShardDone, ShardPiece, Task, fill
from apecache.cluster.pool import Pool, RaySpec, node_name, open_pool
from apecache.data.pairs import PairSource
from apecache.errors import EngineError, OptionError
from apecache.extraction.arrays import default_workers
from apecache.extraction.encode import ImageJob, TextJob
from apecache.extraction.recheck import require_same_content, spot_check
from apecache.extraction.report import ExtractReport, Progress, Tally, Total, judge
from apecache.extraction.run import (
    ExtractSpec,
    commit_shard,
    load_encoders,
    new_totals,
    prepare_jobs,
    require_inputs,
)
from apecache.extraction.segments import make_segment, split_source
from apecache.fingerprint import Modality
from apecache.storage.bucket import is_object_url
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.layout import PAIRS, commit_name
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter


def extract_on_ray(
    source: PairSource,
    store: AnyPath,
    spec: ExtractSpec,
    progress: Progress = lambda *_: None,
    cluster: RaySpec | None = None,
) -> ExtractReport:
    """`extract`, by the actors of a Ray cluster. `progress` is called after every commit.

    Raises:
        OptionError: `spec` asks for a part, or for a single writer. EngineError, MissingExtraError:
            as `open_pool`, and
        where a node does not see the store. All others as `extract`, whichever node they come from.
    """
    require_type(source, PairSource, "source")
    require_type(spec, ExtractSpec, "spec")
    store = as_place(store, "store")
    if not spec.part.whole:
        raise OptionError(
            f"part {spec.part} of an extraction is for machines without Ray; leave one of the "
            "two out"
        )
    if spec.single_writer:
        raise OptionError(
            "--single-writer: the actors of a cluster are several writers; leave one of the two out"
        )
    require_inputs(source, spec)
    files = open_files(store if is_object_url(store) else Path(os.path.abspath(store)))
    segments = split_source(source, files, spec.append)
    parts = {segment.files.place: segment.part for segment in segments}
    with open_pool(
        partial(_Encoding, parts, spec),
        (cluster or RaySpec()).for_device(spec.device),
    ) as pool:
        pool.first(LOAD)
        begin = time.perf_counter()
        for segment in segments:
            make_segment(segment)
        tasks: list[Task] = pool.first(PREPARE)
        totals = _fill(
            pool,
            fillings=[Filling(task) for task in tasks],
            source=source,
            progress=progress,
        )
    return judge(files, totals=totals, spec=spec, begin=begin)


# --- the driver -----------------------------------------------------------------------------------


def _fill(
    pool: Pool,
    fillings: Sequence[Filling],
    source: PairSource,
    progress: Progress,
) -> dict[Modality, Total]:
    totals = _totals(fillings, source)
    last = time.perf_counter()
    for total in totals.values():
        progress(total.standing)

    def told(filling: Filling, shard: int, names: tuple[str, ...], done: ShardDone) -> None:
        nonlocal last
        now = time.perf_counter()
        before = last
        last = now
        total = totals[filling.task.modality]
        rows = len(filling.layout.shard(shard))
        total.done += rows
        total.n_bad += done.n_bad
        for tally in (total.tallies[name] for name in names):
            tally.n_encoded += rows
            tally.n_bytes += rows * tally.layout.row_bytes
            tally.n_truncated += done.n_truncated
            tally.seconds += now - before
        progress(total.standing)

    fill(pool, fillings, told)
    return totals


def _totals(fillings: Sequence[Filling], source: PairSource) -> dict[Modality, Total]:
    totals: dict[Modality, Total] = {}
    for filling in fillings:
        modality = filling.task.modality
        rows = len(source) if modality == "image" else len(source.captions)
        total = totals.setdefault(modality, Total(modality=modality, rows=rows))
        total.passes = max(total.passes, filling.task.job + 1)
        total.done += filling.rows_done
        for writer in filling.writers:
            total.tallies.setdefault(writer.record.name, Tally(layout=writer.layout))
    return totals


# --- an actor -------------------------------------------------------------------------------------

LOAD = "loading the encoders"
PREPARE = "preparing the arrays"


@dataclass(kw_only=True)
class _Segment:
    files: Files
    jobs: dict[tuple[Modality, int], ImageJob | TextJob]


class _Encoding:
    """The encoders of a run, loaded, and the segments that were looked at."""

    def __init__(self, parts: dict[str | Path, PairSource], spec: ExtractSpec, cpus: int) -> None:
        torch.set_num_threads(cpus)  # what a new array records
        self.parts = parts
        self.spec = _on_a_node(spec, cpus)
        self.encoders = load_encoders(self.spec)
        self.totals = new_totals(next(iter(parts.values())), self.encoders)
        self.opened: dict[str | Path, _Segment] = {}
        self.checked: set[tuple[str | Path, Modality, int]] = set()

    def do(self, piece: str | ShardPiece) -> list[Task] | ShardDone | None:
        if isinstance(piece, ShardPiece):
            return self._encode(piece)
        if piece == PREPARE:
            return [task for folder in self.parts for task in self._prepare(folder)]
        return None  # loading is all that was asked for

    def _prepare(self, folder: str | Path) -> list[Task]:
        segment = self._segment(folder)
        if self.spec.recheck:
            for job in segment.jobs.values():
                require_same_content(FeatureStore.open(folder), job)
        return [
            Task(
                folder=folder,
                job=number,
                modality=modality,
                names=tuple(target.record.name for target in job.targets),
            )
            for (modality, number), job in segment.jobs.items()
        ]

    def _segment(self, folder: str | Path) -> _Segment:
        """Its jobs. Raises EngineError if this node does not see what the driver has made."""
        if folder not in self.opened:
            if not open_files(folder).exists(PAIRS):
                raise EngineError(
                    f"node {node_name()} does not see {folder}; the store must lie where "
                    "every node reaches it"
                )
            store = FeatureStore.open(folder)
            jobs = prepare_jobs(
                store,
                part=self.parts[folder],
                encoders=self.encoders,
                spec=self.spec,
                totals=self.totals,
            )
            self.opened[folder] = _Segment(files=store.files, jobs=dict(_numbered(jobs)))
        return self.opened[folder]

    def _encode(self, piece: ShardPiece) -> ShardDone:
        """Encode and commit; what is committed by now, by an actor that could not tell any more,
        stays."""
        task = piece.task
        segment = self._segment(piece.task.folder)
        job = segment.jobs[task.modality, task.job]
        self._check(task, segment.files, job)
        lacking = [
            not segment.files.exists(commit_name(task.modality, name, piece.shard))
            for name in task.names
        ]
        if not any(lacking):
            return ShardDone()
        (encoded,) = job.shards([piece.shard], lambda _: None)
        writers = [ArrayWriter(segment.files, target.record) for target in job.targets]
        for writer, features, lacks in zip(writers, encoded.features, lacking, strict=True):
            if lacks:
                commit_shard(writer, piece.shard, features, encoded, job)
        return ShardDone(n_bad=len(encoded.bad), n_truncated=encoded.n_truncated)

    def _check(self, task: Task, files: Files, job: ImageJob | TextJob) -> None:
        """Whether this node gives what is committed already, once for each job."""
        key = task.folder, task.modality, task.job
        if key not in self.checked:
            for place in range(len(job.targets)):
                spot_check(files, job, place)
            self.checked.add(key)


def _numbered(
    jobs: Sequence[ImageJob | TextJob],
) -> Iterator[tuple[tuple[Modality, int], ImageJob | TextJob]]:
    """Jobs of each modality numbered from 0, in an order that is the same in every actor."""
    counts: Counter[Modality] = Counter()
    for job in jobs:
        modality = job.targets[0].record.modality
        yield (modality, counts[modality]), job
        counts[modality] += 1


def _on_a_node(spec: ExtractSpec, cpus: int) -> ExtractSpec:
    """Decoding processes for the cores of an actor, not for those of the driver's machine."""
    return replace(spec, workers=default_workers(cpus)) if spec.workers is None else spec
