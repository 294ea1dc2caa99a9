"""Copy a store between object storage and a disk, and verify the copy."""

from collections.abc import Iterator

from apecache.arguments import AnyPath, as_place
from apecache.errors import DamagedError, StoreError
from apecache.fingerprint import content_hash
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.open import open_files
from apecache.store.layout import PAIRS, SEGMENTS, SOURCE, VIEW_RECORDS, VIEWS, ZARR
from apecache.store.reader import FeatureStore, segment_names
from apecache.store.verify import VerifyReport, verify_files


def copy_store(store: AnyPath, to: AnyPath, alone: bool = False) -> VerifyReport:
    """Copy every object of a store, and verify the copy.

    Objects that an interrupted copy has written are not fetched again. A new copy cannot be opened
    before it is complete.

    Args:
        store: The store to copy.
        to: Folder or URL of the copy.
        alone: Whether nobody else writes to `to`, see `open_files`.

    Raises:
        StoreError: There is not a store, or `to` holds something else.
        DamagedError: The copy does not verify.
    """
    store = as_place(store, "store")
    opened = FeatureStore.physical(open_files(store))
    target = open_files(as_place(to, "to"), alone)
    names = [name for name in opened.files.sizes("") if not _is_temporary(name)]
    target_names = {name for name in target.sizes("") if not _is_temporary(name)}
    if strange := sorted(target_names - set(names)):
        raise StoreError(
            f"{target.place} holds {strange[0]}, which {store} does not; give another place "
            "for the copy"
        )
    target.prepare()
    if (target_names and SOURCE not in target_names) or not _claim(opened.files, target):
        raise StoreError(f"{target.place} holds another store; give another place for the copy")
    hashes = dict(_recorded_hashes(opened))
    for name in sorted(names, key=_copying_order):
        # Only objects of shards have a hash here; the others are copied again.
        if name not in target_names or hashes.get(name) != content_hash(target.read(name)):
            target.write(name, opened.files.read(name))
    target.remove_temporary("records", ZARR, SEGMENTS, VIEWS)
    report = verify_files(target)
    for problem in report.problems:
        if problem.harmful:
            raise DamagedError(
                f"{target.place}: {problem.object}: {problem.detail}; try apecache verify {store}"
            )
    return report


def _copying_order(name: str) -> tuple[int, str]:
    """Return a key to sort by: what makes other objects visible comes after them."""
    # The record of pairs makes a block exist, that of a view makes the view the newest one.
    if name == PAIRS:
        return 3, name
    if name.startswith(f"{VIEW_RECORDS}/"):
        return 2, name
    return int(name.endswith(PAIRS)), name


def _claim(source: Files, target: Files) -> bool:
    """Claim the target for this store; return False if it belongs to another one."""
    claim = source.read(SOURCE)
    return target.put_if_absent(SOURCE, claim) or target.read(SOURCE) == claim


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


def _recorded_hashes(store: FeatureStore, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name from the store's root, BLAKE3) of the objects of all shards."""
    for array in store.arrays():
        for commit in array.commits.values():
            for name, entry in commit.objects.items():
                yield f"{prefix}{name}", entry.blake3
    for segment, name in zip(store.segments, segment_names(store.files), strict=True):
        yield from _recorded_hashes(segment, f"{SEGMENTS}/{name}/")
