"""Charts and galleries made from a real, tiny run."""

import base64
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apecache.data.media import FolderMedia
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.relevance import Relevance
from apecache.report import Page
from apecache.report.gallery import IMAGE_PREFIX, QueryExample
from apecache.report.run_page import learning_charts, retrieval_galleries, spread
from apecache.runs.folder import read_history
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.store.reader import FeatureStore

COLORS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="module")
def table(shapes_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images with two captions each, all in one split: enough that some captions miss the first
    ten."""
    folder = tmp_path_factory.mktemp("gallery")
    shutil.copytree(shapes_once.parent / "images", folder / "images")
    lines = ["image\tcaption\tsplit"]
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        for copy in ("", "-again"):
            key = f"images/{path.stem}{copy}.png"
            with Image.open(path) as picture:
                side = picture.width + 2 * bool(
                    copy
                )  # another file: equal images are each other's right answers
                picture.rotate(7 * number).resize((side, side)).save(folder / key)
            lines += [
                f"{key}\t{text}\tval" for text in (f"a {path.stem}{copy}", f"the {path.stem}{copy}")
            ]
    lines[1] = "images/blue-circle-0.png\t \tval"  # no caption: its row is quarantined
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "pairs.tsv"


@pytest.fixture(scope="module")
def store(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeatureStore:
    path = tmp_path_factory.mktemp("gallery-store") / "store"
    encoders = (
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        parse_encoder(f"hf:{tiny_text_encoder}", "text"),
    )
    extract(
        open_pairs(table),
        path,
        ExtractSpec(*encoders, shard_rows=16, max_bad=0.1, device="cpu"),
    )
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def heads(tiny_run: Path) -> TrainedHeads:
    return load_heads(tiny_run)


@pytest.fixture(scope="module")
def embedded(heads: TrainedHeads, store: FeatureStore) -> Embeddings:
    return embed_store(heads, store, "val")


# --- charts ---------------------------------------------------------------------------------------


def test_charts_draw_the_histories_of_all_runs_by_name(tiny_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run, tmp_path / "other")
    lines = (other / "history.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "history.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    losses, recalls = learning_charts({"long": tiny_run, "short": other})
    history = list(read_history(tiny_run))
    assert [curve.name for curve in losses.curves] == ["long", "short"]
    assert [curve.name for curve in recalls.curves] == ["long", "short", "chance"]
    chance = history[0]["dev"]["chance"]
    assert recalls.curves[2].points == ((0, chance), (history[-1]["epoch"], chance))
    assert losses.curves[0].points == tuple((line["epoch"], line["loss"]) for line in history[1:])
    assert recalls.curves[0].points == tuple(
        (line["epoch"], line["dev"]["mean_recall"]) for line in history
    )
    assert [len(curve.points) for curve in (*losses.curves, *recalls.curves)] == [4, 2, 5, 3, 2]
    assert "loss" in losses.title.lower()
    assert "dev" in recalls.title.lower()


# --- galleries ------------------------------------------------------------------------------------


def rank_by_definition(embedded: Embeddings, text: int) -> int:
    """1-based place of the caption's image, wrong ones before it where scores are equal."""
    own = int(embedded.image_of_text[text])
    scores = [float(torch.dot(image, embedded.text[text])) for image in embedded.image]
    return sum(score >= scores[own] for score in scores)


def text_of(hit: QueryExample, store: FeatureStore, embedded: Embeddings) -> int:
    """The row of a gallery item's caption (captions of this table are all different)."""
    captions = [store.pairs.captions[row] for row in embedded.text_rows]
    assert captions.count(hit.query_text) == 1
    return captions.index(hit.query_text)


def test_the_worst_misses_come_first_then_a_draw_then_what_was_found(
    store: FeatureStore,
    table: Path,
    embedded: Embeddings,
) -> None:
    missed, drawn, found = retrieval_galleries(
        embedded,
        store,
        FolderMedia(root=table.parent),
        n_items=100,
    )
    ranks = [rank_by_definition(embedded, text) for text in range(len(embedded.text))]
    shown = [
        [text_of(hit, store, embedded) for hit in gallery.items]
        for gallery in (missed, drawn, found)
    ]
    assert sorted(shown[0]) == [text for text, rank in enumerate(ranks) if rank > 10]
    assert [ranks[text] for text in shown[0]] == sorted(
        (ranks[text] for text in shown[0]),
        reverse=True,
    )
    assert sorted(shown[1]) == list(range(len(ranks)))
    assert shown[2] == [text for text, rank in enumerate(ranks) if rank == 1]
    for gallery, texts in zip((missed, drawn, found), shown, strict=True):
        assert [hit.rank for hit in gallery.items] == [ranks[text] for text in texts]
    assert missed.items
    assert all(hit.found for hit in found.items)
    assert not any(hit.found for hit in missed.items)


def test_the_draw_is_by_its_seed(store: FeatureStore, embedded: Embeddings, tmp_path: Path) -> None:
    def drawn(seed: int) -> list[str | None]:
        galleries = retrieval_galleries(
            embedded,
            store,
            FolderMedia(root=tmp_path),
            n_items=5,
            seed=seed,
        )
        return [hit.query_text for hit in galleries[1].items]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 5


def test_results_are_the_nearest_images_best_first_and_the_right_one_is_marked(
    store: FeatureStore,
    table: Path,
    embedded: Embeddings,
) -> None:
    missed, _, found = retrieval_galleries(
        embedded,
        store,
        FolderMedia(root=table.parent),
        n_items=3,
        top=4,
    )
    pairs = store.pairs
    for hit in (*found.items, *missed.items):
        text = text_of(hit, store, embedded)
        scores = embedded.image @ embedded.text[text]
        assert [result.score for result in hit.results] == pytest.approx(
            sorted(scores.tolist(), reverse=True)[:4]
        )
        for result in hit.results:
            key = result.text.split(" ", 1)[1]
            (row,) = (
                i
                for i, store_row in enumerate(embedded.image_rows)
                if key == Path(pairs.keys[store_row]).stem
            )
            assert result.score == pytest.approx(float(scores[row]), abs=1e-6)
            assert result.correct is (row == int(embedded.image_of_text[text]))


def test_images_with_an_equal_caption_are_marked_as_right(
    store: FeatureStore,
    table: Path,
    embedded: Embeddings,
) -> None:
    """As if every caption of the first two images were the same one."""
    ids = torch.arange(len(embedded.text))
    ids[embedded.image_of_text < 2] = 0
    equal = replace(embedded, relevance=Relevance.of(embedded.image_of_text, ids, None))
    *_, drawn, _ = retrieval_galleries(
        equal,
        store,
        FolderMedia(root=table.parent),
        n_items=100,
        top=len(embedded.image),
    )
    counts = {
        text: sum(result.correct for result in hit.results)
        for hit in drawn.items
        for text in [text_of(hit, store, embedded)]
    }
    assert counts == {
        text: 2 if int(owner) < 2 else 1
        for text, owner in enumerate(embedded.image_of_text.tolist())
    }
    for hit in drawn.items:
        first_right = [result.correct for result in hit.results].index(True)
        assert hit.rank == 1 + first_right


def test_pictures_are_those_of_the_images_found(
    embedded: Embeddings,
    store: FeatureStore,
    table: Path,
) -> None:
    *_, found = retrieval_galleries(
        embedded,
        store,
        FolderMedia(root=table.parent),
        n_items=1,
        top=1,
    )
    (result,) = found.items[0].results
    assert result.image is not None
    shown = decode(result.image)
    key = result.text.split(" ", 1)[1]
    with Image.open(table.parent / "images" / f"{key}.png") as original:
        difference = torch.tensor(list(shown.tobytes())).float() - torch.tensor(
            list(original.convert("RGB").tobytes())
        )
    assert difference.abs().mean() < 8


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(IMAGE_PREFIX)))).convert("RGB")


def test_an_image_is_named_by_its_first_usable_caption(
    store: FeatureStore,
    table: Path,
    embedded: Embeddings,
) -> None:
    *_, found = retrieval_galleries(
        embedded,
        store,
        FolderMedia(root=table.parent),
        n_items=1,
        top=100,
    )
    everything = found.items[0].results
    named = {result.text for result in everything}
    assert "the blue-circle-0" in named
    assert {text for text in named if not text.startswith("a ")} == {"the blue-circle-0"}
    assert len(named) == len(embedded.image_rows) == 24


def test_a_picture_that_is_gone_leaves_its_place_empty(
    embedded: Embeddings,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    galleries = retrieval_galleries(embedded, store, FolderMedia(root=tmp_path))
    assert {result.image for each in galleries for hit in each.items for result in hit.results} == {
        None
    }


@pytest.mark.parametrize(("n_items", "top"), [(1, 1), (2, 3), (6, 100)])
def test_a_gallery_has_at_most_as_many_items_and_results_as_asked_for(
    n_items: int,
    top: int,
    embedded: Embeddings,
    store: FeatureStore,
    table: Path,
) -> None:
    for gallery in retrieval_galleries(
        embedded,
        store=store,
        media=FolderMedia(root=table.parent),
        n_items=n_items,
        top=top,
    ):
        assert 1 <= len(gallery.items) <= n_items
        assert {len(hit.results) for hit in gallery.items} == {min(top, 24)}


def test_charts_and_galleries_make_a_page(
    tiny_run: Path,
    embedded: Embeddings,
    store: FeatureStore,
    table: Path,
    parse: Callable[[Page], Any],
) -> None:
    galleries = retrieval_galleries(
        embedded,
        store,
        FolderMedia(root=table.parent),
        n_items=2,
        top=2,
    )
    page = Page(
        title="A run",
        subtitle="what it is",
        charts=learning_charts({"run": tiny_run}),
        galleries=galleries,
    )
    document = parse(page)
    n_pictures = sum(len(hit.results) for gallery in galleries for hit in gallery.items)
    assert len(document.all("img")) == n_pictures
    assert galleries[0].items[0].query_text in document.source


@given(st.lists(st.integers(), unique=True, max_size=60), st.integers(1, 12))
def test_spread_rows_are_evenly_apart_and_all_of_them_if_there_are_few(
    rows: list[int],
    count: int,
) -> None:
    chosen = spread(rows, count)
    places = [rows.index(row) for row in chosen]
    assert places == sorted(set(places))
    assert len(chosen) == min(count, len(rows))
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1
