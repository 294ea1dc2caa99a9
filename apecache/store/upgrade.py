"""Upgrade a store of an older format into a new store, never in place.

Format 1 are blocks, format 2 adds views. A store of format 1 is read as it is, and gets views when
its table changes, so there is nothing to convert so far.
"""

from apecache.arguments import AnyPath, as_place
from apecache.store.layout import FORMAT_VERSION, SOURCE, VIEW_FORMAT_VERSION
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record
from apecache.store.views import view_ids


def store_format(path: AnyPath) -> int:
    """Return the format of the store at `path`: 2 if it has views, else 1.

    Raises:
        StoreError: There is not a store, or it has a newer format than this apecache reads.
    """
    files = FeatureStore.open(path).files
    format_version: int = read_record(files, SOURCE)["format"]
    return VIEW_FORMAT_VERSION if view_ids(files) else format_version


def upgrade_store(store: AnyPath, out: AnyPath) -> bool:
    """Write a store to `out` in the newest format; raises as `store_format` does.

    Returns:
        Whether anything was written; False if the store needs no conversion.
    """
    assert (FORMAT_VERSION, VIEW_FORMAT_VERSION) == (1, 2), "write the step from older formats here"
    return store_format(as_place(store, "store")) > VIEW_FORMAT_VERSION and bool(out)
