"""Fetch run folders from object storage, and put them back.

A folder is fetched and put back as a whole. The file that ends a run is written last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from apecache.errors import naming
from apecache.runs import encoders as trained_encoders
from apecache.runs.heads import DESCRIPTION
from apecache.storage.bucket import Bucket, is_object_url, open_bucket

FINAL = (DESCRIPTION, trained_encoders.DESCRIPTION)
"""Files whose presence makes a run a finished one."""


@contextmanager
def fetched_run(place: str | Path) -> Iterator[Path]:
    """Open a run folder for reading.

    Of a folder on object storage a local copy is made, which is removed at the end.

    Raises:
        StoreError: The storage does not answer, or refuses.
    """
    if not is_object_url(place):
        yield Path(place)
        return
    bucket, key = open_bucket(str(place))
    with TemporaryDirectory() as folder:
        local_folder = Path(folder) / "run"
        _fetch(bucket, key, local_folder)
        # Errors about the copy must name the URL that the user gave.
        with naming(place, local_folder):
            yield local_folder


@contextmanager
def kept_run(place: str | Path) -> Iterator[Path]:
    """Open a run folder for writing.

    Of a folder on object storage a local copy is made. It is put back at the end, also after an
    error or interrupt, but not if the process is killed. The run counts as finished only once
    all its files are in the bucket.

    Raises:
        StoreError: The storage does not answer, or refuses.
    """
    with fetched_run(place) as local_folder:
        try:
            yield local_folder
        finally:
            # Also after an error: the checkpoint of an interrupted fit must not be lost.
            if is_object_url(place):
                bucket, key = open_bucket(str(place))
                _put_back(bucket, key, local_folder)


def _fetch(bucket: Bucket, key: str, local_folder: Path) -> None:
    """Copy all objects under `key`. Without objects no folder is made."""
    keys = [entry.key for entry in bucket.walk(key)]
    for object_key, data in zip(keys, bucket.read_all(keys), strict=True):
        path = local_folder / object_key[len(key) + 1 :]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _put_back(bucket: Bucket, key: str, local_folder: Path) -> None:
    """Make the bucket's folder equal to the local one."""
    files: dict[str, Path] = {}
    for path in sorted(local_folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(local_folder).as_posix()] = path
    stored_names = {entry.key[len(key) + 1 :] for entry in bucket.walk(key)}
    # Final files go first and come back last: a run that is half put back is not a finished one.
    outdated = [f"{key}/{name}" for name in stored_names if name not in files or name in FINAL]
    bucket.remove(outdated)
    ordinary = [name for name in files if name not in FINAL]
    final = [name for name in FINAL if name in files]
    for name in (*ordinary, *final):
        bucket.write(f"{key}/{name}", files[name].read_bytes())
