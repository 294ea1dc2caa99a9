"""Copies of a store: from object storage to a disk for many runs, or the other way, verified at the end."""

from apecache.errors import DamagedError, StoreError
from apecache.fingerprint import content_hash
from apecache.store.files import TEMPORARY, Files
from apecache.store.layout import PAIRS
from apecache.store.reader import FeatureStore
from apecache.store.verify import VerifyReport, verify_files


def copy_store(store: FeatureStore, to: Files) -> VerifyReport:
    """Copy every object of a store, and verify the copy. What an interrupted copy has brought is not fetched again.

    The copy opens when all of it is there: what makes it a store is written last.

    Raises:
        StoreError: at `to` is something else, or another store. DamagedError: the copy does not verify.
    """
    source = store.files
    names = [name for name in source.sizes("") if not name.rpartition("/")[2].startswith(TEMPORARY)]
    there = to.sizes("")
    if strange := sorted(there.keys() - set(names) - {name for name in there if TEMPORARY in name}):
        raise StoreError(f"{to.place} holds something else ({strange[0]}); choose another place for the copy")
    to.prepare()
    hashes = _recorded_hashes(store)
    for name in sorted(names, key=lambda name: (name.endswith(PAIRS), name)):
        if not (name in there and name in hashes and content_hash(to.read(name)) == hashes[name]):
            to.write(name, source.read(name))
    report = verify_files(to)
    if not report.sound:
        damaged = next(problem for problem in report.problems if problem.harmful)
        raise DamagedError(f"{to.place}: {damaged.object}: {damaged.detail}; apecache verify {source.place}")
    return report


def _recorded_hashes(store: FeatureStore, folder: str = "") -> dict[str, str]:
    """BLAKE3 of the objects of all shards, by name from the store's root."""
    return {
        f"{folder}{name}": entry.blake3
        for array in store.arrays()
        for commit in array.commits.values()
        for name, entry in commit.objects.items()
    }
