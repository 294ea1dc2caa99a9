"""Copies of a store: from object storage to a disk for many runs, or the other way, verified at the
end."""

from collections.abc import Iterator
from pathlib import Path

from apecache.errors import DamagedError, StoreError
from apecache.fingerprint import content_hash
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.open import open_files
from apecache.store.layout import PAIRS, SEGMENTS, SOURCE, ZARR
from apecache.store.reader import FeatureStore, segment_names
from apecache.store.verify import VerifyReport, verify_files


def copy_store(store: str | Path, to: str | Path, alone: bool = False) -> VerifyReport:
    """Copy every object of a store, and verify the copy. What an earlier copy has brought is not
    fetched again.

    A new copy cannot be opened before all of it is there. `alone`: nobody else writes to `to`, see
    `open_files`.

    Raises:
        StoreError: no store, or `to` holds something else. DamagedError: the copy does not verify.
    """
    opened = FeatureStore.open(store)
    target = open_files(to, alone)
    names = [name for name in opened.files.sizes("") if not _is_temporary(name)]
    there = {name for name in target.sizes("") if not _is_temporary(name)}
    if strange := sorted(there - set(names)):
        raise StoreError(
            f"{target.place} holds {strange[0]}, which {store} does not; give another place "
            "for the copy"
        )
    target.prepare()
    if (there and SOURCE not in there) or not _claim(opened.files, target):
        raise StoreError(f"{target.place} holds another store; give another place for the copy")
    hashes = dict(_recorded_hashes(opened))
    for name in sorted(names, key=lambda name: (name.endswith(PAIRS), name == PAIRS, name)):
        if name not in there or hashes.get(name) != content_hash(target.read(name)):
            target.write(name, opened.files.read(name))
    target.remove_temporary("records", ZARR, SEGMENTS)
    report = verify_files(target)
    for problem in report.problems:
        if problem.harmful:
            raise DamagedError(
                f"{target.place}: {problem.object}: {problem.detail}; try apecache verify {store}"
            )
    return report


def _claim(source: Files, target: Files) -> bool:
    """Whether the target is nobody else's."""
    claim = source.read(SOURCE)
    return target.create(SOURCE, claim) or target.read(SOURCE) == claim


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


def _recorded_hashes(store: FeatureStore, prefix: str = "") -> Iterator[tuple[str, str]]:
    """BLAKE3 of the objects of all shards, by name from the store's root."""
    for array in store.arrays():
        for commit in array.commits.values():
            yield from ((f"{prefix}{name}", entry.blake3) for name, entry in commit.objects.items())
    for segment, name in zip(store.segments, segment_names(store.files), strict=True):
        yield from _recorded_hashes(segment, f"{SEGMENTS}/{name}/")
