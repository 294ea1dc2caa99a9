"""Upgrade a store of an older format into a new store, never in place.

Format 1 are blocks, format 2 adds views. A store of format 1 is read as it is, and gets its first
view when its table changes. The upgrade copies it and commits that view: nothing is encoded.
"""

from apecache.arguments import AnyPath, as_place
from apecache.storage.open import open_files
from apecache.store.copy import copy_store
from apecache.store.layout import FORMAT_VERSION, SOURCE, VIEW_FORMAT_VERSION
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.view_edits import first_view
from apecache.store.views import commit_view, view_ids


def store_format(path: AnyPath) -> int:
    """Return the format of the store at `path`: 2 if it has views, else 1.

    Raises:
        StoreError: There is not a store, or it has a newer format than this apecache reads.
    """
    files = FeatureStore.open(path).files
    format_version: int = read_record(files, SOURCE)["format"]
    return VIEW_FORMAT_VERSION if view_ids(files) else format_version


def upgrade_store(store: AnyPath, out: AnyPath) -> bool:
    """Write the store at `store` to `out` in the newest format. The same call resumes.

    The identity of the table stays, so runs and indexes of the old store are those of the new one.

    Returns:
        Whether anything was written; False if the store has the newest format.

    Raises:
        StoreError: There is not a store, it has a newer format than this apecache reads, or `out`
            holds something else.
        DamagedError: The store, or its copy, is damaged.
    """
    assert (FORMAT_VERSION, VIEW_FORMAT_VERSION) == (1, 2), "write the step from older formats here"
    place = as_place(store, "store")
    if store_format(place) == VIEW_FORMAT_VERSION:
        return False
    target = open_files(as_place(out, "out"))
    # A copy that has its view was finished by an earlier call.
    if not target.exists(SOURCE) or not view_ids(target):
        copy_store(place, out)
        commit_view(target, first_view(target), number=0)
    return True
