"""Extract on a Ray cluster. On devices of the same type the store equals a local one byte for byte.

The driver divides the table, hands out shards, seals arrays and judges the result. Only the actors
load encoders; the first that is ready makes the arrays. Every actor encodes whole shards with the
recorded batch size and threads and commits them itself, so features never travel. Every node and
the driver must reach the store and the images under the same path (a shared folder) or URL (object
storage).
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_place, require_spec, require_type
from apecache.cluster.pool import ActorPool, RaySpec, node_name, open_pool
from apecache.cluster.task_state import ShardReport, ShardRequest, Task, TaskState, fill
from apecache.data.decoding import Decode
from apecache.data.pairs import PairSource
from apecache.errors import EngineError, OptionError
from apecache.extraction.encode import EncodedShard, ImageJob
from apecache.extraction.encode_texts import TextJob
from apecache.extraction.precision import with_precision
from apecache.extraction.recheck import spot_check
from apecache.extraction.report import (
    ArrayCounts,
    ExtractionProgress,
    ExtractReport,
    ModalityCounts,
    judge,
)
from apecache.extraction.run import (
    ExtractSpec,
    commit_shard,
    new_totals,
    open_encoders,
    prepare_jobs,
    require_inputs,
)
from apecache.extraction.segments import Inputs
from apecache.extraction.spec import default_workers
from apecache.extraction.table_plan import plan_table
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
    progress: ExtractionProgress = lambda *_: None,
    cluster: RaySpec | None = None,
) -> ExtractReport:
    """Extract as `extract` does, by the actors of a Ray cluster.

    Args:
        progress: called after every commit.

    Raises:
        OptionError: `spec` asks for a part, or for a single writer.
        EngineError: as `open_pool`; or a node does not see the store.
        MissingExtraError: as `open_pool`.

    All errors of `extract` are raised too, whichever node they come from.
    """
    require_type(source, PairSource, "source")
    require_spec(spec, ExtractSpec, "spec")
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
    if spec.reuse is not None:
        raise OptionError(
            "--reuse is for an extraction without Ray; leave one of the two out, or extract with "
            "--reuse first"
        )
    require_inputs(source, spec)
    # Absolute: an actor whose node lacks the driver's folder runs in another one.
    files = open_files(store if is_object_url(store) else Path(os.path.abspath(store)))
    # No actor measures: several would not be sure to choose the same precision.
    spec = with_precision(source, files, spec, measure=False)
    plan = plan_table(source, files, spec)
    part_of_folder = {segment.files.place: segment.part for segment in plan.segments}
    make_worker = partial(_Encoding, part_of_folder, spec)
    ray_spec = (cluster or RaySpec()).for_device(spec.device)
    with open_pool(make_worker, ray_spec) as pool:
        # Encoders load before anything is written: one that fails to load leaves no store behind.
        pool.first(LOAD)
        begin = time.perf_counter()
        plan.begin()
        tasks: list[Task] = pool.first(PREPARE)
        totals = _fill(
            pool,
            task_states=[TaskState(task) for task in tasks],
            task_inputs=list(part_of_folder.values()),
            progress=progress,
        )
    return judge(plan, totals=totals, spec=spec, begin=begin)


# --- the driver -----------------------------------------------------------------------------------


def _fill(
    pool: ActorPool,
    task_states: Sequence[TaskState],
    task_inputs: Sequence[Inputs],
    progress: ExtractionProgress,
) -> dict[Modality, ModalityCounts]:
    totals = _totals(task_states, task_inputs)
    last_time = time.perf_counter()
    for total in totals.values():
        progress(total.standing)

    def add_shard(
        task_state: TaskState,
        shard: int,
        names: tuple[str, ...],
        report: ShardReport,
    ) -> None:
        nonlocal last_time
        # Actors work side by side: the time between two commits, not that of one shard, adds up.
        now = time.perf_counter()
        seconds = now - last_time
        last_time = now
        total = totals[task_state.task.modality]
        rows = len(task_state.layout.shard(shard))
        total.done += rows
        total.n_bad += report.n_bad
        for name in names:
            tally = total.tallies[name]
            tally.n_encoded += rows
            tally.n_bytes += rows * tally.layout.row_bytes
            tally.n_truncated += report.n_truncated
            tally.seconds += seconds
        progress(total.standing)

    fill(pool, task_states, add_shard)
    return totals


def _totals(
    task_states: Sequence[TaskState],
    task_inputs: Sequence[Inputs],
) -> dict[Modality, ModalityCounts]:
    """Sum up what is committed already, for each modality."""
    totals: dict[Modality, ModalityCounts] = {}
    for task_state in task_states:
        modality = task_state.task.modality
        rows = sum(len(part if modality == "image" else part.captions) for part in task_inputs)
        total = totals.setdefault(modality, ModalityCounts(modality=modality, rows=rows))
        # Jobs are numbered from 0, and each is one pass over the rows.
        total.passes = max(total.passes, task_state.task.job + 1)
        total.done += task_state.rows_done
        for writer in task_state.writers:
            total.tallies.setdefault(writer.record.name, ArrayCounts(layout=writer.layout))
    return totals


# --- an actor -------------------------------------------------------------------------------------

LOAD = "loading the encoders"
PREPARE = "preparing the arrays"


@dataclass(kw_only=True)
class _Segment:
    """Hold what an actor knows of a segment that it has opened."""

    files: Files
    jobs: dict[tuple[Modality, int], ImageJob | TextJob]
    """By modality and number, as `Task.job` counts them."""


class _Encoding:
    """Keep the loaded encoders of a run, and the segments that were opened.

    Args:
        part_of_folder: the rows of each segment, by the segment's folder or URL.
        spec: the one of the driver.
        cpus: of this actor.
    """

    def __init__(
        self,
        part_of_folder: Mapping[str | Path, Inputs],
        spec: ExtractSpec,
        cpus: int,
    ) -> None:
        torch.set_num_threads(cpus)  # what a new array records
        self.parts = part_of_folder
        self.spec = _on_a_node(spec, cpus)
        self.encoders = open_encoders(self.spec)
        self.totals = new_totals(list(part_of_folder.values()), self.encoders)
        self.opened: dict[str | Path, _Segment] = {}
        self.checked: set[tuple[str | Path, Modality, int]] = set()
        # Decoders stay from one shard to the next: to start processes takes as long as many images.
        self.open_decoders = ExitStack()
        self.decoded_job: ImageJob | None = None
        self.decode: Decode | None = None

    def do(self, piece: str | ShardRequest) -> list[Task] | ShardReport | None:
        """Load (nothing is left to do then), prepare the arrays, or encode one shard."""
        if isinstance(piece, ShardRequest):
            return self._encode(piece)
        if piece == PREPARE:
            tasks: list[Task] = []
            for folder in self.parts:
                tasks += self._prepare(folder)
            return tasks
        return None  # LOAD: the constructor has loaded the encoders

    def _prepare(self, folder: str | Path) -> list[Task]:
        segment = self._segment(folder)
        tasks = []
        for (modality, number), job in segment.jobs.items():
            names = tuple(target.record.name for target in job.targets)
            tasks.append(Task(folder=folder, job=number, modality=modality, names=names))
        return tasks

    def _segment(self, folder: str | Path) -> _Segment:
        """Open a segment, once.

        Raises:
            EngineError: this node does not see what the driver has made.
        """
        if folder not in self.opened:
            if not open_files(folder).exists(PAIRS):
                raise EngineError(
                    f"node {node_name()} does not see {folder}; the store must lie where "
                    "every node reaches it"
                )
            store = FeatureStore.block(open_files(folder))
            jobs = prepare_jobs(
                store,
                part=self.parts[folder],
                encoders=self.encoders,
                spec=self.spec,
                totals=self.totals,
            )
            self.opened[folder] = _Segment(files=store.files, jobs=dict(_numbered(jobs)))
        return self.opened[folder]

    def _encode(self, piece: ShardRequest) -> ShardReport:
        """Encode a shard and commit it to the arrays that lack it."""
        task = piece.task
        segment = self._segment(task.folder)
        job = segment.jobs[task.modality, task.job]
        self._check(task, segment.files, job)
        # Looked up again: an actor may have committed this shard and died before it answered.
        lacking = [
            not segment.files.exists(commit_name(task.modality, name, piece.shard))
            for name in task.names
        ]
        if not any(lacking):
            return ShardReport()
        encoded = self._encoded(job, piece.shard)
        writers = [ArrayWriter(segment.files, target.record) for target in job.targets]
        for target_index, (writer, lacks) in enumerate(zip(writers, lacking, strict=True)):
            if lacks:
                commit_shard(writer, piece.shard, target_index, encoded, job)
        return ShardReport(n_bad=len(encoded.bad), n_truncated=encoded.n_truncated)

    def _encoded(self, job: ImageJob | TextJob, shard: int) -> EncodedShard:
        """Encode one shard, by the decoders of the shard before where it is the same job's."""
        if isinstance(job, TextJob):
            (encoded,) = job.shards([shard], lambda _: None)
            return encoded
        if job is not self.decoded_job:
            self._close_decoders()
            self.decode = self.open_decoders.enter_context(job.decoders())
            self.decoded_job = job
        assert self.decode is not None
        try:
            (encoded,) = job.shards_by(self.decode, [shard], lambda _: None)
        except BaseException:
            # Images that have been asked for would be taken for those of the next shard.
            self._close_decoders()
            raise
        return encoded

    def _close_decoders(self) -> None:
        self.decoded_job = None
        self.open_decoders.close()

    def _check(self, task: Task, files: Files, job: ImageJob | TextJob) -> None:
        """Check, once for each job, that this node encodes what is committed already.

        Raises:
            MismatchError: it encodes something else.
        """
        key = task.folder, task.modality, task.job
        if key not in self.checked:
            for target_index in range(len(job.targets)):
                spot_check(files, job, target_index)
            self.checked.add(key)


def _numbered(
    jobs: Sequence[ImageJob | TextJob],
) -> Iterator[tuple[tuple[Modality, int], ImageJob | TextJob]]:
    """Number the jobs of each modality from 0, in an order that is the same in every actor."""
    next_number: Counter[Modality] = Counter()
    for job in jobs:
        modality = job.targets[0].record.modality
        yield (modality, next_number[modality]), job
        next_number[modality] += 1


def _on_a_node(spec: ExtractSpec, cpus: int) -> ExtractSpec:
    """Set as many decoding processes as an actor has cores for, unless `spec` gives a number."""
    return replace(spec, workers=default_workers(cpus)) if spec.workers is None else spec
