"""Object storage: whole objects of a bucket, named by `s3://BUCKET/…`, `gs://BUCKET/…` or
`az://CONTAINER/…`.

The only module that knows obstore. Credentials, region and endpoint are read by it from the
environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`) and from nowhere else; a message never repeats what a
server or a library says, only its code.

Every operation may be repeated without harm, and is: for some seconds by obstore (5xx, connections,
time-outs of reads), and what it must not repeat by itself, or gives up on, here for as long as an
outage may last.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from apecache.errors import MissingExtraError, OptionError, StoreError

T = TypeVar("T")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
RETRY_VARIABLE = "APECACHE_RETRY_SECONDS"
REQUEST_VARIABLE = "APECACHE_REQUEST_SECONDS"
RETRY_SECONDS = 120.0
REQUEST_SECONDS = 120.0
"""How long faults are waited out once the storage has answered, and how long one request may
take."""
FIRST_SECONDS = 3.0
"""How long they are before it has."""
QUICK_SECONDS = 10.0
QUICK_RETRIES = 6
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
READERS = 16
BULK = 1000
NO_BUCKET = "NoSuchBucket"
TRANSIENT = {"408", "409", "429", "OperationAborted", "RequestTimeout", "SlowDown"}
"""Answers below 500 that may be others the next time."""
CREDENTIALS = re.compile(
    r"169\.254\.169\.254|/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity/"
)
"""Where a machine in a cloud asks who it is."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """`endpoints`: variables of the environment that may name another endpoint than the provider's
    own."""

    store: str
    endpoints: tuple[str, ...]
    credentials: str


SCHEMES = {
    "s3": Scheme(
        store="S3Store",
        endpoints=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        credentials="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_REGION",
    ),
    "gs": Scheme(store="GCSStore", endpoints=(), credentials="GOOGLE_APPLICATION_CREDENTIALS"),
    "az": Scheme(
        store="AzureStore",
        endpoints=("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        credentials="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a listing."""

    key: str
    size: int
    modified: datetime


def is_object_url(place: str | Path) -> bool:
    """Whether a place is named by a URL of object storage."""
    return (
        isinstance(place, str) and place.partition("://")[0].lower() in SCHEMES and "://" in place
    )


def require_known_scheme(place: str | Path) -> None:
    """Refuse URLs of anything else, which would become folders of strange names.

    Raises:
        StoreError: one such.
    """
    if isinstance(place, str) and URL.match(place) and not is_object_url(place):
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StoreError(
            f"{place.partition('://')[0]}:// is no place for a store; give a folder, or one "
            f"of {known}"
        )


def open_bucket(url: str) -> tuple["Bucket", str]:
    """The bucket that a URL names, and the key in it; nothing is asked of the storage yet.

    Raises:
        StoreError: a URL with credentials or without a bucket, an endpoint that is not encrypted.
        OptionError: a variable of ours in the environment that is no number. MissingExtraError: no
            obstore.
    """
    scheme, name, key = split_url(url)
    try:
        import obstore.store
    except ImportError:
        raise MissingExtraError("obstore", "remote") from None
    endpoint = _endpoint(SCHEMES[scheme])
    make = getattr(obstore.store, SCHEMES[scheme].store)
    backoff = {
        "init_backoff": timedelta(seconds=FIRST_PAUSE),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    }
    quick = min(QUICK_SECONDS, _seconds(RETRY_VARIABLE, RETRY_SECONDS))
    retries = {
        "max_retries": QUICK_RETRIES,
        "retry_timeout": timedelta(seconds=quick),
        "backoff": backoff,
    }
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=_seconds(REQUEST_VARIABLE, REQUEST_SECONDS))
    }
    options |= {"allow_http": True} if endpoint and urlsplit(endpoint).scheme == "http" else {}
    try:
        client = make(name, client_options=options, retry_config=retries)
    except (obstore.exceptions.BaseError, ValueError, OSError):
        missing = f"give {SCHEMES[scheme].credentials} in the environment"
        raise StoreError(
            f"{scheme}://{name}: what is known of it is not enough, or wrong; {missing}"
        ) from None
    return Bucket(client, scheme, name), key


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key.

    Raises:
        StoreError: what follows the scheme is not BUCKET/KEY.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    name, _, key = rest.partition("/")
    if "@" in name or ":" in name:
        raise StoreError(
            f"a {scheme}:// URL with credentials or a port (it is not repeated here); expected "
            f"{scheme}://BUCKET/NAME; "
            f"give credentials in the environment ({SCHEMES[scheme].credentials})"
        )
    parts = [part for part in key.split("/") if part]
    if not name or ".." in parts or "." in parts or "\0" in url:
        raise StoreError(
            f"{scheme}:// URL without a bucket, or that leads out of it; expected "
            f"{scheme}://BUCKET/NAME"
        )
    return scheme, name, "/".join(parts)


def _endpoint(scheme: Scheme) -> str:
    """Of the environment, if it names one.

    Raises:
        StoreError: one that has credentials in it, or one elsewhere that is not encrypted.
    """
    for variable in scheme.endpoints:
        if endpoint := os.environ.get(variable, ""):
            break
    else:
        return ""
    found = urlsplit(endpoint)
    if "@" in endpoint:
        raise StoreError(f"{variable} has credentials in it; give them as {scheme.credentials}")
    allow = f"{variable.partition('_')[0]}_ALLOW_HTTP"
    allowed = os.environ.get(allow, "").lower() in ("1", "true", "yes")
    if found.scheme == "http" and not allowed and not _is_loopback(found.hostname or ""):
        raise StoreError(
            f"{variable} is not encrypted ({_host(endpoint)}); use https://, or set {allow}=true"
        )
    return endpoint


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _host(endpoint: str) -> str:
    found = urlsplit(endpoint)
    return f"{found.scheme}://{found.hostname}" + (f":{found.port}" if found.port else "")


def _seconds(variable: str, otherwise: float) -> float:
    told = os.environ.get(variable)
    try:
        seconds = otherwise if told is None else float(told)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{variable}={told}: expected a number of seconds above 0")
    return seconds


class Bucket:
    """The objects of one bucket. Methods raise StoreError where the storage does not answer or
    refuses; `name` is how people name the bucket. Safe to share between threads, but not with
    forked processes."""

    def __init__(self, client: Any, scheme: str, name: str) -> None:
        self.client = client
        self.scheme = SCHEMES[scheme]
        self.name = f"{scheme}://{name}"
        self._answered = False
        self._decides: bool | None = None

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that read for whoever asks."""
        return ThreadPoolExecutor(READERS, thread_name_prefix="objects")

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        import obstore

        return self._repeated(key, lambda: bytes(obstore.get(self.client, key).bytes()))

    def read_range(self, key: str, start: int, stop: int) -> tuple[memoryview, int]:
        """Bytes from `start` to before `stop`, or to the end, and the size of the whole object.

        Raises FileNotFoundError if there is no such object.
        """
        import obstore

        def read() -> tuple[memoryview, int]:
            try:
                found = obstore.get(self.client, key, options={"range": (start, stop)})
            except obstore.exceptions.BaseError as error:
                if _answer(str(error))[0] != 416:
                    raise
                return memoryview(b""), int(
                    obstore.head(self.client, key)["size"]
                )  # the range is beyond the end
            return memoryview(found.bytes()), found.meta["size"]

        return self._repeated(key, read)

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes]:
        """Objects in this order, some of them read ahead. Raises as `read` does."""
        waiting = list[Future[bytes]]()
        rest = iter(keys)
        waiting.extend(self.pool.submit(self.read, key) for key in islice(rest, READERS))
        try:
            while waiting:
                data = waiting.pop(0).result()
                waiting.extend(self.pool.submit(self.read, key) for key in islice(rest, 1))
                yield data
        finally:
            for future in waiting:
                future.cancel()

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        import obstore

        try:
            return int(self._repeated(key, lambda: obstore.head(self.client, key))["size"])
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Put an object by one request, never in parts: nothing unfinished can be left behind."""
        import obstore

        self._put(key, lambda: obstore.put(self.client, key, data, use_multipart=False))

    def create(self, key: str, data: bytes) -> bool:
        """Put an object if there is none; False if there is one of other bytes.

        The same bytes are taken for our own: a reply may have been lost, and the request been
        repeated.
        """
        import obstore

        def create() -> bool:
            try:
                obstore.put(self.client, key, data, mode="create", use_multipart=False)
                return True
            except obstore.exceptions.AlreadyExistsError:
                try:
                    return bytes(obstore.get(self.client, key).bytes()) == data
                except FileNotFoundError:
                    # S3 answers alike where a removal of the object is under way
                    raise _UnsettledError from None

        return self._put(key, create)

    def decides_creation(self, key: str) -> bool:
        """Whether the storage refuses to create what is there; tried once, on `key`, which is
        removed again."""
        if self._decides is None:
            try:
                self._decides = self.create(key, b"first") and not self.create(key, b"second")
                self.remove([key])
            except _UnknownError:
                self._decides = False
        return self._decides

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are none the less gone."""
        import obstore

        for start in range(0, len(keys), BULK):
            part = keys[start : start + BULK]
            try:
                self._repeated(part[0], partial(obstore.delete, self.client, part))
            except FileNotFoundError:  # some storage minds that one of them is gone
                for key in part:
                    with suppress(FileNotFoundError):
                        self._repeated(key, partial(obstore.delete, self.client, key))

    def walk(self, folder: str) -> list[Entry]:
        """Every object anywhere below a folder."""
        import obstore

        return _entries(
            self._put(folder, lambda: obstore.list(self.client, folder or None).collect()),
            folder,
        )

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """Names of the folders in a folder, and the objects in it."""
        import obstore

        found = self._put(folder, lambda: obstore.list_with_delimiter(self.client, folder or None))
        folders = [prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]
        return folders, _entries(found["objects"], folder)

    def _missing(self, key: str, code: str) -> Exception:
        if code == NO_BUCKET:
            return StoreError(f"{self.name}: no such bucket; make it, or give another")
        return FileNotFoundError(f"{self.name}/{key}")

    def _put(self, key: str, work: Callable[[], T]) -> T:
        """What needs no object to be there: where something is missing, it is the bucket."""
        try:
            return self._repeated(key, work)
        except FileNotFoundError:
            raise self._missing(key, NO_BUCKET) from None

    def _repeated(self, key: str, work: Callable[[], T]) -> T:
        """Raises FileNotFoundError, or StoreError."""
        from obstore.exceptions import BaseError

        patience = _seconds(RETRY_VARIABLE, RETRY_SECONDS)
        end = time.monotonic() + (patience if self._answered else min(patience, FIRST_SECONDS))
        pause = FIRST_PAUSE
        while True:
            try:
                result = work()
                self._answered = True
                return result
            except (
                FileNotFoundError,
                ValueError,
            ) as error:  # ValueError: no object can have such a name
                self._answered = True
                raise self._missing(key, _answer(str(error))[1]) from None
            except (BaseError, _UnsettledError) as error:
                if _answer(str(error))[1] == NO_BUCKET:
                    raise self._missing(key, NO_BUCKET) from None
                refusal = _refusal(f"{self.name}/{key}", self.scheme, error)
                if not isinstance(refusal, _SilentError) or time.monotonic() >= end:
                    raise refusal from None
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)


class _UnsettledError(Exception):
    """The storage is between two states."""


class _SilentError(StoreError):
    """No answer, or one that may be another the next time."""


class _UnknownError(StoreError):
    """The storage does not know such a request."""


def _refusal(where: str, scheme: Scheme, error: Exception) -> StoreError:
    """What an error of obstore means, in our words: theirs may hold what nobody should read."""
    text = str(error)
    kind = type(error).__name__
    status, code = _answer(text)
    if status == 501 or kind in ("NotSupportedError", "NotImplementedError"):
        return _UnknownError(f"{where}: the storage does not know this request; use other storage")
    if 400 <= status < 500 and not {code, str(status)} & TRANSIENT:
        what = "expired credentials" if "expired" in code.lower() else f"refused ({code or status})"
        return StoreError(
            f"{where}: {what}; check {scheme.credentials} in the environment, and the name of "
            "the bucket"
        )
    if CREDENTIALS.search(text):
        return _SilentError(
            f"{where}: no credentials; give {scheme.credentials} in the environment"
        )
    if "redirect without LOCATION" in text:
        return StoreError(
            f"{where}: the bucket is in another region; check {scheme.credentials} in the "
            "environment"
        )
    told = [name for name in scheme.endpoints if os.environ.get(name)]
    at = f" at {_host(os.environ[told[0]])}" if told else ""
    check = " and ".join(["the network", *(told or scheme.endpoints)[:1]])
    return _SilentError(
        f"{where}: the object storage{at} does not answer; check {check}, then run the same again"
    )


def _answer(text: str) -> tuple[int, str]:
    """Status of the storage's answer, 0 if there was none, and its own word for what is wrong."""
    status = re.search(r"status code: (\d{3})\b", text)
    word = re.search(r"<Code>(\w{1,60})</Code>", text)
    return int(status.group(1)) if status else 0, word.group(1) if word else ""


def _entries(found: Iterable[Any], folder: str) -> list[Entry]:
    """Without the empty object of the folder's own name that consoles put to show it."""
    entries = (
        Entry(key=meta["path"], size=int(meta["size"]), modified=meta["last_modified"])
        for meta in found
    )
    return [entry for entry in entries if entry.key != folder]
