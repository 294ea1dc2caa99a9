"""An S3 server on loopback (moto's), with faults on request: what tests of object storage
import."""

import io
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

SECRET = "wJalrXUtnFEMI/K7MDENG/secret+of+tests"
KINDS = ("503", "reset", "lost", "half", "stall")
STALL_SECONDS = 0.5
Answer = tuple[int, str]
"""Status and S3's code of an error."""


class Faults:
    """Which requests go wrong, by chance or as told. `counts`: how many of each kind did.

    503: refused. reset: the connection ends before the request is looked at. lost: it is carried
    out, and the connection ends before the answer. half: in the middle of the answer. stall: no
    answer until the client is tired.
    """

    def __init__(self, share: float = 0.0, kinds: Iterable[str] = KINDS, seed: int = 0) -> None:
        self.share = share
        self.kinds = tuple(kinds)
        self.chance = random.Random(seed)
        self.told: Callable[[str, str], str | Answer | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def next(self, method: str, path: str) -> str | Answer | None:
        with self.lock:
            self.requests.append((method, path))
            fault = self.told(method, path)
            if fault is None and self.chance.random() < self.share:
                fault = self.chance.choice(self.kinds)
            if fault is not None:
                self.counts[str(fault)] += 1
            return fault


class Handler(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass

    def run_wsgi(self) -> None:
        faults: Faults = self.server.faults  # type: ignore[attr-defined]
        match faults.next(self.command, self.path):
            case None:
                super().run_wsgi()
            case "503":
                self._answer(503, "SlowDown")
            case "reset":
                self._reset()
            case "lost":
                self._whole_answer()
                self._reset()
            case "half":
                answer = self._whole_answer()
                self.wfile.write(answer[: len(answer) // 2])
                self._reset()
            case "stall":
                self._read_body()
                time.sleep(STALL_SECONDS)
                self._reset()
            case (int() as status, str() as code):
                self._answer(status, code)

    def _whole_answer(self) -> bytes:
        real = self.wfile  # type: ignore[assignment]
        self.wfile = io.BytesIO()  # type: ignore[assignment]
        try:
            super().run_wsgi()
            return self.wfile.getvalue()  # type: ignore[attr-defined, no-any-return]
        finally:
            self.wfile = real

    def _answer(self, status: int, code: str) -> None:
        self._read_body()
        key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        text = f"<Error><Code>{code}</Code><Message>no</Message><AWSAccessKeyId>{key}</AWSAccessKeyId></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _read_body(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


class S3Server:
    """`with S3Server() as server: server.new_bucket()`. `heeds_conditions`: whether it knows
    `If-None-Match`."""

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.heeds_conditions = True
        self.server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=Handler)
        self.server.daemon_threads = True
        self.server.faults = Faults()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "S3Server":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self) -> dict[str, str]:
        about = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIATESTS",
        }
        return {**about, "AWS_SECRET_ACCESS_KEY": SECRET, "NO_PROXY": "127.0.0.1"}

    def new_bucket(self) -> str:
        url = f"s3://bucket-{next(self.numbers)}"
        self.put(url)
        return url

    def put(self, url: str, data: bytes | None = None) -> None:
        """A bucket, or an object under exactly this name."""
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        connection.request("PUT", url.removeprefix("s3:/"), data)
        assert connection.getresponse().status == 200
        connection.close()

    @contextmanager
    def faults(self, faults: Faults) -> Iterator[Faults]:
        self.server.faults = faults  # type: ignore[attr-defined]
        try:
            yield faults
        finally:
            self.server.faults = Faults()  # type: ignore[attr-defined]

    def _app(self, environ: dict[str, Any], start_response: Any) -> Any:
        if not self.heeds_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if environ["REQUEST_METHOD"] != "PUT":
            return self.moto(environ, start_response)
        with self.lock:  # moto looks and puts in two steps
            return self.moto(environ, start_response)
