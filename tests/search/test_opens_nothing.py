"""What a user types is words: no text becomes a file unless the caller asks for it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

import apecache
from apecache.evaluate.zeroshot import class_embeddings
from apecache.search.query import Query, SearchIndex

WATCHED: list[set[str]] = []
"""Where the hook writes; one hook stays for the life of the process, for Python cannot remove
it."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHED:
        WATCHED[-1].add(str(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[set[str]]:
    """Names of all files that Python opens meanwhile."""
    names: set[str] = set()
    WATCHED.append(names)
    try:
        yield names
    finally:
        WATCHED.remove(names)


@pytest.fixture(scope="module")
def index(tiny_index: Path) -> SearchIndex:
    """Opened, with its encoders and vectors loaded."""
    opened = SearchIndex.open(tiny_index, device="cpu")
    opened.find(Query(("red",), keys=("images/red-circle-0.png",)), 1, "captions")
    opened.search("red", 1)
    return opened


@pytest.fixture(params=["image", "text", "missing", "passwd"])
def name(request: pytest.FixtureRequest, shapes_once: Path, tmp_path: Path) -> str:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    photo = shapes_once.parent / "images" / "red-circle-0.png"
    names = {
        "image": str(photo),
        "text": str(secret),
        "missing": "photo.jpg",
        "passwd": "/etc/passwd",
    }
    return names[request.param]


USES: dict[str, Callable[[SearchIndex, str], object]] = {
    "search": lambda index, text: index.search(text, 3),
    "search for captions": lambda index, text: index.search(text, 3, "captions"),
    "search by CSLS": lambda index, text: index.search(text, 3, csls=True),
    "find": lambda index, text: index.find(Query((text, "red")), 3),
    "find unlike": lambda index, text: index.find(Query(("red",), (text,)), 3),
    "embed": lambda index, text: index.embed(Query((text,))),
}


@pytest.mark.parametrize("use", USES)
def test_no_text_is_opened_or_looked_for(
    use: str,
    name: str,
    index: SearchIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apecache.search.query.image_path", None)  # looking for the file would fail
    with watched() as opened:
        USES[use](index, name)
    assert name not in opened
    assert not {path for path in opened if path.endswith((".png", ".jpg", ".txt", "passwd"))}


def test_a_name_of_a_file_means_its_words(index: SearchIndex, tiny_run: Path, name: str) -> None:
    words = apecache.load(tiny_run, device="cpu").encode_text([name])[0]
    found = index.embed(Query((name,))).numpy()[0]
    assert float(words @ found) > 1 - 1e-5  # the texts are alone in their batches both times


def test_the_hook_sees_a_file_that_is_asked_for(index: SearchIndex, shapes_once: Path) -> None:
    """Without this the tests above would pass with a hook that sees nothing."""
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    for query in (Query((photo,), files=True), Query(images=(photo,))):
        with watched() as opened:
            hits = index.find(query, 1, "images")
        assert photo in opened
        assert hits[0].key == "images/red-circle-0.png"
    with watched() as opened:
        by_search = index.search(photo, 3, files=True)
    assert photo in opened
    assert by_search == index.find(Query(images=(photo,)), 3)


def test_texts_and_class_names_are_words(index: SearchIndex, tiny_run: Path, name: str) -> None:
    model = apecache.load(tiny_run, device="cpu")
    model.encode_text(["red"])
    with watched() as opened:
        vectors = model.encode_text([name, "red"])
        classes = class_embeddings(model._embed_texts, [name, "red"], ["{}"])
    assert name not in opened
    assert np.isfinite(vectors).all()
    assert classes.shape == (2, model.dim)


def test_the_command_line_opens_the_photo_of_its_own_user(
    index: SearchIndex,
    shapes_once: Path,
) -> None:
    photo = shapes_once.parent / "images" / "blue-square-0.png"
    arguments = [
        "search",
        str(index.path),
        str(photo),
        "--target",
        "images",
        "--device",
        "cpu",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["hits"][0]["key"] == "images/blue-square-0.png"
    missing = CliRunner().invoke(app, ["search", str(index.path), "gone.jpg", "--device", "cpu"])
    assert missing.exit_code == 3
    assert "query image cannot be read" in missing.output
