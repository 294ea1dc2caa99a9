"""The search page over HTTP, by a real server and plain sockets: what it finds, refuses and never
gives away."""

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from apecache_cli.app import app
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from starlette.datastructures import Headers

from apecache.errors import MismatchError, MissingExtraError, OptionError
from apecache.report import serve
from apecache.report.search_page import LONGEST, MOST
from apecache.report.serve import ServeSpec, is_loopback, make_server
from apecache.report.web import MOST_BYTES, Guard
from apecache.search.query import Query, SearchIndex
from apecache.store.reader import FeatureStore

runner = CliRunner()
BOUNDARY = "-----apecache"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    @property
    def problem(self) -> str:
        found = re.search(r'<p class="problem[^>]*>(.*?)</p>', self.text)
        return found.group(1) if found else ""

    @property
    def rows(self) -> list[int]:
        """Of the images found."""
        return [int(row) for row in re.findall(r'<a href="/\?like=(\d+)&amp;', self.text)]


class Served(NamedTuple):
    port: int
    index: SearchIndex
    folder: Path

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body or None, sent)
            answer = connection.getresponse()
            return Answer(
                answer.status,
                {k.lower(): v for k, v in answer.getheaders()},
                answer.read(),
            )
        finally:
            connection.close()

    def send(self, picture: bytes, name: str = "photo.png", **fields: str) -> Answer:
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
            for k, v in fields.items()
        ]
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "\r\n"
        )
        body = (
            "".join(parts).encode() + head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()
        )
        return self.ask(
            "/search",
            "POST",
            body,
            Content_Type=f"multipart/form-data; boundary={BOUNDARY}",
        )


@pytest.fixture(scope="module")
def served(tiny_index: Path, shapes_once: Path) -> Iterator[Served]:
    server, sockets, url = make_server(ServeSpec(tiny_index, port=0, device="cpu"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(
        int(url.rstrip("/").rsplit(":", 1)[1]),
        SearchIndex.open(tiny_index, device="cpu"),
        shapes_once.parent,
    )
    server.should_exit = True
    thread.join(30)
    sockets[0].close()


def png(color: str = "red", side: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


# --- what it finds --------------------------------------------------------------------------------


def test_words_find_what_search_finds(served: Served) -> None:
    answer = served.ask("/?q=a+red+circle&k=5")
    assert answer.status == 200
    hits = served.index.find(Query(("a red circle",)), 5)
    assert answer.rows == [served.index.row_of_key[hit.key] for hit in hits]
    assert [f"{hit.score:.3f}" for hit in hits] == re.findall(
        r"</span>(-?\d\.\d{3})</span>",
        answer.text,
    )


def test_an_image_that_is_sent_finds_captions_or_images(served: Served) -> None:
    picture = (served.folder / "images/blue-square-0.png").read_bytes()
    photo = Query(images=(served.folder / "images/blue-square-0.png",))
    for target in ("", "images"):
        answer = served.send(picture, target=target, k="4")
        hits = served.index.find(photo, 4, target or None)  # type: ignore[arg-type]
        assert answer.rows == [served.index.row_of_key[hit.key] for hit in hits]
        assert all(hit.caption in answer.text for hit in hits)
    assert "data:image/jpeg;base64," in answer.text


def test_like_this_and_less_of_are_sums_and_differences(served: Served) -> None:
    key = served.index.image_rows[3]["key"]
    assert served.ask("/?like=3&target=images&k=1").rows == [3]
    answer = served.ask("/?q=a+circle&like=3&not=red&target=images&k=6")
    hits = served.index.find(Query(("a circle",), ("red",), (key,)), 6, "images")
    assert answer.rows == [served.index.row_of_key[hit.key] for hit in hits]
    assert 'value="3" checked' in answer.text


def test_a_form_without_an_image_leads_to_an_address_that_can_be_kept(served: Served) -> None:
    answer = served.send(b"", name="", q="a dog & a cat", k="3", target="")
    assert (answer.status, answer.headers["location"]) == (303, "/?q=a+dog+%26+a+cat&k=3")
    assert served.ask(answer.headers["location"]).status == 200


@pytest.mark.parametrize(
    "words",
    ["собака на снегу", "雪の中の犬", "كلب في الثلج", "a\x00b\x1b[31m", "\U0001f415", "%ff%fe"],
)
def test_words_of_any_language_are_answered(served: Served, words: str) -> None:
    from urllib.parse import quote

    assert served.ask(f"/?q={quote(words)}&k=2").status == 200


def test_words_that_name_a_file_of_this_machine_are_words(served: Served) -> None:
    from urllib.parse import quote

    path = served.folder / "images/red-circle-0.png"
    assert path.is_file()
    assert Query((str(path),), files=True).modality == "images"
    answer = served.ask(f"/?q={quote(str(path))}&k=3")
    as_words = served.index.find(Query((str(path),), files=False), 3)
    assert answer.rows == [served.index.row_of_key[hit.key] for hit in as_words]
    assert served.ask("/?q=/etc/passwd.png&k=1").status == 200


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_index_encoded_anew(served: Served) -> None:
    for row, item in enumerate(served.index.image_rows):
        answer = served.ask(f"/image/{row}")
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        original = (served.folder / item["key"]).read_bytes()
        assert answer.body[:3] == b"\xff\xd8\xff"
        assert answer.body != original
        with (
            Image.open(io.BytesIO(answer.body)) as shown,
            Image.open(io.BytesIO(original)) as wanted,
        ):
            assert shown.size == wanted.size
            middle = [image.convert("RGB").getpixel((24, 30)) for image in (shown, wanted)]
            assert max(abs(a - b) for a, b in zip(*middle, strict=True)) < 30


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/image/12", 404),
        ("/image/999999999999999999999", 404),
        ("/image/-1", 404),
        ("/image/0/../../etc/passwd", 404),
        ("/image/..%2f..%2fpairs.tsv", 404),
        ("/image/images/red-circle-0.png", 404),
        ("/images/red-circle-0.png", 404),
        ("/../pairs.tsv", 404),
        ("/style.css/../../x", 404),
        ("/docs", 404),
    ],
)
def test_nothing_else_is_served(served: Served, path: str, status: int) -> None:
    answer = served.ask(path)
    assert answer.status == status
    assert answer.problem
    assert b"PNG" not in answer.body[:8]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("q=", 400, "query is empty"),
        ("q=+++", 400, "query is empty"),
        ("not=dog", 400, "query is empty"),
        ("q=dog&k=13", 400, "the index has 12 images"),
        ("q=dog&k=25&target=captions", 400, "the index has 24 captions"),
        ("q=dog&k=0", 400, "whole number from 1 on"),
        ("q=dog&k=-1", 400, "whole number"),
        ("q=dog&k=1e3", 400, "whole number"),
        ("q=dog&k=٣", 400, "whole number"),
        ("q=dog&k=99999999999999999999", 400, "whole number"),
        ("q=dog&target=files", 400, "either images or captions"),
        ("like=12", 404, "no image number 12"),
        ("like=x", 400, "whole number"),
        ("&".join(f"like={i}" for i in range(9)), 400, "At most 8 images"),
        ("q=" + "x" * (LONGEST + 1), 400, "too long"),
        ("q=dog&not=dog", 400, "cancel out"),
    ],
)
def test_a_query_that_makes_no_sense_is_answered_in_words(
    served: Served,
    query: str,
    status: int,
    words: str,
) -> None:
    from urllib.parse import quote

    answer = served.ask("/?" + quote(query, safe="=&+"))
    assert (answer.status, words in answer.problem) == (status, True), answer.problem
    assert 'role="alert"' in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("picture", "status", "words"),
    [
        (b"GIF89a no image", 422, "cannot be"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "expected JPEG"),
        (png()[:60], 422, "cannot be decoded"),
        (b"\x00" * 1000, 422, "expected JPEG"),
    ],
)
def test_an_image_that_cannot_be_read_is_said_so(
    served: Served,
    picture: bytes,
    status: int,
    words: str,
) -> None:
    answer = served.send(picture)
    assert (answer.status, words in answer.problem) == (status, True), answer.text[-500:]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(served: Served) -> None:
    buffer = io.BytesIO()
    Image.new("1", (60000, 1000)).save(buffer, "PNG")
    answer = served.send(buffer.getvalue())
    assert (answer.status, "pixels" in answer.problem) == (422, True)


def test_too_large_a_request_is_refused_with_and_without_its_length(served: Served) -> None:
    answer = served.send(b"x" * (MOST_BYTES + 1))
    assert (answer.status, "32 MB at most" in answer.text) == (413, True)
    with socket.create_connection(("127.0.0.1", served.port), 60) as connection:
        kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
        head = (
            f"POST /search HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nTransfer-Encoding: chunked\r\n"
            "\r\n"
        )
        connection.sendall(head.encode())
        begin = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        ).encode()
        chunk = b"%x\r\n%s\r\n"
        try:
            connection.sendall(chunk % (len(begin), begin))
            for _ in range(MOST_BYTES // 2**20 + 2):
                connection.sendall(chunk % (2**20, b"x" * 2**20))
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert b" 413 " in connection.recv(100)
    assert served.ask("/").status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "192.168.0.1", "[::2]"],
)
def test_a_host_that_is_not_ours_is_refused(served: Served, host: str) -> None:
    assert served.ask("/", Host=host).status == 421
    assert served.ask("/image/0", Host=host).status == 421


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        ("GET / HTTP/1.1\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
        ("GET / HTTP/1.0\r\n", 400),
        # An empty Host is well-formed, but does not name this server.
        ("GET / HTTP/1.1\r\nHost:\r\n", 421),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n", 421),
        ("GET / HTTP/1.1\r\nHost: localhost\r\n", 200),
        ("GET / HTTP/1.0\r\nHost: localhost\r\n", 200),
    ],
)
def test_a_request_has_exactly_one_host(served: Served, request_head: str, status: int) -> None:
    """RFC 9112, section 3.2: 400 without Host or with several; RFC 9110, section 15.5.20: 421."""
    with socket.create_connection(("127.0.0.1", served.port), 60) as connection:
        connection.sendall(f"{request_head}Connection: close\r\n\r\n".encode())
        assert int(connection.recv(100).split(b" ")[1]) == status
    # Whichever HTTP parser the server has, the guard decides alike.
    lines = [line.split(":", 1) for line in request_head.split("\r\n")[1:] if line]
    headers = Headers(raw=[(b"host", value.strip().encode()) for _, value in lines])
    problem = Guard(None, [], remote=False)._problem("GET", headers)  # type: ignore[arg-type]
    assert (problem[0] if problem else 200) == status


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8080", "127.8.8.8"],
)
def test_names_of_this_machine_are_ours(served: Served, host: str) -> None:
    assert served.ask("/", Host=host).status == 200


def test_a_server_for_others_answers_to_addresses_and_its_own_name_only() -> None:
    guard = Guard(None, ["Box.Local"], remote=True)  # type: ignore[arg-type]
    assert all(
        guard.allows(host)
        for host in ("box.local:80", "192.168.0.7", "[fe80::1]:8080", "localhost")
    )
    assert not any(
        guard.allows(host) for host in ("evil.example", "", "192.168.0.7.evil.example", "[evil]")
    )


def test_a_form_of_another_site_is_refused(served: Served) -> None:
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{served.port}"):
        assert served.ask("/search", "POST", b"q=dog", Origin=origin).status == 403
    own = f"http://127.0.0.1:{served.port}"
    kind = "application/x-www-form-urlencoded"
    assert served.ask("/search", "POST", b"q=dog", Origin=own, Content_Type=kind).status == 303


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(served: Served, method: str) -> None:
    assert served.ask("/", method).status == 405


@pytest.mark.parametrize(
    "path",
    ["/", "/?q=dog&k=1", "/?q=", "/image/0", "/image/99", "/style.css", "/nothing"],
)
def test_every_answer_forbids_scripts_and_guessing(served: Served, path: str) -> None:
    for headers in ({}, {"Host": "evil.example"}):
        answer = served.ask(path, **headers)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert b"<script" not in answer.body


def test_an_error_of_ours_is_a_page_without_details(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(SearchIndex, "find", broken)
    answer = served.ask("/?q=dog&k=1")
    assert answer.status == 500
    assert "Something went wrong" in answer.problem
    assert "SECRET" not in answer.text
    monkeypatch.undo()
    assert served.ask("/?q=dog&k=1").status == 200


def test_many_at_once_are_answered_alike(served: Served) -> None:
    answers: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(served.ask("/?q=a+blue+square&k=5").rows))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    assert all(rows == answers[0] for rows in answers)


# --- how it begins and ends -----------------------------------------------------------------------


def test_only_this_machine_unless_it_is_asked_for(tiny_index: Path) -> None:
    for host in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(OptionError, match="add --expose"):
            make_server(ServeSpec(tiny_index, host=host))
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.3.2.1")))


def test_a_port_that_is_taken_is_named(tiny_index: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OptionError, match=r"cannot be had .*choose another --port"):
            make_server(ServeSpec(tiny_index, port=taken.getsockname()[1]))


def test_an_index_of_another_head_is_refused_with_both(
    tiny_index: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    from apecache.recipes.recipe import load_recipe
    from apecache.train.batches import SplitSpec
    from apecache.train.fit_head import fit_head
    from apecache.train.head_data import FitSpec

    recipe = load_recipe(
        "projection",
        ["image.dim=16", "text.dim=16", "schedule.epochs=1", "schedule.batch_size=4"],
    )
    spec = FitSpec(splits=SplitSpec(dev="val"), seed=5, device="cpu")
    fit_head(FeatureStore.open(tiny_store), recipe=recipe, out=tmp_path / "other", spec=spec)
    with pytest.raises(MismatchError, match=r"is of the head [0-9a-f]{16}, .* has [0-9a-f]{16}"):
        make_server(ServeSpec(tiny_index, tmp_path / "other", port=0))


def test_without_the_extra_it_is_named(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(MissingExtraError, match=r"uvicorn is not installed; .*\[serve\]"):
        make_server(ServeSpec(tiny_index))


def test_the_command_says_where_warns_and_ends_cleanly(tiny_index: Path, tiny_run: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "apecache",
        "serve",
        str(tiny_index),
        "--run",
        str(tiny_run),
        "--port",
        "0",
        "--json",
    ]
    more = ["--device", "cpu", "--host", "0.0.0.0", "--expose"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*arguments, *more],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        **pipes,
    )
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    try:
        there = Served(
            int(url.rstrip("/").rsplit(":", 1)[1]),
            SearchIndex.open(tiny_index),
            tiny_index,
        )
        assert there.ask("/?q=dog&k=1").status == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "there is no password" in said
    assert "Traceback" not in said


def test_the_commands_errors_have_their_exit_codes(tiny_index: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["serve", str(tmp_path / "none")]).exit_code == 3
    wrong = runner.invoke(app, ["serve", str(tiny_index), "--host", "0.0.0.0"])
    assert (wrong.exit_code, "--expose" in wrong.output) == (2, True)


def test_a_page_holds_fewer_results_than_a_large_index_has() -> None:
    assert MOST == 200
