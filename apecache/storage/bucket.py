"""Read and write whole objects of a bucket: `s3://BUCKET/…`, `gs://BUCKET/…`, `az://CONTAINER/…`.

This is the only module that imports obstore. obstore reads credentials, region and endpoint from
the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`) and from nowhere else. An error message repeats
only the code of a server's answer, because its text may hold secrets.

Every operation may be repeated without harm. obstore repeats it for some seconds after 5xx answers,
broken connections and read time-outs. `Bucket._repeated` repeats what obstore must not repeat or
gives up on, for as long as an outage may last.
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
"""How long faults are retried after the storage has answered once."""
REQUEST_SECONDS = 120.0
"""How long one request may take."""
FIRST_SECONDS = 3.0
"""How long faults are retried before the first answer, which a wrong setting may prevent."""
QUICK_SECONDS = 10.0
QUICK_RETRIES = 6
"""Limits of the retries by obstore itself."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
"""Seconds between two retries, doubled from the first to the longest."""
READERS = 16
BULK = 1000
"""Objects of one request to remove; S3 allows no more."""
NO_BUCKET = "NoSuchBucket"
TRANSIENT = {"408", "409", "429", "OperationAborted", "RequestTimeout", "SlowDown"}
"""Statuses below 500 and error codes that may not come again when a request is repeated."""
CREDENTIALS = re.compile(
    r"169\.254\.169\.254|/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity/"
)
"""Addresses where a cloud machine asks for its credentials."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Describe one provider of object storage."""

    store: str
    """Class of obstore."""
    endpoints: tuple[str, ...]
    """Environment variables that may name another endpoint than the provider's."""
    credentials: str
    """Environment variables of the credentials, for error messages."""


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
    """Describe one object of a listing."""

    key: str
    size: int
    modified: datetime


def is_object_url(place: str | Path) -> bool:
    """Return whether a place is a URL of object storage."""
    if not isinstance(place, str):
        return False
    scheme, separator, _ = place.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def require_known_scheme(place: str | Path) -> None:
    """Refuse URLs of unknown schemes, which would become folders of strange names.

    Raises:
        StoreError: The place is such a URL.
    """
    if isinstance(place, str) and URL.match(place) and not is_object_url(place):
        schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StoreError(
            f"{place.partition('://')[0]}:// cannot hold a store; give a folder, or a URL "
            f"of {schemes}"
        )


def open_bucket(url: str) -> tuple["Bucket", str]:
    """Return the bucket that a URL names, and the key in it; no request is sent yet.

    Raises:
        StoreError: The URL has credentials or no bucket, or the endpoint is not encrypted.
        OptionError: APECACHE_RETRY_SECONDS or APECACHE_REQUEST_SECONDS is not a number.
        MissingExtraError: obstore is not installed.
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
    request_seconds = _seconds(REQUEST_VARIABLE, REQUEST_SECONDS)
    options: dict[str, Any] = {"timeout": timedelta(seconds=request_seconds)}
    if endpoint and urlsplit(endpoint).scheme == "http":
        options["allow_http"] = True
    try:
        client = make(name, client_options=options, retry_config=retries)
    except (obstore.exceptions.BaseError, ValueError, OSError):
        missing = f"give {SCHEMES[scheme].credentials} in the environment"
        raise StoreError(
            f"{scheme}://{name}: the location or the credentials are incomplete or wrong; {missing}"
        ) from None
    return Bucket(client, scheme, name), key


def split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into scheme, bucket and key.

    Raises:
        StoreError: What follows the scheme is not BUCKET/KEY.
    """
    scheme, _, bucket_and_key = url.partition("://")
    scheme = scheme.lower()
    name, _, key = bucket_and_key.partition("/")
    if "@" in name or ":" in name:
        raise StoreError(
            f"a {scheme}:// URL with credentials or a port (it is not repeated here); expected "
            f"{scheme}://BUCKET/NAME; give credentials in the environment "
            f"({SCHEMES[scheme].credentials})"
        )
    segments = [segment for segment in key.split("/") if segment]
    if not name or ".." in segments or "." in segments or "\0" in url:
        raise StoreError(
            f"{scheme}:// URL without a bucket, or with a path that leaves the bucket; expected "
            f"{scheme}://BUCKET/NAME"
        )
    return scheme, name, "/".join(segments)


def _endpoint(scheme: Scheme) -> str:
    """Return the endpoint that the environment names; empty if there is none.

    Raises:
        StoreError: It has credentials in it, is on another machine and not encrypted, or is not
            a URL.
    """
    for variable in scheme.endpoints:
        if endpoint := os.environ.get(variable, ""):
            break
    else:
        return ""
    if "@" in endpoint:
        raise StoreError(f"{variable} has credentials in it; give them as {scheme.credentials}")
    try:
        parsed_url = urlsplit(endpoint)
        _host(endpoint)
    except ValueError:
        raise StoreError(
            f"{variable} is not a URL with a host and a port; expected https://HOST:PORT, an IPv6 "
            "address in brackets: https://[ADDRESS]:PORT"
        ) from None
    allow = f"{variable.partition('_')[0]}_ALLOW_HTTP"
    allowed = os.environ.get(allow, "").lower() in ("1", "true", "yes")
    if parsed_url.scheme == "http" and not allowed and not _is_loopback(parsed_url.hostname or ""):
        raise StoreError(
            f"{variable} is not encrypted ({_host(endpoint)}); use https://, or set {allow}=true"
        )
    return endpoint


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _host(endpoint: str) -> str:
    """Return scheme, host and port of an endpoint; raises ValueError if it is not a URL."""
    parsed_url = urlsplit(endpoint)
    host = parsed_url.hostname or ""
    # `hostname` has the address alone; a URL has it in brackets.
    shown_host = f"[{host}]" if ":" in host else host
    port = f":{parsed_url.port}" if parsed_url.port else ""
    return f"{parsed_url.scheme}://{shown_host}{port}"


def _seconds(variable: str, otherwise: float) -> float:
    """Return the seconds that an environment variable sets."""
    setting = os.environ.get(variable)
    try:
        seconds = otherwise if setting is None else float(setting)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{variable}={setting}: expected a number of seconds above 0")
    return seconds


class Bucket:
    """Read and write the objects of one bucket.

    Methods raise StoreError where the storage does not answer or refuses. Threads may share a
    bucket, forked processes may not.
    """

    def __init__(self, client: Any, scheme: str, name: str) -> None:
        self.client = client
        self.scheme = SCHEMES[scheme]
        self.name = f"{scheme}://{name}"
        self._answered = False
        self._decides: bool | None = None

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Return the threads that read in parallel."""
        return ThreadPoolExecutor(READERS, thread_name_prefix="objects")

    def read(self, key: str) -> bytes:
        """Return the bytes of an object; raises FileNotFoundError if there is none."""
        import obstore

        return self._repeated(key, lambda: bytes(obstore.get(self.client, key).bytes()))

    def read_range(self, key: str, start: int, stop: int) -> tuple[memoryview, int]:
        """Return the bytes from `start` to before `stop`, and the size of the whole object.

        There are fewer bytes if the object ends before `stop`.

        Raises:
            FileNotFoundError: There is no such object.
        """
        import obstore

        def read() -> tuple[memoryview, int]:
            try:
                response = obstore.get(self.client, key, options={"range": (start, stop)})
            except obstore.exceptions.BaseError as error:
                status, _ = _answer(str(error))
                if status != 416:
                    raise
                # The range is beyond the end of the object.
                head = obstore.head(self.client, key)
                return memoryview(b""), int(head["size"])
            return memoryview(response.bytes()), response.meta["size"]

        return self._repeated(key, read)

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes]:
        """Yield objects in this order, some of them read ahead; raises as `read` does."""
        waiting = list[Future[bytes]]()
        remaining_keys = iter(keys)
        waiting.extend(self.pool.submit(self.read, key) for key in islice(remaining_keys, READERS))
        try:
            while waiting:
                data = waiting.pop(0).result()
                waiting.extend(
                    self.pool.submit(self.read, key) for key in islice(remaining_keys, 1)
                )
                yield data
        finally:
            # The consumer may stop early: objects that nobody waits for are not read.
            for future in waiting:
                future.cancel()

    def size(self, key: str) -> int | None:
        """Return the bytes of an object; None if there is none."""
        import obstore

        try:
            head = self._repeated(key, lambda: obstore.head(self.client, key))
            return int(head["size"])
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write an object by one request, never in parts, so that nothing unfinished is left."""
        import obstore

        self._put(key, lambda: obstore.put(self.client, key, data, use_multipart=False))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object if there is none; return False if there is one of other bytes.

        The same bytes count as written by this call, because its first answer may have been lost
        and the request repeated.
        """
        import obstore

        def put() -> bool:
            try:
                obstore.put(self.client, key, data, mode="create", use_multipart=False)
                return True
            except obstore.exceptions.AlreadyExistsError:
                try:
                    return bytes(obstore.get(self.client, key).bytes()) == data
                except FileNotFoundError:
                    # S3 gives the same answer while a removal of the object is under way.
                    raise _UnsettledError from None

        return self._put(key, put)

    def decides_creation(self, key: str) -> bool:
        """Return whether the storage refuses to create an object that exists.

        It is tried once, on the object `key`, which is removed again.
        """
        if self._decides is None:
            try:
                self._decides = self.put_if_absent(key, b"first") and not self.put_if_absent(
                    key, b"second"
                )
                self.remove([key])
            except _UnknownError:
                self._decides = False
        return self._decides

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; objects that do not exist are no error."""
        import obstore

        for start in range(0, len(keys), BULK):
            batch = keys[start : start + BULK]
            try:
                self._repeated(batch[0], partial(obstore.delete, self.client, batch))
            except FileNotFoundError:
                # Some storage answers with an error if one of the objects does not exist.
                for key in batch:
                    with suppress(FileNotFoundError):
                        self._repeated(key, partial(obstore.delete, self.client, key))

    def walk(self, folder: str) -> list[Entry]:
        """Return every object anywhere below a folder."""
        import obstore

        listed = self._put(folder, lambda: obstore.list(self.client, folder or None).collect())
        return _entries(listed, folder)

    def list(self, folder: str) -> tuple[list[str], list[Entry]]:
        """Return the names of the folders in a folder, and the objects in it."""
        import obstore

        listing = self._put(
            folder,
            lambda: obstore.list_with_delimiter(self.client, folder or None),
        )
        folders = [prefix.rstrip("/").rpartition("/")[2] for prefix in listing["common_prefixes"]]
        return folders, _entries(listing["objects"], folder)

    def _missing(self, key: str, code: str) -> Exception:
        """Return the error for a missing object, or a missing bucket if the code says so."""
        if code == NO_BUCKET:
            return StoreError(f"{self.name}: no such bucket; make it, or give another")
        return FileNotFoundError(f"{self.name}/{key}")

    def _put(self, key: str, work: Callable[[], T]) -> T:
        """Repeat a request that needs no object: if something is missing, it is the bucket."""
        try:
            return self._repeated(key, work)
        except FileNotFoundError:
            raise self._missing(key, NO_BUCKET) from None

    def _repeated(self, key: str, work: Callable[[], T]) -> T:
        """Do a request, and repeat it while the storage does not answer.

        Raises:
            FileNotFoundError: There is no such object.
            StoreError: There is no such bucket, or the storage refuses or does not answer.
        """
        from obstore.exceptions import BaseError

        patience = _seconds(RETRY_VARIABLE, RETRY_SECONDS)
        # Before the first answer a wrong setting is likelier than an outage.
        patience = patience if self._answered else min(patience, FIRST_SECONDS)
        end = time.monotonic() + patience
        pause = FIRST_PAUSE
        while True:
            try:
                result = work()
                self._answered = True
                return result
            except (FileNotFoundError, ValueError) as error:
                # obstore raises ValueError for names that no object can have.
                self._answered = True
                _, code = _answer(str(error))
                raise self._missing(key, code) from None
            except (BaseError, _UnsettledError) as error:
                _, code = _answer(str(error))
                if code == NO_BUCKET:
                    raise self._missing(key, NO_BUCKET) from None
                refusal = _refusal(f"{self.name}/{key}", self.scheme, error)
                if not isinstance(refusal, _SilentError) or time.monotonic() >= end:
                    raise refusal from None
            seconds_left = max(0.0, end - time.monotonic())
            time.sleep(min(pause, seconds_left))
            pause = min(2 * pause, LONGEST_PAUSE)


class _UnsettledError(Exception):
    """Report that the storage is between two states, so that the request is repeated."""


class _SilentError(StoreError):
    """Report no answer, or one that may be different when the request is repeated."""


class _UnknownError(StoreError):
    """Report that the storage does not know such a request."""


def _refusal(object_name: str, scheme: Scheme, error: Exception) -> StoreError:
    """Return an error of obstore in our own words, because its text may hold secrets."""
    text = str(error)
    error_name = type(error).__name__
    status, code = _answer(text)
    if status == 501 or error_name in ("NotSupportedError", "NotImplementedError"):
        return _UnknownError(
            f"{object_name}: the storage does not know this request; use other storage"
        )
    if 400 <= status < 500 and not {code, str(status)} & TRANSIENT:
        reason = (
            "expired credentials" if "expired" in code.lower() else f"refused ({code or status})"
        )
        return StoreError(
            f"{object_name}: {reason}; check {scheme.credentials} in the environment, and the "
            "name of the bucket"
        )
    if CREDENTIALS.search(text):
        return _SilentError(
            f"{object_name}: no credentials; give {scheme.credentials} in the environment"
        )
    if "redirect without LOCATION" in text:
        return StoreError(
            f"{object_name}: the bucket is in another region; check {scheme.credentials} in the "
            "environment"
        )
    configured = [name for name in scheme.endpoints if os.environ.get(name)]
    at = f" at {_host(os.environ[configured[0]])}" if configured else ""
    variables = configured or scheme.endpoints
    check = " and ".join(["the network", *variables[:1]])
    return _SilentError(
        f"{object_name}: the object storage{at} does not answer; check {check}, then run the same "
        "again"
    )


def _answer(text: str) -> tuple[int, str]:
    """Return the status of the storage's answer, 0 if there was none, and its error code."""
    status_match = re.search(r"status code: (\d{3})\b", text)
    code_match = re.search(r"<Code>(\w{1,60})</Code>", text)
    status = int(status_match.group(1)) if status_match else 0
    code = code_match.group(1) if code_match else ""
    return status, code


def _entries(listed: Iterable[Any], folder: str) -> list[Entry]:
    """Return the objects of a listing, without the empty one by which consoles show a folder."""
    entries = []
    for meta in listed:
        if meta["path"] != folder:
            size = int(meta["size"])
            entries.append(Entry(key=meta["path"], size=size, modified=meta["last_modified"]))
    return entries
