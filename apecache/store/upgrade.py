"""Older formats of a store are lifted into a new store, never in place. So far there is one
format."""

from pathlib import Path

from apecache.store.layout import FORMAT_VERSION, SOURCE
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record


def store_format(path: str | Path) -> int:
    """Format of the store at `path`.

    Raises:
        StoreError: no store, or one of a newer format than this apecache knows.
    """
    found: int = read_record(FeatureStore.open(path).files, SOURCE)["format"]
    return found


def upgrade_store(path: str | Path, out: str | Path) -> bool:
    """Write the store at `path` to `out` in the newest format; False if it is of that already, and
    nothing was written.

    Raises as `store_format` does.
    """
    assert FORMAT_VERSION == 1, "write the step from each older format here when there is one"
    return store_format(path) != FORMAT_VERSION and bool(out)
