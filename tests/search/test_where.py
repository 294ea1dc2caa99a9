"""Conditions, thresholds, shorter vectors and codes of an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.errors import OptionError
from apecache.search.calibrate import nothing_found_score
from apecache.search.exact import exact_search, shortened
from apecache.search.faiss_index import build_vectors, measured
from apecache.search.index import build_index
from apecache.search.query import SearchIndex
from apecache.search.where import Condition, parse_where, rows_where
from apecache.store.reader import FeatureStore

ROWS = [
    {"key": "a.jpg", "caption": "a dog", "split": "val", "label": "dog"},
    {"key": "b.jpg", "caption": "a cat", "split": "val", "label": "cat"},
    {"key": "c.jpg", "caption": "a dog", "split": "train", "label": "traffic light"},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("split=val", [0, 1]),
        ("split = val AND label=dog", [0]),
        ("label!=dog", [1, 2]),
        ('label="traffic light"', [2]),
        ("label = 'traffic light'", [2]),
        ("key~?.jpg and caption~*dog", [0, 2]),
        ("language=de", []),
    ],
)
def test_conditions_choose_rows(text: str, expected: list[int]) -> None:
    assert rows_where(parse_where(text), ROWS).tolist() == expected


def test_faults_of_conditions_are_named() -> None:
    for text, message in (
        ("splt=val", "no field 'splt'.*split"),
        ("split", "is no condition"),
        ("split=val and", "'' is no condition"),
        ('label="dog', "close every quote"),
    ):
        with pytest.raises(OptionError, match=message):
            parse_where(text)
    assert parse_where("key=a=b") == [Condition(field="key", operator="=", value="a=b")]


@pytest.fixture
def vectors() -> Callable[..., Any]:
    def make(n: int, dim: int = 32, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    return make


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw"])
def test_a_search_among_rows_is_exact(kind: str, vectors: Callable[..., Any]) -> None:
    stored, queries = vectors(300), vectors(4, seed=1)
    index, _ = build_vectors(kind, stored)
    rows = np.arange(7, 300, 3)
    scores, found = index.search_among(rows, queries, 5)
    assert np.isin(found, rows).all()
    kept = index.vectors(rows)
    _, expected = exact_search(kept, queries, 5)
    assert np.array_equal(found, rows[expected])
    none, _ = index.search_among(np.array([], dtype=np.int64), queries, 5)
    assert none.shape == (4, 0)
    assert scores.shape == (4, 5)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.95), ("binary", 0.8)])
def test_codes_find_most_of_the_nearest(
    kind: str,
    least: float,
    vectors: Callable[..., Any],
) -> None:
    stored, queries = vectors(2000, dim=64), vectors(50, dim=64, seed=1)
    index, report = build_vectors(kind, stored)
    report = measured(report, index, stored, queries)
    assert report.recall_at_10 is not None
    assert report.recall_at_10 >= least


def test_recall_of_shorter_vectors_is_against_whole_ones(vectors: Callable[..., Any]) -> None:
    stored, queries = vectors(500), vectors(40, seed=1)
    index, report = build_vectors("flat", shortened(stored, 8))
    report = measured(report, index, stored, queries, dim=8)
    _, found = exact_search(shortened(stored, 8), shortened(queries, 8), 10)
    _, best = exact_search(stored, queries, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)])
    assert report.recall_at_10 == pytest.approx(share, abs=1e-6)
    assert share < 1


def test_the_threshold_is_what_wrong_results_stay_below(vectors: Callable[..., Any]) -> None:
    images = vectors(200)
    owner = np.repeat(np.arange(200), 2)
    texts = shortened(images[owner] + 0.1 * vectors(400, seed=1), 32)
    found = nothing_found_score(images, texts, owner, np.arange(200))
    scores = texts @ images.T
    scores[np.arange(400), owner] = -1
    assert found == pytest.approx(np.quantile(scores.max(1), 0.95), abs=1e-5)
    assert nothing_found_score(images, texts[:5], owner[:5], np.arange(200)) is None


def test_an_index_of_fewer_values_is_searched_by_them(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("faiss")
    store = FeatureStore.open(tiny_store)
    report = build_index(tiny_run, store, tmp_path / "short", dim=4)
    assert report.dim == 4
    assert report.images.recall_at_10 is not None
    index = SearchIndex.open(tmp_path / "short", device="cpu")
    assert len(index.search("a red circle", k=3)) == 3
    assert index.embed(_query("a red circle")).shape == (1, 4)
    with pytest.raises(OptionError, match="the embeddings have 16"):
        build_index(tiny_run, store, tmp_path / "long", dim=17)


def _query(text: str) -> Any:
    from apecache.search.query import Query

    return Query(like=[text])


def test_the_command_filters_and_finds_nothing(tiny_index: Path) -> None:
    pytest.importorskip("faiss")
    command = ["search", str(tiny_index), "a red circle", "-k", "20", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--where", "split=val", "--json"])
    assert result.exit_code == 0, result.output
    hits = json.loads(result.stdout)["hits"]
    assert len(hits) == 4
    everything = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["hits"]
    kept = [hit["key"] for hit in everything if hit["key"] in {hit["key"] for hit in hits}]
    assert kept == [hit["key"] for hit in hits]
    nothing = CliRunner().invoke(app, [*command, "--min-score", "0.99999"])
    assert nothing.exit_code == 0
    assert "nothing found" in nothing.output
    limited = CliRunner().invoke(app, [*command, "--min-score", str(hits[0]["score"]), "--json"])
    scores = [hit["score"] for hit in json.loads(limited.stdout)["hits"]]
    assert min(scores) >= hits[0]["score"]
    for wrong in ("high", "nan", "1.5"):
        assert CliRunner().invoke(app, [*command, "--min-score", wrong]).exit_code == 2
