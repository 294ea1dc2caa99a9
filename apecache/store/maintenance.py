"""Taking things out of a store, in an order that leaves it right whenever it is interrupted."""

import contextlib
import json
from collections.abc import Iterable, Mapping

from apecache.errors import DamagedError, MismatchError, StoreError, nearest
from apecache.fingerprint import Modality
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
    """Raises StoreError unless something is there that only a store has."""
    if not (files.exists(SOURCE) or files.exists(PAIRS) or has_arrays(files)):
        raise StoreError(f"{files.place} is no store (make one with: apecache extract)")


def uncommit(files: Files, modality: Modality, name: str, shards: Iterable[int]) -> None:
    """Make shards pending again: the seal goes first, then each record; the chunks stay until they
    are rewritten."""
    files.remove(f"{records_folder(modality, name)}/seal.json")
    for shard in shards:
        files.remove(commit_name(modality, name, shard))


def rewrite_metadata(files: Files, record: ArrayRecord) -> None:
    """Write Zarr's metadata files of an array as they were when it was created."""
    for path, text in record.metadata.items():
        files.write(f"{array_folder(record.modality, record.name)}/{path}", text.encode())


def restore_source(files: Files, pairs: PairColumns, root: str) -> None:
    """Write a lost source record again, for the table that the rest of the store is of.

    Raises:
        MismatchError: the store's other records are of another table.
    """
    records = [
        PAIRS,
        *(f"{records_folder(*array)}/fingerprint.json" for array in recorded_arrays(files)),
    ]
    for name in records:
        with contextlib.suppress(DamagedError):
            record = read_record(files, name)
            if record.get("table", record.get("digest") if name == PAIRS else None) != pairs.digest:
                raise MismatchError(
                    f"{files.place} was made from another table than {pairs.origin} ({name})"
                )
    files.write(SOURCE, source_bytes(pairs, root))


def recorded_arrays(files: Files) -> list[tuple[Modality, str]]:
    kinds: tuple[Modality, ...] = ("image", "text")
    return [(kind, name) for kind in kinds for name in files.list(f"records/{kind}")]


def restore_segment_records(files: Files, segments: Iterable[str]) -> list[str]:
    """Write lost records of appended segments again, from the segments' own; returns the names of
    the records."""
    mended = []
    for segment in segments:
        name = segment_record_name(segment)
        try:
            read_record(files, name)
        except DamagedError:
            source = read_record(files.child(f"{SEGMENTS}/{segment}"), SOURCE)
            files.write(
                name,
                seal_record(name, {key: source[key] for key in ("digest", "n_images", "n_texts")}),
            )
            mended.append(name)
    return mended


def restore_fingerprint(files: Files, modality: Modality, name: str) -> None:
    """Write a lost `fingerprint.json` again, from what the attributes of the Zarr group repeat of
    it.

    Raises:
        StoreError: they are lost too, so that nobody knows what the features are.
    """
    where = f"{records_folder(modality, name)}/fingerprint.json"
    try:
        group = json.loads(files.read(f"{array_folder(modality, name)}/zarr.json"))
        record = described_record(modality, name, group["attributes"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(
            f"{files.where(where)} and its copy in Zarr's attributes are lost, so nobody knows "
            "what these features "
            f"are; apecache remove STORE {modality}/{name}, and extract again"
        ) from None
    files.write(where, seal_record(where, record.to_json()))


def unmake_table(files: Files) -> None:
    """Make the pair table pending again: the next extraction writes it and Zarr's root metadata
    anew."""
    files.remove(PAIRS)


def remove_array(files: Files, modality: Modality, name: str) -> Mapping[str, int]:
    """Remove an array, data and records; returns {"objects", "bytes"} that went.

    Seal and commits go first and the fingerprint last: interrupted, it is an array without shards,
    and removing it again finishes the work.
    """
    folders = [array_folder(modality, name), records_folder(modality, name)]
    sizes = [size for folder in folders for size in files.sizes(folder).values()]
    last = f"{folders[1]}/fingerprint.json"
    files.remove(f"{folders[1]}/seal.json")
    for file in files.list(f"{folders[1]}/commits"):
        files.remove(f"{folders[1]}/commits/{file}")
    for folder in (folders[0], f"{folders[1]}/quarantine", f"{folders[1]}/commits"):
        files.remove_folder(folder)
    files.remove(last)
    files.remove_folder(folders[1])
    return {"objects": len(sizes), "bytes": sum(sizes)}


def find_array(files: Files, name: str) -> tuple[Modality, str]:
    """`NAME`, `image/NAME` or `text/NAME` of an array that is there, whole or not.

    Raises:
        StoreError: no store, one of a newer format, no such array, or one of each modality.
    """
    require_store(files)
    for record in (SOURCE, PAIRS):
        with contextlib.suppress(DamagedError):  # an array can be removed from a damaged store
            read_record(files, record)
    kinds: tuple[Modality, ...] = ("image", "text")
    there = [
        (kind, array)
        for kind in kinds
        for array in sorted(
            {*files.list(f"records/{kind}"), *files.list(f"{ZARR}/{kind}")} - {"zarr.json"}
        )
    ]
    found = [(kind, array) for kind, array in there if name in (array, f"{kind}/{array}")]
    if len(found) != 1:
        names = [f"{kind}/{array}" for kind, array in there]
        what = "several arrays are called" if found else "no features"
        raise StoreError(
            f"{files.place}: {what} {name!r}; there are "
            f"{', '.join(names) or 'none'}{nearest(name, names)}"
        )
    return found[0]
