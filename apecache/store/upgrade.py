"""Upgrade a store of an older format into a new store, never in place.

So far there is one format.
"""

from pathlib import Path

from apecache.store.layout import FORMAT_VERSION, SOURCE
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record


def store_format(path: str | Path) -> int:
    """Return the format of the store at `path`.

    Raises:
        StoreError: There is not a store, or it has a newer format than this apecache reads.
    """
    format_version: int = read_record(FeatureStore.open(path).files, SOURCE)["format"]
    return format_version


def upgrade_store(path: str | Path, out: str | Path) -> bool:
    """Write the store at `path` to `out` in the newest format; raises as `store_format` does.

    Returns:
        Whether anything was written; False if the store has the newest format.
    """
    assert FORMAT_VERSION == 1, "write the step from each older format here when there is one"
    return store_format(path) != FORMAT_VERSION and bool(out)
