"""Open a folder or a URL as `Files`."""

from pathlib import Path

from apecache.arguments import AnyPath, as_place
from apecache.storage.bucket import is_object_url, require_known_scheme
from apecache.storage.files import Files
from apecache.storage.local_files import LocalFiles


def open_files(place: str | Path, alone: bool = False) -> Files:
    """Return the files of a folder, or the objects below a URL.

    Args:
        place: A folder, `s3://BUCKET/…`, `gs://BUCKET/…` or `az://CONTAINER/…`.
        alone: Whether nobody else writes there. Object storage then needs no put-if-absent.

    Raises:
        StoreError: The URL names no bucket.
        MissingExtraError: Object storage needs the extra `remote`.
    """
    require_known_scheme(place)
    if is_object_url(place):
        from apecache.storage.object_files import open_objects

        return open_objects(str(place), alone)
    return LocalFiles(Path(place))


def as_files(store: Files | AnyPath) -> Files:
    """Return an argument that is a store, as its files; raises as `open_files` does.

    Args:
        store: Files that are open already, a folder, or a URL.
    """
    return store if isinstance(store, Files) else open_files(as_place(store, "store"))
