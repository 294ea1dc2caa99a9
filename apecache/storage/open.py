"""From a folder or a URL to the operations on it."""

from pathlib import Path

from apecache.storage.bucket import is_object_url, require_known_scheme
from apecache.storage.files import Files
from apecache.storage.local import LocalFiles


def open_files(place: str | Path, alone: bool = False) -> Files:
    """The files of a folder, or the objects below `s3://BUCKET/…`, `gs://BUCKET/…` or
    `az://CONTAINER/…`.

    Args:
        alone: nobody else writes there, so that object storage without put-if-absent will do.

    Raises:
        StoreError: a URL that names no place. MissingExtraError: object storage without the extra
            `remote`.
    """
    require_known_scheme(place)
    if is_object_url(place):
        from apecache.storage.object_files import open_objects

        return open_objects(str(place), alone)
    return LocalFiles(Path(place))
