"""Repair a store: make exactly what is damaged again, by the ordinary extraction.

A damaged shard is un-committed durably (seal first, then its record), so that an interrupted repair
leaves an incomplete store, never a wrong one. Then the pending shards are encoded as always. Zarr's
metadata is written again from the records, tables and views from the user's table and from one
another.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_place, require_spec, require_type
from apecache.data.augment import views_from_json
from apecache.data.pairs import PairSource
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.extraction.lost_tables import LostTables, below, mend_view_records, mend_views
from apecache.extraction.run import (
    ExtractionProgress,
    ExtractSpec,
    OpenEncoders,
    extract_pending,
    open_encoders,
)
from apecache.extraction.segments import Segment
from apecache.fingerprint import Modality, describe_difference
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.layout import (
    SOURCE,
    STAMPS,
    VIEW_RECORDS,
    VIEWS,
    ArrayRecord,
    records_folder,
)
from apecache.store.maintenance import (
    require_store,
    restore_fingerprint,
    rewrite_metadata,
    uncommit,
    unmake_table,
)
from apecache.store.problem import Problem
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.verify import (
    VerifyReport,
    array_names,
    begun_segments,
    verify_files,
    verify_segment,
)
from apecache.store.writer import create_store


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """Say what a repair did."""

    store: str | Path
    shards: dict[str, tuple[int, ...]]
    """For each array the shards that were encoded again."""
    objects: tuple[str, ...]
    """Other objects that were written again."""
    after: VerifyReport

    @property
    def nothing_to_do(self) -> bool:
        return not self.shards and not self.objects


def repair(
    store: AnyPath,
    source: PairSource,
    spec: ExtractSpec | None = None,
    progress: ExtractionProgress = lambda *_: None,
) -> RepairReport:
    """Verify a store, make what is damaged again, and verify it once more.

    Shards that an interrupted repair (or a killed extraction) has left without a record are encoded
    as well.

    Args:
        source: the table of a view, opened with the same options: where the images are, and what is
            needed to make a lost table again.
        spec: device, workers, and encoders that have moved (`image`, `text`); everything else is
            taken from the store.

    Raises:
        StoreError: no store; or both an array's fingerprint and its copy are lost, so that the
            array cannot be identified.
        MismatchError: an encoder is not that of the store, or a table is lost that cannot be made
            again from `source`; nothing was un-committed.
    """
    store_place = as_place(store, "store")
    require_type(source, PairSource, "source")
    require_spec(spec, ExtractSpec, "spec", optional=True)
    spec = spec or ExtractSpec()
    files = open_files(store_place, spec.single_writer)
    require_store(files)
    files.prepare()
    tables = LostTables(files=files, source=source)
    shards: dict[str, tuple[int, ...]] = {}
    objects = [
        *mend_view_records(files),
        *_mend_fingerprints(files),
        *tables.mend_sources(),
    ]
    # The last block first: the store opens only when all of its blocks do.
    for folder in reversed(tables.folders()):
        encoded_shards, rewritten = _repair_segment(tables, folder, spec, progress)
        for array, damaged in encoded_shards.items():
            shards[below(folder, array)] = damaged
        objects += [below(folder, name) for name in rewritten]
    objects += mend_views(tables)
    return RepairReport(
        store=files.place,
        shards=shards,
        objects=tuple(objects),
        after=verify_files(files),
    )


def _mend_fingerprints(store: Files) -> list[str]:
    """Restore lost fingerprints of all segments from their copies, and return their names.

    Without its fingerprint nothing else of an array can be verified.
    """
    mended = []
    for folder in ("", *begun_segments(store)):
        files = store.child(folder)
        for modality, name in array_names(files):
            fingerprint_name = f"{records_folder(modality, name)}/fingerprint.json"
            try:
                read_record(files, fingerprint_name)
            except DamagedError:
                restore_fingerprint(files, modality, name)
                mended.append(below(folder, fingerprint_name))
    return mended


def _repair_segment(
    tables: LostTables,
    folder: str,
    spec: ExtractSpec,
    progress: ExtractionProgress,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Repair one block.

    Returns:
        For each array the shards that were encoded again, and the names of other objects that were
        written again.
    """
    files = tables.files.child(folder)
    harmful: list[Problem] = []
    for problem in verify_segment(files).problems:
        # Pending shards are no damage, but are encoded as well.
        is_of_view = problem.object.startswith((f"{VIEWS}/", f"{VIEW_RECORDS}/", STAMPS))
        if not is_of_view and (problem.harmful or problem.kind in ("unsealed", "uncommitted")):
            harmful.append(problem)
    objects = _mend_table(tables, folder, harmful) + _mend_metadata(files, harmful)
    shards = _damaged_shards(harmful)
    # All encoders are loaded and compared before the first shard is un-committed.
    ready: list[tuple[ExtractSpec, OpenEncoders]] = []
    for modality, name in shards:
        record = FeatureStore.block(files).array(modality, name).record
        ready.append(_ready(record, spec))
    encoded_shards: dict[str, tuple[int, ...]] = {}
    if shards:
        # Before records are removed: they say what each image must be.
        segment = Segment(store=tables.files, folder=folder, part=tables.inputs(folder))
        for (modality, name), damaged in shards.items():
            uncommit(files, modality=modality, name=name, shards=damaged)
            encoded_shards[f"{modality}/{name}"] = tuple(damaged)
        for array_spec, encoders in ready:
            extract_pending(segment, encoders=encoders, spec=array_spec, progress=progress)
    return encoded_shards, objects


def _mend_table(tables: LostTables, folder: str, problems: list[Problem]) -> list[str]:
    """Make the table of a block, its records, the README and Zarr's root metadata again.

    Returns the names of the damaged objects.
    """
    files = tables.files.child(folder)
    names = [problem.object for problem in problems if problem.array is None]
    if names:
        columns = tables.columns(folder, read_record(files, SOURCE)["digest"])
        unmake_table(files)
        create_store(
            files,
            pairs=columns,
            root=tables.source.media.place,
            version=version("apecache"),
        )
    return names


def _mend_metadata(files: Files, problems: list[Problem]) -> list[str]:
    """Write Zarr's metadata files of arrays again, and return the names of the damaged ones."""
    damaged_names: list[str] = []
    damaged_arrays: set[tuple[Modality, str]] = set()
    for problem in problems:
        is_metadata = problem.shard is None and problem.object.endswith("zarr.json")
        if problem.array and is_metadata:
            damaged_names.append(problem.object)
            damaged_arrays.add(problem.array)
    opened = FeatureStore.block(files)
    for modality, name in damaged_arrays:
        rewrite_metadata(opened.files, opened.array(modality, name).record)
    return damaged_names


def _damaged_shards(problems: Iterable[Problem]) -> dict[tuple[Modality, str], list[int]]:
    """Return the shards to encode again, by array."""
    shards: dict[tuple[Modality, str], set[int]] = defaultdict(set)
    for problem in problems:
        if problem.array and problem.object.endswith("/seal.json"):
            # No shard is to be encoded, but the array has to be sealed again.
            shards[problem.array].update(())
        elif problem.array and problem.shard is not None:
            shards[problem.array].add(problem.shard)
    return {array: sorted(damaged) for array, damaged in shards.items()}


def _ready(record: ArrayRecord, spec: ExtractSpec) -> tuple[ExtractSpec, OpenEncoders]:
    """Return the recorded settings of an array, and load its encoder.

    Raises:
        MismatchError: it is not the encoder that the array was made by.
    """
    if "import" in record.fingerprint.fields:
        raise StoreError(
            f"{record.modality}/{record.name} was imported, so no encoder makes it again; write "
            "its damaged shards from the source: the same apecache import with --recheck"
        )
    moved: EncoderSpec | None = getattr(spec, record.modality)
    encoder_spec = record.spec if moved is None else record.spec.with_name(str(moved))
    storage_dtype: Any = record.layout.dtype
    views = record.fingerprint.fields.get("views")
    # Other arrays of the store stay, and its unreadable rows were accepted when it was made.
    array_spec = replace(
        spec,
        image=encoder_spec if record.modality == "image" else None,
        text=encoder_spec if record.modality == "text" else None,
        add=True,
        max_bad=1.0,
        storage_dtype=storage_dtype,
        views=None if views is None else views_from_json(views),
    )
    encoders = open_encoders(array_spec)
    encoder = encoders.image[0] if record.modality == "image" else encoders.text[0]
    differences = encoder.fingerprint.difference(record.encoder)
    if differences:
        raise MismatchError(
            f"{record.modality}/{record.name} was made by another encoder than {encoder_spec}: "
            f"{describe_difference(differences)}; give the one that it was made by as "
            f"--{record.modality}",
            differences,
        )
    return array_spec, encoders
