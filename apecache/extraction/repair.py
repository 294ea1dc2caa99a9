"""Repair: exactly what is damaged is made again, by the ordinary extraction.

A damaged shard is un-committed durably (seal first, then its record), so that a repair that is
itself interrupted leaves an incomplete store, never a wrong one; then the pending shards are
encoded as always. Zarr's metadata is written again from the records, the pair table from the user's
table.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apecache.data.augment import views_from_json
from apecache.data.pairs import PairSource
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DamagedError, MismatchError
from apecache.extraction.run import Encoders, ExtractSpec, Progress, extract_pending, load_encoders
from apecache.extraction.segments import Segment, pair_columns, split_source
from apecache.fingerprint import Modality, describe_difference
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.layout import (
    SEGMENT_RECORDS,
    SEGMENTS,
    SOURCE,
    ArrayRecord,
    records_folder,
    segment_record_name,
)
from apecache.store.maintenance import (
    require_store,
    restore_fingerprint,
    restore_segment_records,
    restore_source,
    rewrite_metadata,
    uncommit,
    unmake_table,
)
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.verify import (
    Problem,
    VerifyReport,
    array_names,
    begun_segments,
    verify_files,
    verify_segment,
)
from apecache.store.writer import create_store


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """`shards`: per array the shards that were encoded again. `objects`: other objects that were
    written again."""

    store: str | Path
    shards: dict[str, tuple[int, ...]]
    objects: tuple[str, ...]
    after: VerifyReport

    @property
    def nothing_to_do(self) -> bool:
        return not self.shards and not self.objects


def repair(
    store: str | Path,
    source: PairSource,
    spec: ExtractSpec | None = None,
    progress: Progress = lambda *_: None,
) -> RepairReport:
    """Verify a store, make what is damaged again, and verify it once more.

    Shards that an interrupted repair (or a killed extraction) has left without a record are encoded
    as well.

    Args:
        source: what the store was made from, opened with the same options.
        spec: device, workers, and encoders that have moved (`image`, `text`); everything else is
            taken from the store.

    Raises:
        StoreError: no store; or an array's fingerprint and its copy are lost, so that nobody knows
            what it was.
        MismatchError: the table or an encoder is not that of the store; nothing was un-committed.
    """
    spec = spec or ExtractSpec()
    files = open_files(store, spec.single_writer)
    require_store(files)
    files.prepare()
    shards: dict[str, tuple[int, ...]] = {}
    objects = [*_mend_fingerprints(files), *_mend_sources(source, files)]
    # The last first: the store opens only when all of its segments do.
    for segment in reversed(split_source(source, files)):
        again, rewritten = _repair_segment(segment, spec, progress)
        shards |= {_below(segment.folder, array): damaged for array, damaged in again.items()}
        objects += [_below(segment.folder, name) for name in rewritten]
    return RepairReport(
        store=files.place,
        shards=shards,
        objects=tuple(objects),
        after=verify_files(files),
    )


def _mend_fingerprints(store: Files) -> list[str]:
    """Lost fingerprints of all segments, from their copy: without them nothing else of an array can
    be verified."""
    mended = []
    for folder in ("", *begun_segments(store)):
        files = store.child(folder)
        for modality, name in array_names(files):
            where = f"{records_folder(modality, name)}/fingerprint.json"
            try:
                read_record(files, where)
            except DamagedError:
                restore_fingerprint(files, modality, name)
                mended.append(_below(folder, where))
    return mended


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _mend_sources(source: PairSource, store: Files) -> list[str]:
    """Lost claims to the table, so that it can be divided into segments; returns those that were
    written again. How many images a segment has, its image features still know; the last one has
    the rest."""
    first = 0
    mended = list[str]()
    recorded = {f"{SEGMENTS}/{name.removesuffix('.json')}" for name in store.list(SEGMENT_RECORDS)}
    segments = sorted({*begun_segments(store), *recorded})
    for folder in ("", *segments):
        files = store.child(folder)
        try:
            count = read_record(files, SOURCE)["n_images"]
        except DamagedError:
            count = _n_images(store, folder, len(source) - first)
            part = source.part(first, first + count)
            restore_source(files, pair_columns(part), part.media.place)
            mended.append(_below(folder, SOURCE))
        first += count
    return mended + restore_segment_records(
        store,
        [folder.rpartition("/")[2] for folder in segments],
    )


def _n_images(store: Files, folder: str, otherwise: int) -> int:
    """How many images a segment has that has lost its own record of it."""
    with contextlib.suppress(DamagedError):
        count: int = read_record(store, segment_record_name(folder.rpartition("/")[2]))["n_images"]
        return count
    files = store.child(folder)
    for name in files.list("records/image"):
        rows: int = read_record(files, f"{records_folder('image', name)}/fingerprint.json")[
            "layout"
        ]["rows"]
        return rows
    return otherwise


def _repair_segment(
    segment: Segment,
    spec: ExtractSpec,
    progress: Progress,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shards that were encoded again by array, and other objects that were written again."""
    files = segment.files
    problems = verify_segment(files).problems
    harmful = [
        problem
        for problem in problems
        if problem.harmful or problem.kind in ("unsealed", "uncommitted")
    ]
    objects = _mend_table(files, harmful, segment.part) + _mend_metadata(files, harmful)
    shards = _damaged_shards(harmful)
    ready = [_ready(FeatureStore.at(files).array(*array).record, spec) for array in shards]
    for (modality, name), damaged in shards.items():
        uncommit(files, modality=modality, name=name, shards=damaged)
    for again, encoders in ready:
        extract_pending(segment, encoders=encoders, spec=again, progress=progress)
    return {
        f"{modality}/{name}": tuple(damaged) for (modality, name), damaged in shards.items()
    }, objects


def _mend_table(files: Files, problems: list[Problem], source: PairSource) -> list[str]:
    """The pair table, its records, the README and Zarr's root metadata, from the user's table."""
    names = [problem.object for problem in problems if problem.array is None]
    if names:
        unmake_table(files)
        create_store(
            files,
            pairs=pair_columns(source),
            root=source.media.place,
            version=version("apecache"),
        )
    return names


def _mend_metadata(files: Files, problems: list[Problem]) -> list[str]:
    """Zarr's metadata files of arrays, from their records."""
    names = [p for p in problems if p.array and p.shard is None and p.object.endswith("zarr.json")]
    opened = FeatureStore.at(files)
    for array in {problem.array for problem in names if problem.array}:
        rewrite_metadata(opened.files, opened.array(*array).record)
    return [problem.object for problem in names]


def _damaged_shards(problems: Iterable[Problem]) -> dict[tuple[Modality, str], list[int]]:
    """Shards to encode again; an array whose seal alone is damaged stands with none."""
    shards: dict[tuple[Modality, str], set[int]] = defaultdict(set)
    for problem in problems:
        if problem.array and problem.object.endswith("/seal.json"):
            shards[problem.array].update(())
        elif problem.array and problem.shard is not None:
            shards[problem.array].add(problem.shard)
    return {array: sorted(damaged) for array, damaged in shards.items()}


def _ready(record: ArrayRecord, spec: ExtractSpec) -> tuple[ExtractSpec, Encoders]:
    """The recorded settings and the loaded encoder: that it is the same is known before anything is
    un-committed.

    Raises:
        MismatchError: it is another one.
    """
    moved: EncoderSpec | None = getattr(spec, record.modality)
    chosen = record.spec if moved is None else record.spec.with_name(str(moved))
    image, text = (chosen if record.modality == kind else None for kind in ("image", "text"))
    storage: Any = record.layout.dtype
    views = record.fingerprint.fields.get("views")
    about: dict[str, Any] = {
        "storage_dtype": storage,
        "views": None if views is None else views_from_json(views),
    }
    again = replace(spec, image=image, text=text, add=True, max_bad=1.0, **about)
    encoders = load_encoders(again)
    (found,) = (
        encoder.fingerprint for group in (encoders.image, encoders.text) for encoder in group
    )
    differences = found.difference(record.encoder)
    if differences:
        raise MismatchError(
            f"{record.modality}/{record.name} was made by another encoder than {chosen}: "
            f"{describe_difference(differences)}; give the one that it was made by as "
            f"--{record.modality}",
            differences,
        )
    return again, encoders
