"""Kinds, updates by key, and queries made of words, pictures and keys."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from close_vectors import assert_close_vectors
from tiny import Grown, extract_tiny

from apecache.errors import DataError, MismatchError, OptionError, RunError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.fingerprint import Fingerprint
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads, save_heads
from apecache.search.faiss_index import build_vectors
from apecache.search.index import (
    build_index,
    read_description,
    read_rows,
    require_same,
    update_index,
)
from apecache.search.query import Hit, Query, SearchIndex
from apecache.store.reader import FeatureStore

CHANCE = np.random.default_rng(0)
N = 700
IMAGE, TEXT = (CHANCE.standard_normal((n, 12)).astype(np.float32) for n in (N, 2 * N))


def heads(seed: int = 0) -> TrainedHeads:
    torch.manual_seed(seed)
    marks = (
        Fingerprint(fields={"modality": m, "weights": name})
        for m, name in (("image", "pixels"), ("text", "words"))
    )
    built = build_heads(HeadSpec(dim=8), text=HeadSpec(dim=8), image_dim=12, text_dim=12)
    return TrainedHeads(
        *(
            TrainedSide(head=head.eval(), encoder={}, fingerprint=mark)
            for head, mark in zip(built, marks, strict=True)
        ),
        10.0,
    )


@pytest.fixture(scope="module")
def make(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store of some of the made-up images, in an order, with two captions each."""

    def store(images: list[int]) -> FeatureStore:
        texts = [2 * i + j for i in images for j in (0, 1)]
        folder = tmp_path_factory.mktemp("made") / "store"
        keys = [f"images/{i:04}.jpg" for i in images]
        captions = [f"caption {t}" for t in texts]
        rows = [row for row in range(len(images)) for _ in (0, 1)]
        # The file's hash follows the row in these stores, so that images that move count as others.
        made: FeatureStore = write_store(
            folder,
            IMAGE[images],
            TEXT[texts],
            rows,
            ["train"] * len(images),
            keys=keys,
            captions=captions,
        )
        return made

    return store


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_heads(heads(), tmp_path / "run")
    return tmp_path / "run"


# --- kinds and updates ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "IVF16,SQ8"])
def test_an_approximate_index_says_how_well_it_finds(
    kind: str,
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    report = build_index(run, make(list(range(N))), tmp_path / "index", kind=kind)
    told = json.loads((tmp_path / "index" / "index.json").read_text())
    assert told["kind"] == kind
    for part, found in (("images", report.images), ("texts", report.texts)):
        assert told["built"][part] == vars(found)
        assert 0.5 < (found.recall_at_10 or 0) <= 1
        assert found.n_queries == {"images": 1000, "texts": N}[part]
    opened = SearchIndex.open(
        tmp_path / "index",
        device="cpu",
        nprobe=None if kind == "hnsw" else 16,
    )
    assert opened.find(Query(keys=("images/0123.jpg",)), 1, "images")[0].key == "images/0123.jpg"


def test_too_few_for_a_kind_leaves_nothing(make: Any, run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"20 vectors are too few to train IVF16,Flat, .*use --kind flat",
    ):
        build_index(run, make(list(range(20))), tmp_path / "index", kind="ivf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("kind", ["flat", "ivf", "HNSW4"])
@pytest.mark.parametrize(
    ("after", "added", "removed"),
    [
        (range(680), 40 * 3, 0),
        (range(640), 0, 0),
        (range(600), 0, 40 * 3),
        ([*range(630), *range(680, 700)], 20 * 3, 10 * 3),
    ],
)
def test_an_update_is_what_a_new_index_would_be(
    kind: str,
    after: Any,
    added: int,
    removed: int,
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    build_index(run, make(list(range(640))), tmp_path / "index", kind=kind)
    store = make(list(after))
    report = update_index(run, store, tmp_path / "index")
    moved = 0 if list(after) == list(range(len(after))) else 20
    assert report.n_added - added == report.n_removed - removed
    assert 0 <= report.n_added - added <= moved
    if kind != "ivf" or len(after) >= 39 * 16:
        build_index(run, store, tmp_path / "new", kind=kind)
        for part in ("images", "texts"):
            assert read_rows(tmp_path / "index", part) == read_rows(tmp_path / "new", part)
    told = read_description(tmp_path / "index")
    assert (told["n_images"], told["data"], told["kind"]) == (len(after), store.digest, kind)
    if kind == "flat":
        for part in ("images", "texts"):
            assert_close_vectors(tmp_path / "index", tmp_path / "new", part)
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    for image in (0, 599, list(after)[-1]):
        key = f"images/{image:04}.jpg"
        assert opened.find(Query(keys=(key,)), 1, "images")[0] == Hit(
            rank=1,
            key=key,
            caption=f"caption {2 * image}",
            score=pytest.approx(1),
        )


def test_an_image_whose_file_has_changed_is_another_image(
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    store = make(list(range(30)))
    build_index(run, store, tmp_path / "index")
    right = (tmp_path / "index" / "images.faiss").read_bytes()
    rows = (tmp_path / "index" / "images.jsonl").read_text().splitlines()
    changed = json.dumps({**json.loads(rows[3]), "content": "of an older file"})
    (tmp_path / "index" / "images.jsonl").write_text(
        "\n".join([*rows[:3], changed, *rows[4:]]) + "\n"
    )
    build_vectors("flat", np.eye(8, dtype=np.float32)[np.arange(30) % 8])[0].save(
        tmp_path / "index" / "images.faiss"
    )
    report = update_index(run, store, tmp_path / "index")
    assert (report.n_added, report.n_removed) == (1, 1)
    assert (tmp_path / "index" / "images.faiss").read_bytes() == right


def test_lists_are_learnt_anew_when_there_are_twice_as_many(
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    few = build_index(run, make(list(range(300))), tmp_path / "index", kind="IVF4,Flat")
    same = update_index(run, make(list(range(500))), tmp_path / "index")
    more = update_index(run, make(list(range(N))), tmp_path / "index")
    assert [r.images.trained_on for r in (few, same, more)] == [300, 300, N]


def test_an_index_of_another_head_is_not_updated_and_both_are_named(
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    store = make(list(range(30)))
    build_index(run, store, tmp_path / "index")
    save_heads(heads(1), tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    with pytest.raises(MismatchError, match=r"is of the head .*--overwrite") as caught:
        update_index(tmp_path / "other", store, tmp_path / "index")
    assert caught.value.exit_code == 4
    assert caught.value.differences == (("head", heads(1).digest, heads().digest),)
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before


def test_a_new_head_is_indexed_without_an_encoder(
    make: Any,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for modality in ("image", "text"):
        monkeypatch.setattr(f"apecache.runs.load.load_{modality}_encoder", None)
    store = make(list(range(30)))
    build_index(run, store, tmp_path / "index")
    save_heads(heads(1), tmp_path / "other")
    build_index(tmp_path / "other", store, tmp_path / "index", overwrite=True)
    assert read_description(tmp_path / "index")["head"] == heads(1).digest


def test_an_update_keeps_split_and_kind(make: Any, run: Path, tmp_path: Path) -> None:
    build_index(run, make(list(range(30))), tmp_path / "index", split="train", kind="hnsw")
    description = read_description(tmp_path / "index")
    require_same(description, "train", "hnsw")
    require_same(description, None, None)
    with pytest.raises(OptionError, match="--kind flat: the index has hnsw"):
        require_same(description, None, "flat")
    with pytest.raises(OptionError, match="--split val: the index has train"):
        require_same(description, "val", None)


def test_an_update_of_nothing_or_of_a_damaged_index_is_refused(
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    store = make(list(range(30)))
    with pytest.raises(RunError, match="is not an index"):
        update_index(run, store, tmp_path / "index")
    build_index(run, store, tmp_path / "index")
    shutil.copy(tmp_path / "index" / "texts.faiss", tmp_path / "index" / "images.faiss")
    with pytest.raises(RunError, match=r"images\.faiss does not fit"):
        update_index(run, store, tmp_path / "index")
    told = read_description(tmp_path / "index")
    for damage in ({"images": {"factory": 3}}, {"images": []}, 7):
        (tmp_path / "index" / "index.json").write_text(json.dumps({**told, "built": damage}))
        with pytest.raises(RunError, match="does not say how images were built"):
            update_index(run, store, tmp_path / "index")


def test_an_index_from_before_kinds_is_searched_and_updated(
    make: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    store = make(list(range(30)))
    build_index(run, store, tmp_path / "index")
    told = read_description(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(
        json.dumps({k: told[k] for k in told if k not in ("kind", "built")})
    )
    found = SearchIndex.open(tmp_path / "index", device="cpu").find(
        Query(keys=("images/0003.jpg",)),
        1,
        "images",
    )
    assert found[0].key == "images/0003.jpg"
    assert update_index(run, store, tmp_path / "index").kind == "flat"


def test_a_store_that_grew_by_append_is_taken_up(
    grown: Grown,
    tiny_run: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    table = grown.table.with_name("short.tsv")
    table.write_text("\n".join(grown.table.read_text().splitlines()[:13]) + "\n")
    extract_tiny(
        table,
        store=tmp_path / "first",
        image=tiny_image_encoder,
        text=tiny_text_encoder,
        max_bad=1.0,
    )
    build_index(tiny_run, FeatureStore.open(tmp_path / "first"), tmp_path / "index")
    report = update_index(tiny_run, FeatureStore.open(grown.store), tmp_path / "index")
    assert (report.n_removed, report.n_added) == (0, 3 * 2)
    build_index(tiny_run, FeatureStore.open(grown.store), tmp_path / "new")
    for name in ("images.jsonl", "texts.jsonl"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert_close_vectors(tmp_path / "index", tmp_path / "new", "images")


# --- keys, sums and hubs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_index: Path) -> SearchIndex:
    return SearchIndex.open(tiny_index, device="cpu")


@pytest.fixture(scope="module")
def embedded(tiny_run: Path, tiny_store: Path) -> Embeddings:
    return embed_store(load_heads(tiny_run), FeatureStore.open(tiny_store))


def test_a_key_finds_what_its_own_file_finds(opened: SearchIndex, shapes_once: Path) -> None:
    key = "images/blue-square-0.png"
    by_key = opened.find(Query(keys=(key,)), 6)
    by_file = opened.search(str(shapes_once.parent / key), 6, files=True)
    assert [hit.score for hit in by_key] == pytest.approx([hit.score for hit in by_file], abs=2e-3)
    assert by_key == opened.find(Query(keys=(key,)), 6, "captions")
    assert opened.find(Query(keys=(key,)), 1, "images")[0].key == key


def test_a_sum_is_of_normalized_embeddings_and_normalized_again(
    opened: SearchIndex,
    shapes_once: Path,
) -> None:
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    key = "images/green-triangle-0.png"
    parts = [
        opened.embed(Query((text,), files=True))
        for text in ("a red circle", photo, "a blue square")
    ]
    parts.append(opened.embed(Query(keys=(key,))))
    words, picture, unwanted, by_key = parts
    for part in parts:
        assert float(part.norm()) == pytest.approx(1, abs=1e-5)
    total = opened.embed(Query(("a red circle", photo), ("a blue square",), (key,), files=True))
    torch.testing.assert_close(total, F.normalize(words + picture + by_key - unwanted, dim=1))


def test_what_is_unlike_comes_last(opened: SearchIndex, shapes_once: Path) -> None:
    unwanted = "images/red-circle-0.png"
    query = Query(
        (),
        (str(shapes_once.parent / unwanted),),
        ("images/blue-square-0.png",),
        files=True,
    )
    hits = opened.find(query, 12, "images")
    assert (hits[0].key, hits[-1].key) == ("images/blue-square-0.png", unwanted)


def test_words_find_images_and_pictures_alone_captions(shapes_once: Path) -> None:
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    for like, unlike in ((("words",), ()), (("words", photo), ()), ((photo,), ("words",))):
        assert Query(like, unlike, files=True).target == "images"
    for like, unlike in (((photo,), ()), ((photo,), (photo,))):
        assert Query(like, unlike, files=True).target == "captions"
        assert Query(like, unlike).target == "images"
    assert Query(keys=("a",)).target == Query(images=(photo,)).target == "captions"


@pytest.mark.parametrize("target", ["images", "captions"])
@pytest.mark.parametrize("kind", ["words", "picture"])
def test_csls_is_its_formula_written_out(
    kind: str,
    target: str,
    opened: SearchIndex,
    embedded: Embeddings,
    shapes_once: Path,
) -> None:
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    query = "a red circle" if kind == "words" else photo
    x = opened.embed(Query((query,), files=True)).numpy()[0]
    candidates = (embedded.image if target == "images" else embedded.text).numpy()
    others = (embedded.text if kind == "words" else embedded.image).numpy()
    near_query = np.sort(candidates @ x)[-10:].mean()
    near = np.sort(candidates @ others.T, axis=1)[:, -10:].mean(1)
    wanted = 2 * candidates @ x - near_query - near
    hits = opened.search(query, 5, target, csls=True, files=True)  # type: ignore[arg-type]
    assert [hit.score for hit in hits] == pytest.approx(
        np.sort(wanted)[::-1][:5].tolist(),
        abs=1e-5,
    )
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (Query(), OptionError, "the query is empty"),
        (Query(unlike=("a",)), OptionError, "the query is empty"),
        (Query(("a red circle", " ")), OptionError, "the query is empty"),
        (Query(("a red circle",), ("a red circle",)), OptionError, "cancel out"),
        (
            Query(keys=("images/red-circel-0.png",)),
            DataError,
            "no image .*did you mean images/red-circle-0.png",
        ),
        (Query(("a",), ("missing.jpg",), files=True), DataError, "query image cannot be read"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(
    query: Query,
    error: type[Exception],
    message: str,
    opened: SearchIndex,
) -> None:
    with pytest.raises(error, match=message):
        opened.find(query)


def test_more_than_there_is_gives_all(opened: SearchIndex) -> None:
    query = Query(("a red circle",))
    assert len(opened.find(query, 100)) == len(opened.find(query, 100, csls=True)) == 12


def test_vectors_are_read_once(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SearchIndex.open(tiny_index, device="cpu")
    opened.find(Query(keys=("images/red-circle-0.png",)))
    monkeypatch.setattr("apecache.search.query.open_vectors", None)
    assert opened.find(Query(keys=("images/blue-circle-0.png",)))


def test_a_kind_that_forgets_vectors_says_so() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    built, _ = build_vectors("flat", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    class Forgetful:
        ntotal = 50
        d = 8

        def reconstruct_batch(self, rows: object) -> None:
            raise RuntimeError("Error in x at /a/b.cpp:3: reconstruct not implemented")

    import apecache.search.faiss_index

    forgetful = apecache.search.faiss_index.VectorIndex(factory="Odd", index=Forgetful())
    assert built.vectors(np.array([1])).shape == (1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apecache.search.faiss_index, "_lists", lambda index: None)
        with pytest.raises(
            OptionError,
            match=r"kind Odd keeps no vectors \(reconstruct not implemented\)",
        ):
            forgetful.vectors(np.array([1]))


def test_words_that_no_tokenizer_takes_are_refused(opened: SearchIndex) -> None:
    with pytest.raises(OptionError, match="the query cannot be encoded"):
        opened.search("caf\udce9")
