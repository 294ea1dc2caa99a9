"""The search index: exact, self-contained, and refusing what does not belong together."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.data.sources import open_pairs
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import DataError, MismatchError, MissingExtraError, OptionError, RunError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.extraction.run import ExtractSpec, extract
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import TrainedHeads, load_heads, save_heads
from apecache.search.index import build_index
from apecache.search.query import Hit, SearchIndex, image_path
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

TEXT_QUERY = "a red circle"


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> FeatureStore:
    return FeatureStore.open(tiny_store)


@pytest.fixture(scope="module")
def built(tiny_run: Path, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the whole tiny store; for tests that only read it."""
    out = tmp_path_factory.mktemp("indexes") / "index"
    build_index(tiny_run, store, out)
    return out


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(built, tmp_path / "index")


def extract_to(table: Path, store: Path, image: Path, text: Path) -> None:
    encoders = parse_encoder(f"timm:{image}", "image"), parse_encoder(f"hf:{text}", "text")
    extract(open_pairs(table), store, ExtractSpec(*encoders, shard_rows=8, device="cpu"))


def open_index(path: Path) -> SearchIndex:
    return SearchIndex.open(path, device="cpu")


@pytest.fixture(scope="module")
def opened(built: Path) -> SearchIndex:
    return open_index(built)


@pytest.fixture(scope="module")
def embedded(tiny_run: Path, store: FeatureStore) -> Embeddings:
    return embed_store(load_heads(tiny_run), store)


def embed_query(heads: TrainedHeads, query: str | Path) -> torch.Tensor:
    if isinstance(query, str):
        return heads.text.embed(
            load_text_encoder(EncoderSpec(**heads.text.encoder), "cpu").encode([query])
        )[0]
    encoder = load_image_encoder(EncoderSpec(**heads.image.encoder), "cpu")
    pixels = encoder.preprocess(load_image(query.name, FolderMedia(root=query.parent)).image)
    return heads.image.embed(encoder.encode(pixels.unsqueeze(0)))[0]


# --- searching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["images", "captions"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_search_finds_what_comparing_with_everything_finds(
    kind: str,
    target: str,
    opened: SearchIndex,
    embedded: Embeddings,
    store: FeatureStore,
    shapes_once: Path,
) -> None:
    photo = shapes_once.parent / "images" / "blue-square-0.png"
    query: str | Path = TEXT_QUERY if kind == "text" else photo
    hits = opened.search(str(query), 7, target, files=True)  # type: ignore[arg-type]
    pairs = store.pairs
    vectors = embedded.image if target == "images" else embedded.text
    scores = (vectors @ embed_query(opened.run, query)).numpy()
    order = np.argsort(-scores, kind="stable")[:7]
    assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6, 7]
    by_name = {(hit.key, hit.caption): hit.score for hit in hits}
    for row, score in enumerate(scores):
        image = row if target == "images" else pairs.image_rows[row]
        caption = (
            pairs.captions[2 * row] if target == "images" else pairs.captions[row]
        )  # an image's first caption
        if (pairs.keys[image], caption) in by_name:
            assert by_name.pop((pairs.keys[image], caption)) == pytest.approx(score, abs=1e-5)
    assert not by_name


def test_words_find_images_and_a_photo_finds_captions_unless_turned_round(
    opened: SearchIndex,
    shapes_once: Path,
) -> None:
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    assert (
        opened.search(TEXT_QUERY, 3)
        == opened.search(TEXT_QUERY, 3, "images")
        != opened.search(TEXT_QUERY, 3, "captions")
    )
    captions, images = (
        opened.search(photo, 3, target, files=True) for target in ("captions", "images")
    )
    assert opened.search(photo, 3, files=True) == captions != images


def test_a_caption_and_a_photo_of_the_index_find_themselves(
    opened: SearchIndex,
    shapes_once: Path,
) -> None:
    photo = shapes_once.parent / "images" / "green-triangle-0.png"
    (same,) = opened.search(str(photo), 1, "images", files=True)
    assert (same.key, same.rank) == ("images/green-triangle-0.png", 1)
    assert same.score == pytest.approx(1, abs=1e-3)
    (caption,) = opened.search("the square in yellow on white", 1, "captions")
    assert caption.caption == "the square in yellow on white"
    assert caption.score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("target", "n"), [("images", 12), ("captions", 24)])
def test_asking_for_more_than_there_is_gives_everything_once(
    target: str,
    n: int,
    opened: SearchIndex,
) -> None:
    hits = opened.search(TEXT_QUERY, 1000, target)  # type: ignore[arg-type]
    assert len({(hit.key, hit.caption) for hit in hits}) == len(hits) == n
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_result_is_refused(k: int, opened: SearchIndex) -> None:
    with pytest.raises(OptionError, match="at least 1 result"):
        opened.search(TEXT_QUERY, k)


@pytest.mark.parametrize("query", ["", "  ", "\n\t"])
def test_an_empty_query_is_refused(query: str, opened: SearchIndex) -> None:
    with pytest.raises(OptionError, match="the query is empty; give words or an image file"):
        opened.search(query)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("gone.jpg", None, r"gone\.jpg: no such file"),
        ("empty.png", b"", "0 bytes"),
        ("page.jpg", b"<html>", "is a web page; expected JPEG"),
        ("cut.png", "cut", "cannot be decoded"),
    ],
)
def test_a_query_image_that_cannot_be_read_is_refused(
    name: str,
    data: bytes | str | None,
    reason: str,
    opened: SearchIndex,
    shapes_once: Path,
    tmp_path: Path,
) -> None:
    if data is not None:
        whole = (shapes_once.parent / "images" / "red-circle-0.png").read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if isinstance(data, str) else data)
    with pytest.raises(DataError, match=f"query image cannot be read: .*{reason}"):
        opened.search(str(tmp_path / name), files=True)


@pytest.mark.parametrize(
    ("query", "is_image"),
    [
        ("photo.jpg", True),
        ("../a/Photo.WEBP", True),
        ("a dog called rex.jpg", False),
        ("photo.txt", False),
        ("a dog", False),
        ("", False),
        ("a\0b", False),
        ("x" * 5000, False),
        ("https://example.org/", False),
    ],
    ids=lambda value: str(value)[:20].replace("\0", "NUL"),
)
def test_a_query_is_an_image_if_it_exists_or_is_named_like_one(query: str, is_image: bool) -> None:
    assert (image_path(query) is not None) is is_image


def test_a_file_that_exists_is_an_image_query_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a photo of mine.jpg").write_bytes(b"x")
    (tmp_path / "noending").write_bytes(b"x")
    assert image_path(str(tmp_path / "a photo of mine.jpg")) is not None
    assert image_path(str(tmp_path / "noending")) is not None
    assert image_path(str(tmp_path)) is None


# --- what an index holds --------------------------------------------------------------------------


def test_an_index_says_what_is_in_it_and_of_which_head(
    built: Path,
    tiny_run: Path,
    store: FeatureStore,
    opened: SearchIndex,
) -> None:
    value = json.loads((built / "index.json").read_text(encoding="utf-8"))
    assert (value["n_images"], value["n_texts"], value["dim"]) == (12, 24, 16)
    assert value["head"] == load_heads(tiny_run).digest == opened.run.digest
    assert value["data"] == store.digest
    assert value["split"] is None
    names = [
        "head.json",
        "head.safetensors",
        "images.faiss",
        "images.jsonl",
        "index.json",
        "texts.faiss",
        "texts.jsonl",
    ]
    assert sorted(path.name for path in built.iterdir()) == names


def test_an_index_of_one_split_finds_only_its_images(
    tiny_run: Path,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = build_index(tiny_run, store, tmp_path / "index", split="val")
    assert (report.n_images, report.n_texts, report.dim) == (4, 8, 16)
    keys = {hit.key for hit in open_index(tmp_path / "index").search(TEXT_QUERY, 100)}
    assert keys == {
        f"images/{color}-triangle-0.png" for color in ("red", "green", "blue", "yellow")
    }


def test_an_index_works_after_the_run_and_the_store_are_gone(
    tiny_run: Path,
    tiny_store: Path,
    opened: SearchIndex,
    tmp_path: Path,
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    store = shutil.copytree(tiny_store, tmp_path / "store")
    build_index(run, FeatureStore.open(store), tmp_path / "index")
    shutil.rmtree(run)
    shutil.rmtree(store)
    moved = (tmp_path / "index").rename(tmp_path / "moved")
    assert open_index(moved).search(TEXT_QUERY) == opened.search(TEXT_QUERY)


ODD_CAPTIONS = (
    "red\u2028circle",
    "red\u2029circle",
    "red\ncircle",
    "red\r\ncircle\r",
    "red\x0b\x0c\x1c\x85circle",
    'a "red" \\circle\\',
    "\ufeffred circle",
    "red \u202ecircle 🔴 ",
    "<script>alert(1)</script>",
    "=HYPERLINK(1)",
)


def test_odd_captions_come_back_exactly(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    shapes: Path,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    table = shapes.with_name("odd.jsonl")
    lines = [{"image": "images/red-circle-0.png", "caption": list(ODD_CAPTIONS)}]
    lines += [{"image": "images/red-square-0.png", "caption": ["a red square"]}]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    extract_to(table, store=tmp_path / "store", image=tiny_image_encoder, text=tiny_text_encoder)
    build_index(tiny_run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    hits = open_index(tmp_path / "index").search(TEXT_QUERY, 100, "captions")
    assert {hit.caption for hit in hits} == {*ODD_CAPTIONS, "a red square"}
    assert {hit.key for hit in hits if hit.caption in ODD_CAPTIONS} == {"images/red-circle-0.png"}
    texts = (tmp_path / "index" / "texts.jsonl").read_bytes()
    assert texts.count(b"\n") == len(ODD_CAPTIONS) + 1
    images = open_index(tmp_path / "index").search(TEXT_QUERY, 2)
    assert {hit.caption for hit in images} == {ODD_CAPTIONS[0], "a red square"}


# --- building over something ----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_index_that_exists_is_refused_and_replaced_only_with_overwrite(
    index: Path,
    tiny_run: Path,
    store: FeatureStore,
) -> None:
    (index / "texts.jsonl").write_text("old")
    before = contents(index.parent)
    with pytest.raises(
        RunError,
        match=r"index .* exists already; choose another --out, or add --overwrite",
    ):
        build_index(tiny_run, store, index)
    assert contents(index.parent) == before
    build_index(tiny_run, store, index, split="val", overwrite=True)
    assert open_index(index).description["split"] == "val"
    assert sorted(path.name for path in index.parent.iterdir()) == ["index"]


def test_an_index_outlives_a_successor_that_cannot_take_its_place(
    index: Path,
    tiny_run: Path,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(index.parent)
    replace = os.replace

    def fails_for_the_new_one(source: Path, destination: Path) -> None:
        if destination == index and not source.name.endswith(".former"):
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr("apecache.search.index.os.replace", fails_for_the_new_one)
    with pytest.raises(OSError, match="No space left"):
        build_index(tiny_run, store, index, overwrite=True)
    assert contents(index.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["foreign", "run", "file"])
def test_what_is_no_index_is_never_deleted(
    kind: str,
    overwrite: bool,
    tiny_run: Path,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    out = tmp_path / "precious"
    if kind == "file":
        out.write_text("mine")
    elif kind == "run":
        shutil.copytree(tiny_run, out)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(RunError, match="precious"):
        build_index(tiny_run, store, out, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_build_that_fails_leaves_the_old_index_and_nothing_half_made(
    index: Path,
    tiny_run: Path,
    store: FeatureStore,
) -> None:
    before = contents(index.parent)
    with pytest.raises(DataError, match="no split 'nowhere'"):
        build_index(tiny_run, store, index, split="nowhere", overwrite=True)
    assert contents(index.parent) == before


def test_a_disk_that_is_full_leaves_the_old_index_and_nothing_half_made(
    index: Path,
    tiny_run: Path,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = contents(index.parent)
    monkeypatch.setattr("apecache.search.index.write_rows", full)
    with pytest.raises(OSError, match="No space left"):
        build_index(tiny_run, store, index, overwrite=True)
    assert contents(index.parent) == before


def test_a_store_of_another_encoder_is_refused(
    tiny_run: Path,
    shapes: Path,
    tiny_image_encoder: Path,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    extract_to(shapes, store=tmp_path / "store", image=tiny_image_encoder, text=other_text_encoder)
    with pytest.raises(
        MismatchError,
        match="text features other-bert is not of the encoder",
    ) as caught:
        build_index(tiny_run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "index").exists()


def test_without_faiss_the_line_that_installs_it_is_shown(
    tiny_run: Path,
    store: FeatureStore,
    opened: SearchIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = r"faiss is not installed; install it with: pip install 'apecache\[cpu\]'"
    with pytest.raises(MissingExtraError, match=message):
        build_index(tiny_run, store, tmp_path / "index")
    with pytest.raises(ImportError, match=message):
        opened.search(TEXT_QUERY)
    assert not list(tmp_path.iterdir())


# --- what is refused ------------------------------------------------------------------------------


def refused(path: Path) -> str:
    """The message with which an index is refused when it is opened or searched; on one line."""
    with pytest.raises(RunError) as caught:
        open_index(path).search(TEXT_QUERY, 3, "captions")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_an_index_that_is_not_there_is_refused_with_the_nearest_name(index: Path) -> None:
    message = refused(index.with_name("indx"))
    assert (
        "indx is not an index; did you mean index? (make one with: apecache index RUN --store "
        "STORE --out"
    ) in message


def test_a_run_is_no_index(tiny_run: Path) -> None:
    assert "is not an index (make one with" in refused(tiny_run)


def test_an_index_with_the_head_of_another_run_is_refused(
    index: Path,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    recipe = load_recipe(
        "projection",
        ["image.dim=16", "text.dim=16", "schedule.epochs=1", "schedule.batch_size=4"],
    )
    fit_head(
        store,
        recipe=recipe,
        out=tmp_path / "other",
        spec=FitSpec(splits=SplitSpec(dev="val"), device="cpu", seed=1),
    )
    save_heads(load_heads(tmp_path / "other"), index)
    assert "was built with another head than the one in it; build the index again" in refused(index)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy(path: Path, name: str) -> None:
    shutil.copy(path.with_name(name), path)


def write_narrow(path: Path) -> None:
    import faiss

    narrow = faiss.IndexFlatIP(3)
    narrow.add(np.zeros((24, 3), np.float32))
    faiss.write_index(narrow, str(path))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("index.json", lambda p: p.write_text("{"), "index.json is damaged"),
        ("index.json", lambda p: p.write_text("[]"), "index.json is damaged"),
        ("index.json", lambda p: p.write_text("{}"), "index.json is damaged"),
        ("index.json", lambda p: p.write_bytes(b"\xff"), "index.json is damaged"),
        ("index.json", lambda p: p.write_text("[" * 100_000), "index.json is damaged"),
        (
            "index.json",
            lambda p: p.write_text('{"format": 9}'),
            "has format 9; this apecache reads up to 1: upgrade",
        ),
        ("index.json", lambda p: p.write_text('{"format": 1}'), "another head"),
        ("head.json", lambda p: p.unlink(), "head.json"),
        ("head.safetensors", cut, "head.safetensors cannot be read"),
        ("texts.faiss", cut, "texts.faiss cannot be read"),
        ("texts.faiss", lambda p: p.unlink(), "texts.faiss cannot be read"),
        ("texts.faiss", lambda p: p.write_bytes(b""), "texts.faiss cannot be read"),
        ("texts.faiss", lambda p: p.write_bytes(b"junk" * 99), "texts.faiss cannot be read"),
        ("texts.faiss", lambda p: copy(p, "images.faiss"), "texts.faiss does not fit"),
        ("texts.faiss", write_narrow, "texts.faiss does not fit"),
        ("texts.jsonl", cut, "texts.jsonl cannot be read"),
        ("texts.jsonl", lambda p: p.unlink(), "texts.jsonl cannot be read"),
        ("texts.jsonl", lambda p: copy(p, "images.jsonl"), "texts.faiss does not fit"),
        (
            "texts.jsonl",
            lambda p: p.write_text('{"key": "a"}\n' * 24),
            "texts.jsonl cannot be read",
        ),
        ("texts.jsonl", lambda p: p.write_text("3\n" * 24), "texts.jsonl cannot be read"),
    ],
)
def test_a_damaged_index_is_refused_by_the_file_that_is_damaged(
    name: str,
    damage: Callable[[Path], object],
    message: str,
    index: Path,
) -> None:
    damage(index / name)
    assert message in refused(index)


def test_an_encoder_that_is_not_the_indexs_is_refused(
    index: Path,
    other_text_encoder: Path,
) -> None:
    wrong = parse_encoder(f"hf:{other_text_encoder}", "text")
    with pytest.raises(
        MismatchError,
        match=r"text encoder .* is not of the encoder .* weights: ",
    ) as caught:
        SearchIndex.open(index, text=wrong, device="cpu").search(TEXT_QUERY)
    assert caught.value.exit_code == 4


def test_encoders_that_have_moved_are_found_where_they_are_said_to_be(
    index: Path,
    opened: SearchIndex,
    shapes_once: Path,
    tmp_path: Path,
) -> None:
    moved = [
        EncoderSpec(**encoder).with_name(
            f"{encoder['library']}:{shutil.copytree(encoder['name'], tmp_path / side)}"
        )
        for side, encoder in (
            ("image", opened.run.image.encoder),
            ("text", opened.run.text.encoder),
        )
    ]
    elsewhere = SearchIndex.open(index, *moved, device="cpu")
    photo = str(shapes_once.parent / "images" / "red-circle-0.png")
    assert elsewhere.search(TEXT_QUERY) == opened.search(TEXT_QUERY)
    assert elsewhere.search(photo) == opened.search(photo)


def test_a_hit_is_plain_data() -> None:
    assert vars(Hit(rank=1, key="a.jpg", caption="a", score=0.5)) == {
        "rank": 1,
        "key": "a.jpg",
        "caption": "a",
        "score": 0.5,
    }
