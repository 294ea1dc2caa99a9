"""Remove and restore objects of a store, in an order that may be interrupted at any time."""

import contextlib
import json
from collections.abc import Iterable, Mapping

from apecache.errors import DamagedError, MismatchError, StoreError, nearest
from apecache.fingerprint import Json, Modality
from apecache.storage.files import Files
from apecache.store.layout import (
    PAIRS,
    SEGMENTS,
    SOURCE,
    ZARR,
    ArrayRecord,
    array_folder,
    commit_name,
    described_record,
    records_folder,
    segment_record_name,
)
from apecache.store.reader import has_arrays
from apecache.store.records import read_record, seal_record
from apecache.store.writer import PairColumns, source_bytes


def require_store(files: Files) -> None:
    """Raise StoreError unless there is something that only a store has."""
    if not (files.exists(SOURCE) or files.exists(PAIRS) or has_arrays(files)):
        raise StoreError(f"{files.place} is not a store (make one with: apecache extract)")


def uncommit(files: Files, modality: Modality, name: str, shards: Iterable[int]) -> None:
    """Make shards pending again; their chunks stay until they are rewritten."""
    # The seal first: a sealed array without a record would count as damaged.
    files.remove(f"{records_folder(modality, name)}/seal.json")
    for shard in shards:
        files.remove(commit_name(modality, name, shard))


def rewrite_metadata(files: Files, record: ArrayRecord) -> None:
    """Write Zarr's metadata files of an array again, as they were when it was created."""
    for path, text in record.metadata.items():
        files.write(f"{array_folder(record.modality, record.name)}/{path}", text.encode())


def restore_source(files: Files, pairs: PairColumns, root: str) -> None:
    """Write a lost source record again, after a check that the store belongs to the table.

    Raises:
        MismatchError: The store's other records are of another table.
    """
    records = [PAIRS]
    for modality, array_name in recorded_arrays(files):
        records.append(f"{records_folder(modality, array_name)}/fingerprint.json")
    for name in records:
        # A damaged record tells nothing about the table: the others decide.
        with contextlib.suppress(DamagedError):
            record = read_record(files, name)
            # The record of pairs is of the table itself, an array's record names its table.
            pairs_digest = record.get("digest") if name == PAIRS else None
            if record.get("table", pairs_digest) != pairs.digest:
                raise MismatchError(
                    f"{files.place} was made from another table than {pairs.origin} ({name})"
                )
    files.write(SOURCE, source_bytes(pairs, root))


def restore_claim(
    files: Files,
    identity: Mapping[str, Json],
    origin: str,
    root: str,
    options: Mapping[str, Json],
) -> None:
    """Write the lost source record of a block again, from what another record says of it."""
    body: dict[str, Json] = {**identity, "origin": origin, "root": root}
    if options:
        body["options"] = dict(options)
    files.write(SOURCE, seal_record(SOURCE, body, of_view=identity.get("view_only") is True))


def recorded_arrays(files: Files) -> list[tuple[Modality, str]]:
    """Return (modality, name) of every array that has records, images first."""
    modalities: tuple[Modality, ...] = ("image", "text")
    arrays: list[tuple[Modality, str]] = []
    for modality in modalities:
        arrays += [(modality, name) for name in files.list(f"records/{modality}")]
    return arrays


def restore_segment_records(files: Files, segments: Iterable[str]) -> list[str]:
    """Write lost records of appended segments again, from the segments' own records.

    Returns:
        Names of the records.
    """
    restored = []
    for segment in segments:
        name = segment_record_name(segment)
        try:
            read_record(files, name)
        except DamagedError:
            source = read_record(files.child(f"{SEGMENTS}/{segment}"), SOURCE)
            keys = ("digest", "n_images", "n_texts", "view_only")
            identity = {key: source[key] for key in keys if key in source}
            is_view_only = source.get("view_only") is True
            files.write(name, seal_record(name, identity, of_view=is_view_only))
            restored.append(name)
    return restored


def restore_fingerprint(files: Files, modality: Modality, name: str) -> None:
    """Write a lost `fingerprint.json` again, from its copy in the attributes of the Zarr group.

    Raises:
        StoreError: The copy is lost too, so that nobody knows what the features are.
    """
    record_name = f"{records_folder(modality, name)}/fingerprint.json"
    try:
        group = json.loads(files.read(f"{array_folder(modality, name)}/zarr.json"))
        record = described_record(modality, name, group["attributes"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(
            f"{files.where(record_name)} and its copy in Zarr's attributes are lost, so nobody "
            "knows what these features "
            f"are; apecache remove STORE {modality}/{name}, and extract again"
        ) from None
    files.write(record_name, seal_record(record_name, record.to_json()))


def unmake_table(files: Files) -> None:
    """Make the pair table pending: the next extraction writes it and Zarr's root metadata again."""
    files.remove(PAIRS)


def remove_array(files: Files, modality: Modality, name: str) -> Mapping[str, int]:
    """Remove an array, data and records.

    Returns:
        Number of removed "objects" and "bytes".
    """
    data = array_folder(modality, name)
    records = records_folder(modality, name)
    object_bytes = [*files.sizes(data).values(), *files.sizes(records).values()]
    # Seal and commits go first and the fingerprint last. If this is interrupted, the array has no
    # shards, and removing it again finishes the work.
    files.remove(f"{records}/seal.json")
    for file in files.list(f"{records}/commits"):
        files.remove(f"{records}/commits/{file}")
    for folder in (data, f"{records}/quarantine", f"{records}/commits"):
        files.remove_folder(folder)
    files.remove(f"{records}/fingerprint.json")
    files.remove_folder(records)
    return {"objects": len(object_bytes), "bytes": sum(object_bytes)}


def find_array(files: Files, name: str) -> tuple[Modality, str]:
    """Find an array by `NAME`, `image/NAME` or `text/NAME`, complete or not.

    Raises:
        StoreError: There is not a store, it has a newer format, or there is no such array or one of
            each modality.
    """
    require_store(files)
    for record in (SOURCE, PAIRS):
        # An array can be removed from a damaged store, but not from one of a newer format.
        with contextlib.suppress(DamagedError):
            read_record(files, record)
    modalities: tuple[Modality, ...] = ("image", "text")
    names = []
    matches: list[tuple[Modality, str]] = []
    folders = ["", *(f"{SEGMENTS}/{segment}/" for segment in files.list(SEGMENTS))]
    for modality in modalities:
        arrays: set[str] = set()
        for folder in folders:
            # Either of the two may be lost.
            arrays.update(files.list(f"{folder}records/{modality}"))
            arrays.update(files.list(f"{folder}{ZARR}/{modality}"))
        for array in sorted(arrays - {"zarr.json"}):
            names.append(f"{modality}/{array}")
            if name in (array, f"{modality}/{array}"):
                matches.append((modality, array))
    if len(matches) != 1:
        problem = "several arrays are called" if matches else "no features"
        raise StoreError(
            f"{files.place}: {problem} {name!r}; there are "
            f"{', '.join(names) or 'none'}{nearest(name, names)}"
        )
    return matches[0]
