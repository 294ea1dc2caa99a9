"""Run folders on object storage: fetched whole to be read or continued, and put back whole, what
ends a run last."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from apecache.errors import naming
from apecache.runs import encoders as trained_encoders
from apecache.runs.heads import DESCRIPTION
from apecache.storage.bucket import Bucket, is_object_url, open_bucket

FINAL = (DESCRIPTION, trained_encoders.DESCRIPTION)
"""Whose presence makes a run a finished one."""


@contextmanager
def fetched_run(place: str | Path) -> Iterator[Path]:
    """A run folder to read: of one on object storage a copy, which is gone afterwards.

    Raises StoreError where the storage does not answer, or refuses.
    """
    if not is_object_url(place):
        yield Path(place)
        return
    bucket, key = open_bucket(str(place))
    with TemporaryDirectory() as folder:
        _fetch(bucket, key, here := Path(folder) / "run")
        with naming(place, here):
            yield here


@contextmanager
def kept_run(place: str | Path) -> Iterator[Path]:
    """A run folder to write. On object storage: a copy of what is there, put back at the end and
    after an error or interrupt, but not by a process that is killed; until all of a finished run is
    there, none is.

    Raises as `fetched_run` does.
    """
    with fetched_run(place) as here:
        try:
            yield here
        finally:
            if is_object_url(place):
                bucket, key = open_bucket(str(place))
                _put_back(bucket, key, here)


def _fetch(bucket: Bucket, key: str, here: Path) -> None:
    """Nothing is made where nothing is."""
    keys = [entry.key for entry in bucket.walk(key)]
    for found, data in zip(keys, bucket.read_all(keys), strict=True):
        path = here / found[len(key) + 1 :]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _put_back(bucket: Bucket, key: str, here: Path) -> None:
    files = {
        path.relative_to(here).as_posix(): path
        for path in sorted(here.rglob("*"))
        if path.is_file()
    }
    there = {entry.key[len(key) + 1 :] for entry in bucket.walk(key)}
    final = [name for name in FINAL if name in files]
    bucket.remove([f"{key}/{name}" for name in there if name not in files or name in FINAL])
    for name in (*(name for name in files if name not in FINAL), *final):
        bucket.write(f"{key}/{name}", files[name].read_bytes())
