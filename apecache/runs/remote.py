"""Fetch run folders from object storage, and put them back.

A folder is fetched and put back as a whole. The file that ends a run is written last.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from apecache.errors import RunError, naming, one_line
from apecache.runs import encoders as trained_encoders
from apecache.runs.heads import DESCRIPTION
from apecache.storage.bucket import Bucket, is_object_url, open_bucket

HUB_SCHEME = "hf://"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FINAL = (DESCRIPTION, trained_encoders.DESCRIPTION)
"""Files whose presence makes a run a finished one."""


@contextmanager
def fetched_run(place: str | Path) -> Iterator[Path]:
    """Open a run folder for reading.

    Of a folder on object storage a local copy is made, which is removed at the end. A repository of
    the Hugging Face hub, `hf://ORG/NAME@REVISION`, is copied to the hub's cache.

    Raises:
        StoreError: The storage does not answer, or refuses.
        RunError: The hub has no such repository, or does not answer.
    """
    if is_hub_url(place):
        # It stays in the hub's cache, which the next call reads.
        yield fetch_from_hub(str(place))
        return
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


def is_hub_url(place: str | Path) -> bool:
    """Tell whether a place is a repository of the Hugging Face hub."""
    return isinstance(place, str) and place.lower().startswith(HUB_SCHEME)


def fetch_from_hub(url: str) -> Path:
    """Return the snapshot of a repository with a run in it.

    Args:
        url: `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`.

    Raises:
        RunError: not such a URL; no such repository; or no network and no cached snapshot.
    """
    name, _, revision = url[len(HUB_SCHEME) :].partition("@")
    if not HUB_NAME.fullmatch(name):
        raise RunError(f"{url}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None))
    except Exception as error:  # the hub client's errors share no base class
        raise RunError(f"{url} cannot be fetched: {one_line(error)}") from error


@contextmanager
def kept_run(place: str | Path) -> Iterator[Path]:
    """Open a run folder for writing.

    Of a folder on object storage a local copy is made. It is put back at the end, also after an
    error or interrupt, but not if the process is killed. The run counts as finished only once
    all its files are in the bucket.

    Raises:
        StoreError: The storage does not answer, or refuses.
    """
    if is_hub_url(place):
        raise RunError(f"{place} is for reading; give a folder, and upload it with hf upload")
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
