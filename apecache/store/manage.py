"""List, rename and remove what a store holds: views, and the features of one encoder."""

from dataclasses import dataclass
from pathlib import Path

from apecache.arguments import AnyPath, as_place
from apecache.errors import StoreError
from apecache.fingerprint import Modality
from apecache.storage.open import as_files
from apecache.store.maintenance import find_array, remove_array
from apecache.store.reader import FeatureStore
from apecache.store.verify import begun_segments
from apecache.store.views import ViewRecord, find_view, name_view, read_view_record, view_ids
from apecache.store.views import remove_view as remove_view_files


@dataclass(frozen=True, kw_only=True)
class RemovalReport:
    """Say what was removed."""

    store: str | Path
    modality: Modality
    name: str
    """Name of the features."""
    n_objects: int
    n_bytes: int


def list_views(store: AnyPath) -> list[ViewRecord]:
    """Return the views of a store, the newest last; empty if its table never changed.

    Raises:
        StoreError: There is not a store.
    """
    files = FeatureStore.open(as_place(store, "store")).files
    return [read_view_record(files, view_id) for view_id in view_ids(files)]


def rename_view(store: AnyPath, view: str, name: str) -> ViewRecord:
    """Give a view another name.

    Args:
        store: A folder, or a URL of object storage.
        view: Id, number or name of the view.
        name: Its new name.

    Raises:
        StoreError: There is not a store or no such view.
        OptionError: The name cannot be one.
    """
    files = FeatureStore.open(as_place(store, "store")).files
    return name_view(files, find_view(files, view), name)


def remove_views(store: AnyPath, *views: str) -> list[str]:
    """Remove views, but no features: `compact_store` frees those that no other view needs.

    Args:
        store: A folder, or a URL of object storage.
        views: Ids or numbers. None is removed if one of them cannot be.

    Returns:
        The ids of the removed views.

    Raises:
        StoreError: There is not a store or no such view, or one of them is the newest, which is in
            use.
    """
    files = FeatureStore.open(as_place(store, "store")).files
    ids = [find_view(files, view) for view in views]
    newest = view_ids(files)[-1:]
    if newest and newest[0] in ids:
        raise StoreError(
            f"{newest[0]} is the newest view, which is in use; extract another table first"
        )
    for view_id in ids:
        remove_view_files(files, view_id)
    return ids


def remove_features(store: AnyPath, name: str) -> RemovalReport:
    """Remove the features of one encoder, complete or not.

    Args:
        store: A folder, or a URL of object storage.
        name: `NAME`, `image/NAME` or `text/NAME`.

    Raises:
        StoreError: There is not a store, or there are no such features or some of each modality.
    """
    files = as_files(store)
    modality, array_name = find_array(files, name)
    n_objects = 0
    n_bytes = 0
    # The store itself last: while the array is there, an interrupted removal can be repeated.
    for folder in (*begun_segments(files), ""):
        removed = remove_array(files.child(folder), modality, array_name)
        n_objects += removed["objects"]
        n_bytes += removed["bytes"]
    return RemovalReport(
        store=files.place,
        modality=modality,
        name=array_name,
        n_objects=n_objects,
        n_bytes=n_bytes,
    )
