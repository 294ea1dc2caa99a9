"""Buckets: what their URLs may say, what is repeated, and what people are told, against moto's S3
on loopback."""

import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from remote import SECRET, Faults, S3Server

from apecache.errors import MissingExtraError, OptionError, StoreError
from apecache.storage.bucket import Bucket, is_object_url, open_bucket, split_url


@pytest.fixture
def opened(bucket: str) -> Bucket:
    return open_bucket(bucket)[0]


@pytest.mark.parametrize(
    ("place", "is_url"),
    [
        ("s3://bucket/a", True),
        ("gs://bucket", True),
        ("az://container/a", True),
        ("S3://bucket/a", True),
        ("s3:/bucket/a", False),
        ("https://host/a", False),
        ("s3", False),
        ("folder/s3://a", False),
        (Path("s3://bucket"), False),
    ],
)
def test_places_of_object_storage_are_told_by_their_scheme(place: str | Path, is_url: bool) -> None:
    assert is_object_url(place) == is_url


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("s3", "bucket", "")),
        ("s3://bucket/", ("s3", "bucket", "")),
        ("s3://bucket/a//b/", ("s3", "bucket", "a/b")),
        ("az://container/a b/ü", ("az", "container", "a b/ü")),
    ],
)
def test_a_url_is_a_scheme_a_bucket_and_a_key(url: str, parts: tuple[str, str, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///a", "s3://bucket/../other", "s3://bucket/./a", "s3://b/\0"],
)
def test_a_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"expected s3://BUCKET/NAME"):
        split_url(url)


@pytest.mark.parametrize(
    "url",
    [f"s3://AKIATESTS:{SECRET}@bucket/a", "s3://bucket:443/a", f"s3://{SECRET[:8]}@bucket"],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match="give credentials in the environment") as caught:
        open_bucket(url)
    assert SECRET[:8] not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        (
            "http://storage.example",
            "AWS_ENDPOINT_URL is not encrypted .http://storage.example.; use https://",
        ),
        (
            "http://[fd00::7]:9000",
            r"AWS_ENDPOINT_URL is not encrypted .http://\[fd00::7\]:9000.; use https://",
        ),
        (f"https://user:{SECRET}@storage.example", "AWS_ENDPOINT_URL has credentials in it"),
    ],
)
def test_an_endpoint_that_gives_secrets_away_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    endpoint: str,
    message: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match=message) as caught:
        open_bucket(bucket)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://fd00::7:9000",
        "https://::1:9000",
        "https://[::1",
        "https://h:port",
        "https://h:99999",
    ],
)
def test_an_endpoint_that_is_not_a_url_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    endpoint: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreError, match=r"AWS_ENDPOINT_URL is not a URL .* in brackets"):
        open_bucket(bucket)


def test_http_elsewhere_is_for_those_who_say_so(
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert open_bucket(bucket)[0].name == bucket


@pytest.mark.parametrize("told", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_time_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    told: str,
) -> None:
    monkeypatch.setenv("APECACHE_RETRY_SECONDS", told)
    with pytest.raises(
        OptionError,
        match=f"APECACHE_RETRY_SECONDS={told}: expected a number of seconds above 0",
    ):
        open_bucket(bucket)


def test_without_the_extra_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[remote\]'"):
        open_bucket("s3://bucket")


# --- what is not there, or not to be had ----------------------------------------------------------


def test_a_missing_object_is_a_missing_file(opened: Bucket) -> None:
    for read in (opened.read, lambda key: opened.read_range(key, 0, 9)):
        with pytest.raises(FileNotFoundError, match=f"{opened.name}/a/b"):
            read("a/b")
    assert opened.size("a/b") is None
    opened.remove(["a/b"])


OPERATIONS: dict[str, Callable[[Bucket], object]] = {
    "write": lambda bucket: bucket.write("a", b""),
    "create": lambda bucket: bucket.put_if_absent("a", b""),
    "list": lambda bucket: bucket.list("a"),
    "walk": lambda bucket: list(bucket.walk("a")),
}
ALL = {
    **OPERATIONS,
    "read": lambda bucket: bucket.read("a"),
    "size": lambda bucket: bucket.size("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_named(bucket: str, operation: str) -> None:
    missing, _ = open_bucket(f"{bucket}-missing")
    with pytest.raises(
        StoreError,
        match=f"^{bucket}-missing: no such bucket; make it, or give another$",
    ):
        OPERATIONS[operation](missing)


@pytest.mark.parametrize("operation", ALL)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, "AccessDenied"), "refused"),
        ((403, "InvalidAccessKeyId"), "refused"),
        ((401, "Unauthorized"), "refused"),
        ((400, "ExpiredToken"), "refused|expired credentials"),
    ],
)
def test_refused_credentials_end_at_once_with_what_to_check(
    opened: Bucket,
    s3_server: S3Server,
    operation: str,
    answer: tuple[int, str],
    message: str,
) -> None:
    assert opened.size("a") is None
    with s3_server.faults(Faults()) as faults:
        faults.told = lambda method, path: answer
        with pytest.raises(StoreError, match=f"{opened.name}/a: ({message})") as caught:
            ALL[operation](opened)
        assert len(faults.requests) <= 2
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    told = "".join(traceback.format_exception(caught.value))
    assert "AKIATESTS" not in told
    assert SECRET not in told
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens@-1/metadata.json", "credentials", "latest"])
def test_no_name_of_an_object_is_taken_for_what_is_wrong(
    opened: Bucket,
    s3_server: S3Server,
    name: str,
) -> None:
    opened.write(name, b"data")
    with s3_server.faults(Faults()) as faults:
        lost = iter(["reset"] * 2)
        faults.told = lambda method, path: next(lost, None)
        opened.put_if_absent(name, b"data")
        assert faults.counts == {"reset": 2}


@pytest.mark.parametrize(
    ("status", "n_requests"),
    [(408, 2), (429, 2), (400, 1), (403, 1), (416, 1)],
)
def test_answers_without_a_word_are_judged_by_their_number(
    opened: Bucket,
    s3_server: S3Server,
    status: int,
    n_requests: int,
) -> None:
    opened.write("a", b"data")
    with s3_server.faults(Faults()) as faults:
        once = iter([(status, "Unheard")])
        faults.told = lambda method, path: next(once, None)
        if n_requests == 1:
            with pytest.raises(StoreError, match=rf"refused \({status}\)"):
                opened.size("a")
        else:
            assert opened.size("a") == 4
        assert len(faults.requests) == n_requests


@pytest.mark.parametrize("kind", ["reset", "lost", "stall"])
def test_a_fault_at_the_first_contact_is_survived(
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("APECACHE_REQUEST_SECONDS", "0.3")
    with s3_server.faults(Faults()) as faults:
        once = iter([kind])
        faults.told = lambda method, path: next(once, None)
        assert open_bucket(bucket)[0].put_if_absent("a", b"")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize("operation", ALL)
def test_an_endpoint_that_is_not_there_is_given_up(
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    host: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:9")
    monkeypatch.setenv("APECACHE_RETRY_SECONDS", "0.2")
    opened, _ = open_bucket(bucket)
    with pytest.raises(
        StoreError,
        match=rf"the object storage at http://{re.escape(host)}:9 does not answer; check the network",
    ):
        ALL[operation](opened)


def test_without_credentials_the_variables_are_named(
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("APECACHE_RETRY_SECONDS", "0.2")
    with pytest.raises(StoreError, match="no credentials; give AWS_ACCESS_KEY_ID"):
        open_bucket(bucket)[0].read("a")


# --- what goes wrong for a while ------------------------------------------------------------------


@pytest.mark.parametrize("operation", ALL)
@pytest.mark.parametrize("kind", ["503", "reset", "lost", "half", "stall"])
def test_every_operation_survives_every_fault(
    bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    kind: str,
) -> None:
    monkeypatch.setenv("APECACHE_REQUEST_SECONDS", "0.3")
    opened, _ = open_bucket(bucket)
    opened.write("a", b"")
    opened.write("b", bytes(1000))
    with s3_server.faults(Faults()) as faults:
        once = iter([kind, kind])
        faults.told = lambda method, path: next(once, None)
        ALL[operation](opened)
        assert faults.counts == {kind: 2}
    assert opened.read("b") == bytes(1000)


def test_an_outage_is_waited_out_and_a_longer_one_is_not(
    opened: Bucket,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened.write("a", b"data")
    with s3_server.faults(Faults()) as faults:
        end = time.monotonic() + 1.5
        faults.told = lambda method, path: "503" if time.monotonic() < end else None
        assert opened.read("a") == b"data"
        faults.told = lambda method, path: "503"
        monkeypatch.setenv("APECACHE_RETRY_SECONDS", "0.2")
        with pytest.raises(StoreError, match="does not answer"):
            opened.read("a")


def test_objects_read_ahead_come_in_order(opened: Bucket) -> None:
    for number in range(40):
        opened.write(f"{number}", b"%d" % number)
    assert list(opened.read_all(f"{number}" for number in range(40))) == [
        b"%d" % number for number in range(40)
    ]
    first = opened.read_all(f"{number}" for number in range(40))
    assert next(first) == b"0"
    first.close()


def test_a_listing_of_many_pages_is_whole(opened: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    monkeypatch.setattr("apecache.storage.bucket.BULK", 7)
    names = [f"many/{number:02d}" for number in range(35)]
    for name in names:
        opened.write(name, b"")
    assert sorted(entry.key for entry in opened.walk("many")) == names
    assert len(opened.list("many")[1]) == 35
    opened.remove(names)
    assert opened.list("many") == ([], [])


def test_obstore_is_loaded_only_where_it_is_needed() -> None:
    command = (
        "import sys, apecache.store.reader, apecache.data.sources; print('obstore' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"


def test_other_storage_is_opened_by_what_the_environment_knows_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    assert open_bucket("gs://bucket/a")[0].name == "gs://bucket"
    with pytest.raises(
        StoreError,
        match=r"^az://container: .*; give AZURE_STORAGE_ACCOUNT_NAME and .* environment$",
    ):
        open_bucket("az://container/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "tests")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    assert open_bucket("az://container/a")[1] == "a"
