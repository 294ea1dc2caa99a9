"""Images without captions stay in indexes and in zero-shot, and what is left out is said with its
reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from close_vectors import assert_close_vectors
from typer.testing import CliRunner

from apecache.data.pairs import Pair
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import DataError, MismatchError, OptionError
from apecache.evaluate.embeddings import embed_store
from apecache.evaluate.labeled import LabeledSpec
from apecache.evaluate.left_out import LeftOut
from apecache.evaluate.zeroshot import ZeroShotSpec, zero_shot
from apecache.extraction.run import ExtractSpec, extract
from apecache.fingerprint import Fingerprint
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads, save_heads
from apecache.search.faiss_index import build_vectors
from apecache.search.index import build_index, read_rows, update_index
from apecache.search.query import Query, SearchIndex
from apecache.store.reader import FeatureStore

IMAGE = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
TEXT = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
ROWS = [0, 0, 1, 2, 4, 5, 6]
"""Images 3 and 7 have no caption."""
CAPTIONS = ["a", "b", "c", " ", "e", "f", "g"]
BAD: dict[str, Any] = {"bad_images": (6,), "bad_texts": (2, 3)}
"""Image 6 cannot be read; image 1 loses its only caption, and image 2 has an empty one."""
SPLITS = ["train"] * 6 + ["val", "val"]
LEFT_OUT = LeftOut(
    unreadable_images=1,
    empty_captions=1,
    unusable_captions=1,
    captions_of_unreadable_images=1,
)


@pytest.fixture(scope="module")
def heads() -> TrainedHeads:
    torch.manual_seed(0)
    built = build_heads(HeadSpec(dim=4), text=HeadSpec(dim=4), image_dim=6, text_dim=5)
    marks = (
        Fingerprint(fields={"modality": m, "weights": name})
        for m, name in (("image", "pixels"), ("text", "words"))
    )
    return TrainedHeads(
        *(
            TrainedSide(head=head.eval(), encoder={}, fingerprint=mark)
            for head, mark in zip(built, marks, strict=True)
        ),
        10.0,
    )


@pytest.fixture
def run(heads: TrainedHeads, tmp_path: Path) -> Path:
    save_heads(heads, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def make(write_store: Any, tmp_path: Path) -> Callable[..., FeatureStore]:
    """The store above, some arguments changed."""

    def store(name: str = "store", **options: Any) -> FeatureStore:
        settings = {"captions": CAPTIONS, "shard_rows": 3, **BAD, **options}
        image = settings.pop("image", IMAGE)
        text = settings.pop("text", TEXT)
        rows = settings.pop("rows", ROWS)
        splits = settings.pop("splits", SPLITS)
        made: FeatureStore = write_store(tmp_path / name, image, text, rows, splits, **settings)
        return made

    return store


def keys_of(index: Path) -> list[str]:
    return [row["key"] for row in read_rows(index, "images")]


# --- indexes --------------------------------------------------------------------------------------


def test_an_index_has_every_readable_image_and_says_what_is_left_out(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    report = build_index(run, make(), tmp_path / "index")
    assert keys_of(tmp_path / "index") == [f"images/{row}.png" for row in (0, 1, 2, 3, 4, 5, 7)]
    assert [row["caption"] for row in read_rows(tmp_path / "index", "images")] == [
        "a",
        "",
        "",
        "",
        "e",
        "f",
        "",
    ]
    assert [row["caption"] for row in read_rows(tmp_path / "index", "texts")] == [
        "a",
        "b",
        "e",
        "f",
    ]
    assert report.left_out == LEFT_OUT
    assert str(report.left_out) == (
        "left out: 1 image that could not be read, 1 caption that is empty, 1 caption that could "
        "not be encoded, "
        "1 caption of an image that could not be read"
    )
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    for key in keys_of(tmp_path / "index"):
        assert opened.find(Query(keys=(key,)), 1, "images")[0].key == key
    assert {hit.key for hit in opened.find(Query(keys=("images/3.png",)), 9)} == {
        f"images/{i}.png" for i in (0, 4, 5)
    }


def test_only_what_was_asked_for_counts_as_left_out(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    report = build_index(run, make(), tmp_path / "index", split="val")
    assert keys_of(tmp_path / "index") == ["images/7.png"]
    assert report.left_out == LeftOut(unreadable_images=1, captions_of_unreadable_images=1)
    assert (report.n_images, report.n_texts) == (1, 0)


ALL_BAD = {"bad_texts": tuple(range(7))}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (
            ALL_BAD,
            LeftOut(
                unreadable_images=1,
                empty_captions=1,
                unusable_captions=5,
                captions_of_unreadable_images=1,
            ),
        ),
        (
            {"modalities": ("image",)},
            LeftOut(
                unreadable_images=1,
                empty_captions=1,
                captions_without_features=5,
                captions_of_unreadable_images=1,
            ),
        ),
        (
            {
                "modalities": ("image",),
                "text": TEXT[:0],
                "rows": [],
                "captions": None,
                "bad_texts": (),
            },
            LeftOut(unreadable_images=1),
        ),
    ],
    ids=["captions that are all bad", "no features of captions", "no captions"],
)
def test_a_store_without_a_usable_caption_is_indexed(
    options: dict[str, Any],
    left_out: LeftOut,
    kind: str,
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    report = build_index(run, make(**options), tmp_path / "index", kind=kind)
    assert (report.n_images, report.n_texts, report.left_out) == (7, 0, left_out)
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    by_key = Query(keys=("images/3.png",))
    assert opened.find(by_key, 1)[0].key == "images/3.png"
    with pytest.raises(OptionError, match="holds no captions; find images: --target images"):
        opened.find(by_key, 1, "captions")
    update = update_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    assert (update.n_images, update.n_texts, update.n_added, update.n_removed) == (7, 0, 0, 0)
    assert update.left_out == left_out


def test_an_update_takes_up_images_without_captions_and_then_their_captions(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    few = {"image": IMAGE[:3], "text": TEXT[:0], "rows": [], "captions": None, "splits": SPLITS[:3]}
    none_bad = {"bad_images": (), "bad_texts": (), "modalities": ("image",)}
    build_index(run, make("first", **few, **none_bad), tmp_path / "index")
    report = update_index(run, make("second"), tmp_path / "index")
    assert (report.n_images, report.n_texts) == (7, 4)
    assert (report.n_added, report.n_removed) == (4 + 4, 0)
    assert report.left_out == LEFT_OUT
    build_index(run, FeatureStore.open(tmp_path / "second"), tmp_path / "new")
    for part in ("images", "texts"):
        assert_close_vectors(tmp_path / "index", tmp_path / "new", part)
    gone = update_index(run, make("third", modalities=("image",)), tmp_path / "index")
    assert (gone.n_texts, gone.n_removed) == (0, 4)


def test_captions_that_come_later_get_the_kind_of_the_index(
    write_store: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    """An index of no vectors is exact, whatever was asked for; it must not stay so."""
    image = np.random.default_rng(2).normal(size=(100, 6)).astype(np.float32)
    text = np.random.default_rng(3).normal(size=(100, 5)).astype(np.float32)
    splits = ["train"] * 100
    bare = write_store(tmp_path / "bare", image, text[:0], [], splits, modalities=("image",))
    first = build_index(run, bare, tmp_path / "index", kind="IVF2,Flat")
    assert (first.images.factory, first.texts.factory) == ("IVF2,Flat", "Flat")
    full = write_store(tmp_path / "full", image, text, list(range(100)), splits)
    assert update_index(run, full, tmp_path / "index").texts.factory == "IVF2,Flat"


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "IVF16,SQ8"])
def test_an_index_of_no_vectors_finds_nothing(kind: str, tmp_path: Path) -> None:
    empty = np.empty((0, 8), np.float32)
    built, report = build_vectors(kind, empty)
    assert (report.factory, report.trained_on, built.shape) == ("Flat", 0, (0, 8))
    scores, rows = built.search(np.ones((2, 8), np.float32), 5)
    assert (scores.shape, rows.shape) == ((2, 0), (2, 0))


def test_hubs_cannot_be_told_without_captions(
    tiny_run: Path,
    image_only: FeatureStore,
    tmp_path: Path,
) -> None:
    build_index(tiny_run, image_only, tmp_path / "index")
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    with pytest.raises(
        OptionError,
        match="holds no captions, which --csls compares with; leave --csls out",
    ):
        opened.search("a red circle", csls=True)
    assert opened.find(Query(keys=("images/red-circle-0.png",)), 1, "images", csls=True)


def test_a_store_of_another_text_encoder_is_still_refused(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(MismatchError, match="text features other"):
        build_index(run, make(names=("pixels", "other")), tmp_path / "index")


def test_a_split_without_a_readable_image_is_refused(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="split 'val' has no image that could be read"):
        build_index(run, make(bad_images=(6, 7)), tmp_path / "index", split="val")


@pytest.fixture(scope="module")
def image_only(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeatureStore:
    path = tmp_path_factory.mktemp("image-only") / "store"
    spec = ExtractSpec(parse_encoder(f"timm:{tiny_image_encoder}", "image"), device="cpu")
    extract(open_pairs(shapes_once), path, spec)
    return FeatureStore.open(path)


def test_an_image_only_store_is_searched_by_words_and_by_photo(
    tiny_run: Path,
    image_only: FeatureStore,
    shapes_once: Path,
    tmp_path: Path,
) -> None:
    """And from the command line, where photos find images, for there is nothing else."""
    out = tmp_path / "index"
    done = CliRunner().invoke(
        app,
        ["index", str(tiny_run), "--store", str(image_only.path), "--out", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert "12 images and 0 captions" in done.output
    assert "left out: 24 captions without features" in done.output
    photo = shapes_once.parent / "images" / "red-circle-0.png"
    opened = SearchIndex.open(out, device="cpu")
    assert len(opened.search("a red circle", 12)) == 12
    assert opened.find(Query(images=(photo,)), 1)[0].key == "images/red-circle-0.png"
    found = CliRunner().invoke(app, ["search", str(out), str(photo), "--json", "--device", "cpu"])
    assert json.loads(found.output)["hits"][0]["key"] == "images/red-circle-0.png"
    refused = CliRunner().invoke(
        app,
        ["search", str(out), "red", "--target", "captions", "--device", "cpu"],
    )
    assert refused.exit_code == 2
    assert "holds no captions" in refused.output


def test_the_page_of_an_index_without_captions_finds_images(
    tiny_run: Path,
    image_only: FeatureStore,
    tmp_path: Path,
) -> None:
    from apecache.data.media import NoMedia
    from apecache.report.search_page import SearchPage, SearchRequest

    build_index(tiny_run, image_only, tmp_path / "index")
    page = SearchPage(SearchIndex.open(tmp_path / "index", device="cpu"), NoMedia())
    status, text = page.answer(SearchRequest(like=(0,)))
    assert (status, "12 images, 0 captions" in text) == (200, True)
    status, text = page.answer(SearchRequest(like=(0,), target="captions"))
    assert (status, "The index holds no captions." in text) == (400, True)


def test_the_command_says_what_an_index_and_a_report_leave_out(
    make: Callable[..., FeatureStore],
    run: Path,
    tmp_path: Path,
) -> None:
    store = make().path
    arguments = [
        "index",
        str(run),
        "--store",
        str(store),
        "--out",
        str(tmp_path / "index"),
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert json.loads(done.output)["left_out"] == vars(LEFT_OUT)
    measured = ["evaluate", str(run), "--store", str(store), "--split", "train", "--device", "cpu"]
    told = json.loads(CliRunner().invoke(app, [*measured, "--json"]).output)
    assert told["n_images"] == 3
    assert told["left_out"] == vars(
        LeftOut(uncaptioned_images=3, empty_captions=1, unusable_captions=1)
    )
    shown = CliRunner().invoke(app, measured).output
    assert (
        "left out: 3 images without a usable caption, 1 caption that is empty, 1 caption that could"
        in shown
    )


# --- retrieval and zero-shot ----------------------------------------------------------------------


def test_retrieval_keeps_captioned_images_and_counts_the_others(
    make: Callable[..., FeatureStore],
    heads: TrainedHeads,
) -> None:
    found = embed_store(heads, make())
    assert found.image_rows.tolist() == [0, 4, 5]
    assert found.left_out == LeftOut(**{**vars(LEFT_OUT), "uncaptioned_images": 4})
    every = embed_store(heads, make(), uncaptioned=True)
    assert every.image_rows.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert every.image_rows[every.image_of_text.numpy()].tolist() == [0, 0, 4, 5]
    rows = every.image_rows.tolist()
    captioned = every.image[[rows.index(row) for row in (0, 4, 5)]]
    # Another batch: the bits depend on the processor.
    torch.testing.assert_close(captioned, found.image, rtol=0, atol=1e-5)


def test_nothing_left_out_says_nothing(
    write_store: Any,
    heads: TrainedHeads,
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "store", IMAGE[:2], TEXT[:2], [0, 1], ["", ""])
    assert str(embed_store(heads, store).left_out) == ""
    assert str(LeftOut(unreadable_images=1200, unreadable_texts=2)) == (
        "left out: 1,200 images that could not be read, 2 texts that could not be encoded"
    )


@pytest.mark.parametrize("captions", ["none", "empty"])
def test_zero_shot_classifies_images_without_captions_and_counts_what_it_cannot_read(
    captions: str,
    tiny_run: Path,
    shapes: Path,
    tmp_path: Path,
) -> None:
    cell = {"none": [], "empty": [" "]}[captions]
    table = shapes.with_name("bare.jsonl")
    names = sorted(path.name for path in (shapes.parent / "images").iterdir())
    (shapes.parent / "images" / names[0]).write_bytes(b"<html>")
    lines = [{"image": f"images/{n}", "caption": cell, "label": n.split("-")[1]} for n in names]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_pairs(table)
    assert source.pairs[0] == Pair(
        key=f"images/{names[0]}",
        captions=tuple(cell),
        languages=("",) * len(cell),
        split="",
        label=names[0].split("-")[1],
    )
    images = LabeledSpec(source, str(tmp_path / "caches"), device="cpu", max_bad=0.5)
    report = zero_shot(load_heads(tiny_run), ZeroShotSpec(images))
    assert (report.n_images, report.left_out) == (11, LeftOut(unreadable_images=1))
    run = tmp_path / "run"
    save_heads(load_heads(tiny_run), run)
    arguments = [
        "evaluate",
        str(run),
        "--task",
        "zeroshot",
        "--labels",
        str(table),
        "--max-bad",
        "0.5",
    ]
    shown = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert "left out: 1 image that could not be read" in shown.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--device", "cpu", "--json"]).stdout)
    assert told["left_out"]["unreadable_images"] == 1
