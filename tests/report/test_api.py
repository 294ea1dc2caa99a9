"""The JSON interface of `apecache serve`: what it answers, refuses and describes."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("python_multipart", reason="the extra serve is not installed")
pytest.importorskip("faiss")

import asyncio

from PIL import Image

from apecache.data.media import media_below
from apecache.report.api import MOST_EMBEDDED
from apecache.report.search_page import MOST, SearchPage
from apecache.report.web import search_app
from apecache.search.query import Query, SearchIndex

BOUNDARY = "-----apecache"


class Client:
    """Call the application in this process, as a server would."""

    def __init__(self, index: SearchIndex, root: Path) -> None:
        self.index = index
        self.app = search_app(SearchPage(index, media_below(str(root))))

    def post(
        self,
        path: str,
        value: Any = None,
        raw: bytes = b"",
        kind: str = "application/json",
        method: str = "POST",
        **headers: str,
    ) -> tuple[int, Any]:
        body = raw if value is None else json.dumps(value).encode()
        named = {"host": "localhost", "content-type": kind, **headers}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), text.encode()) for name, text in named.items()],
            "scheme": "http",
            "server": ("localhost", 80),
        }
        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        asyncio.run(self.app(scope, receive, send))
        content = b"".join(message.get("body", b"") for message in messages[1:])
        return messages[0]["status"], json.loads(content)

    def post_form(self, path: str, value: Any, pictures: list[bytes]) -> tuple[int, Any]:
        lines = [
            f"--{BOUNDARY}".encode(),
            b'Content-Disposition: form-data; name="json"',
            b"",
            json.dumps(value).encode(),
        ]
        for picture in pictures:
            name = b'Content-Disposition: form-data; name="image"; filename="a.png"'
            lines += [f"--{BOUNDARY}".encode(), name, b"", picture]
        lines.append(f"--{BOUNDARY}--".encode())
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self.post(path, raw=b"\r\n".join(lines) + b"\r\n", kind=kind)


@pytest.fixture(scope="module")
def client(tiny_index: Path, shapes_once: Path) -> Client:
    return Client(SearchIndex.open(tiny_index, device="cpu"), shapes_once.parent)


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_words_find_what_search_finds(client: Client) -> None:
    status, found = client.post("/api/search", {"text": "a red circle", "k": 3})
    assert status == 200
    hits = client.index.find(Query(("a red circle",)), 3)
    assert [hit["key"] for hit in found["hits"]] == [hit.key for hit in hits]
    assert found["target"] == "images"
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in hits])


def test_filters_keys_and_least_scores_are_those_of_search(client: Client) -> None:
    key = client.index.image_rows[2]["key"]
    asked = {"keys": [key], "target": "images", "where": "split=val", "k": 20}
    _, found = client.post("/api/search", asked)
    hits = client.index.find(Query(keys=(key,)), 20, "images", where="split=val")
    assert [hit["key"] for hit in found["hits"]] == [hit.key for hit in hits]
    _, none = client.post("/api/search", {**asked, "min_score": 2.0})
    assert none["hits"] == []


def test_an_uploaded_image_is_a_term(client: Client) -> None:
    status, found = client.post_form("/api/search", {"k": 2, "target": "images"}, [png("red")])
    assert status == 200
    image = Image.new("RGB", (48, 48), "red")
    hits = client.index.find(Query(images=(image,)), 2, "images")
    assert [hit["key"] for hit in found["hits"]] == [hit.key for hit in hits]


def test_embeddings_are_those_of_the_index(client: Client) -> None:
    status, found = client.post_form("/api/embed", {"texts": ["a dog", "red"]}, [png("blue")])
    assert status == 200
    expected = [client.index.embed(Query((text,)))[0].numpy() for text in ("a dog", "red")]
    image = Image.new("RGB", (48, 48), "blue")
    expected.append(client.index.embed(Query(images=(image,)))[0].numpy())
    assert found["dim"] == len(expected[0])
    assert np.allclose(found["embeddings"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "value", "status", "word"),
    [
        ("/api/search", {"text": "a", "k": MOST + 1}, 400, "k:"),
        ("/api/search", {"txt": "a"}, 400, "txt"),
        ("/api/search", {}, 400, "empty"),
        ("/api/search", [], 400, "request"),
        ("/api/search", {"text": "a", "where": "colour=red"}, 400, "no field"),
        ("/api/search", {"keys": ["no such key"]}, 422, "no such key"),
        ("/api/search", {"text": "/etc/passwd.png", "target": "pictures"}, 400, "target"),
        ("/api/embed", {"texts": []}, 400, "Give 1 to"),
        ("/api/embed", {"texts": ["a"] * (MOST_EMBEDDED + 1)}, 400, "texts"),
        ("/api/nothing", {}, 404, "Not Found"),
    ],
)
def test_requests_that_make_no_sense_are_refused_in_json(
    client: Client,
    path: str,
    value: Any,
    status: int,
    word: str,
) -> None:
    found, answer = client.post(path, value)
    assert found == status, answer
    assert word in answer["error"]


def test_what_is_not_json_or_not_an_image_is_refused(client: Client) -> None:
    assert client.post("/api/search", raw=b"{")[0] == 400
    assert client.post_form("/api/search", {}, [b"no image"])[0] == 422
    assert client.post_form("/api/search", {}, [png("red"), png("blue")])[0] == 400


def test_the_description_names_every_field(client: Client) -> None:
    status, described = client.post("/api/openapi.json", method="GET")
    assert status == 200
    assert described["openapi"].startswith("3.")
    content = described["paths"]["/api/search"]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    assert {"text", "unlike", "keys", "k", "target", "where", "min_score"} <= set(properties)
    assert set(described["paths"]) == {"/api/search", "/api/embed"}
