"""Repair a store: make exactly what is damaged again, by the ordinary extraction.

A damaged shard is un-committed durably (seal first, then its record), so that an interrupted repair
leaves an incomplete store, never a wrong one. Then the pending shards are encoded as always. Zarr's
metadata is written again from the records, the pair table from the user's table.
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
from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.extraction.run import (
    ExtractionProgress,
    ExtractSpec,
    OpenEncoders,
    extract_pending,
    open_encoders,
)
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
    store: str | Path,
    source: PairSource,
    spec: ExtractSpec | None = None,
    progress: ExtractionProgress = lambda *_: None,
) -> RepairReport:
    """Verify a store, make what is damaged again, and verify it once more.

    Shards that an interrupted repair (or a killed extraction) has left without a record are encoded
    as well.

    Args:
        source: what the store was made from, opened with the same options.
        spec: device, workers, and encoders that have moved (`image`, `text`); everything else is
            taken from the store.

    Raises:
        StoreError: no store; or both an array's fingerprint and its copy are lost, so that the
            array cannot be identified.
        MismatchError: the table or an encoder is not that of the store; nothing was un-committed.
    """
    spec = spec or ExtractSpec()
    files = open_files(store, spec.single_writer)
    require_store(files)
    files.prepare()
    shards: dict[str, tuple[int, ...]] = {}
    objects = [*_mend_fingerprints(files), *_mend_sources(source, files)]
    # The last segment first: the store opens only when all of its segments do.
    for segment in reversed(split_source(source, files)):
        encoded_shards, rewritten = _repair_segment(segment, spec, progress)
        for array, damaged in encoded_shards.items():
            shards[_below(segment.folder, array)] = damaged
        objects += [_below(segment.folder, name) for name in rewritten]
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
                mended.append(_below(folder, fingerprint_name))
    return mended


def _below(folder: str, name: str) -> str:
    """Return an object's name within the store; `folder` is that of its segment."""
    return f"{folder}/{name}" if folder else name


def _mend_sources(source: PairSource, store: Files) -> list[str]:
    """Restore lost claims of segments to the table, and return their names.

    The table cannot be divided into segments without them.
    """
    first_image = 0
    mended = list[str]()
    recorded = {f"{SEGMENTS}/{name.removesuffix('.json')}" for name in store.list(SEGMENT_RECORDS)}
    folders = sorted({*begun_segments(store), *recorded})
    for folder in ("", *folders):
        files = store.child(folder)
        try:
            n_images = read_record(files, SOURCE)["n_images"]
        except DamagedError:
            # Nothing else tells how long the last segment is: it gets all remaining images.
            n_images = _n_images(store, folder, len(source) - first_image)
            segment_source = source.part(first_image, first_image + n_images)
            restore_source(files, pair_columns(segment_source), segment_source.media.place)
            mended.append(_below(folder, SOURCE))
        first_image += n_images
    segment_names = [folder.rpartition("/")[2] for folder in folders]
    return mended + restore_segment_records(store, segment_names)


def _n_images(store: Files, folder: str, otherwise: int) -> int:
    """Count the images of a segment that has lost its own record of them.

    Args:
        folder: of the segment.
        otherwise: what to return if nothing in the store tells the count.
    """
    with contextlib.suppress(DamagedError):
        record_name = segment_record_name(folder.rpartition("/")[2])
        n_images: int = read_record(store, record_name)["n_images"]
        return n_images
    files = store.child(folder)
    # Every array of image features has one row for each image.
    for name in files.list("records/image"):
        fingerprint = read_record(files, f"{records_folder('image', name)}/fingerprint.json")
        n_rows: int = fingerprint["layout"]["rows"]
        return n_rows
    return otherwise


def _repair_segment(
    segment: Segment,
    spec: ExtractSpec,
    progress: ExtractionProgress,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Repair one segment.

    Returns:
        For each array the shards that were encoded again, and the names of other objects that were
        written again.
    """
    files = segment.files
    harmful: list[Problem] = []
    for problem in verify_segment(files).problems:
        # Pending shards are no damage, but are encoded as well.
        if problem.harmful or problem.kind in ("unsealed", "uncommitted"):
            harmful.append(problem)
    objects = _mend_table(files, harmful, segment.part) + _mend_metadata(files, harmful)
    shards = _damaged_shards(harmful)
    # All encoders are loaded and compared before the first shard is un-committed.
    ready: list[tuple[ExtractSpec, OpenEncoders]] = []
    for modality, name in shards:
        record = FeatureStore.at(files).array(modality, name).record
        ready.append(_ready(record, spec))
    encoded_shards: dict[str, tuple[int, ...]] = {}
    for (modality, name), damaged in shards.items():
        uncommit(files, modality=modality, name=name, shards=damaged)
        encoded_shards[f"{modality}/{name}"] = tuple(damaged)
    for array_spec, encoders in ready:
        extract_pending(segment, encoders=encoders, spec=array_spec, progress=progress)
    return encoded_shards, objects


def _mend_table(files: Files, problems: list[Problem], source: PairSource) -> list[str]:
    """Make the pair table, its records, the README and Zarr's root metadata again.

    They come from the user's table. Returns the names of the damaged objects.
    """
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
    """Write Zarr's metadata files of arrays again, and return the names of the damaged ones."""
    damaged_names: list[str] = []
    damaged_arrays: set[tuple[Modality, str]] = set()
    for problem in problems:
        is_metadata = problem.shard is None and problem.object.endswith("zarr.json")
        if problem.array and is_metadata:
            damaged_names.append(problem.object)
            damaged_arrays.add(problem.array)
    opened = FeatureStore.at(files)
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
