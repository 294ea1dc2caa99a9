"""A catalogue from extraction to search: several photos of a product, rows without captions, stores of
one modality, and an index that follows its store."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from close_vectors import assert_close_vectors
from tiny import COLORS, SHAPES, draw_shape

from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import parse_encoder
from apecache.errors import DataError, ManifestError, OptionError
from apecache.evaluate.embeddings import embed_store
from apecache.extraction.additions import add_images, delete_images
from apecache.extraction.run import ExtractReport, ExtractSpec, extract
from apecache.recipes.recipe import load_recipe
from apecache.runs.load import load_run
from apecache.search.index import build_index, update_index
from apecache.search.index_files import read_description, read_rows
from apecache.search.query import Query, SearchIndex
from apecache.store.reader import FeatureStore
from apecache.store.view_edits import split_store
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import FitSpec, fit_head

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")
Extract = Callable[..., ExtractReport]
PHOTOS = 3
"""Photos of each product."""


@pytest.fixture
def extract_table(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Extract:
    """Extract a table with the tiny encoders, or with one of them."""

    def run(table: Path, store: Path, modalities: str = "image text") -> ExtractReport:
        spec = ExtractSpec(
            image=parse_encoder(f"timm:{tiny_image_encoder}", "image")
            if "image" in modalities
            else None,
            text=parse_encoder(f"hf:{tiny_text_encoder}", "text") if "text" in modalities else None,
            image_batch=4,
            text_batch=4,
            shard_rows=5,
            device="cpu",
        )
        require = () if "image" in modalities else ("caption",)
        return extract(open_pairs(table, OpenSpec(require=require)), store, spec)

    return run


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """12 products with three photos each, whose title is the same: 36 rows, 12 titles."""
    (tmp_path / "images").mkdir()
    rows = ["image\tcaption\tsplit"]
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        for photo in range(PHOTOS):
            key = f"images/{color}-{shape}-{photo}.png"
            draw_shape(color, shape, 48 + 4 * photo).save(tmp_path / key)
            split = "val" if number % 3 == 2 else "train"
            rows.append(f"{key}\ta {color} {shape}\t{split}")
    return write_rows(tmp_path / "table.tsv", rows)


def write_rows(table: Path, rows: list[str]) -> Path:
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


def fit(store: Path, out: Path) -> Path:
    recipe = load_recipe(
        "projection", ["image.dim=8", "text.dim=8", "schedule.epochs=2", "schedule.batch_size=8"]
    )
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    fit_head(FeatureStore.open(store), recipe, out, spec)
    return out


def test_several_photos_of_a_product_share_its_title_from_extraction_to_search(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    report = extract_table(products, tmp_path / "store")
    encoded = {array.modality: array.n_encoded for array in report.arrays}
    assert encoded == {"image": 36, "text": 12}
    store = FeatureStore.open(tmp_path / "store")
    assert len(store.pairs.captions) == 36
    run = fit(tmp_path / "store", tmp_path / "run")
    # All photos of a product are right answers to its title, whichever of them it stands beside.
    embedded = embed_store(load_run(run), store, "val")
    assert embedded.relevance is not None
    titles = store.pairs.captions[embedded.text_rows]
    image_titles = titles[np.argsort(embedded.image_of_text.numpy())]
    right = embedded.relevance.right_images(torch.arange(len(titles))).numpy()
    assert np.array_equal(right, titles[:, None] == image_titles[None, :])
    assert (right.sum(1) == PHOTOS).all()
    build_index(run, store, tmp_path / "index")
    index = SearchIndex.open(tmp_path / "index", device="cpu")
    hits = index.find(Query(like=("a red circle",)), 36, "images")
    assert len({hit.key for hit in hits}) == 36
    own_title = {hit.caption for hit in hits if hit.key.startswith("images/red-circle-")}
    assert own_title == {"a red circle"}


def test_rows_without_a_caption_are_kept_and_serve_what_needs_no_caption(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    header, *rows = products.read_text().splitlines()
    bare = [row.replace("\ta blue circle\t", "\t\t") for row in rows]
    write_rows(products, [header, *bare])
    report = extract_table(products, tmp_path / "store")
    encoded = {array.modality: array.n_encoded for array in report.arrays}
    assert encoded == {"image": 36, "text": 11}
    store = FeatureStore.open(tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    built = build_index(run, store, tmp_path / "index")
    assert (built.n_images, built.n_texts) == (36, 33)
    measured = embed_store(load_run(run), store, "train")
    assert measured.left_out.uncaptioned_images == PHOTOS
    # A caption that comes later is encoded alone, and the images stay.
    write_rows(products, [header, *rows])
    again = extract_table(products, tmp_path / "store")
    assert {array.modality: array.n_encoded for array in again.arrays} == {"image": 0, "text": 1}
    update = update_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    assert (update.n_images, update.n_texts) == (36, 36)
    assert (update.n_added, update.n_removed) == (PHOTOS, 0)


def test_stores_of_one_modality_work_with_a_run_made_elsewhere(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    extract_table(products, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    extract_table(products, tmp_path / "images-alone", "image")
    built = build_index(run, FeatureStore.open(tmp_path / "images-alone"), tmp_path / "index")
    assert (built.n_images, built.n_texts) == (36, 0)
    found = SearchIndex.open(tmp_path / "index", device="cpu").find(
        Query(like=("a red circle",)), 3, "images"
    )
    assert len(found) == 3
    extract_table(products, tmp_path / "texts-alone", "text")
    texts = FeatureStore.open(tmp_path / "texts-alone")
    assert texts.array("text").load_ok().all()
    with pytest.raises(DataError, match="has no image features; make them with: apecache extract"):
        build_index(run, texts, tmp_path / "other")


def test_an_index_follows_the_views_of_its_store(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    """Removed, added, renamed and corrected rows: the update is what a new index would be."""
    extract_table(products, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    first = FeatureStore.open(tmp_path / "store")
    build_index(run, first, tmp_path / "index")
    header, *rows = products.read_text().splitlines()
    corrected, *others = rows[1:]
    draw_shape("green", "circle", 70).save(tmp_path / "images" / "new.png")
    new = "images/new.png\tone more\ttrain"
    fixed = corrected.replace("a red circle", "a round red thing")
    write_rows(products, [header, new, *reversed(others), fixed])
    extract_table(products, tmp_path / "store")
    second = FeatureStore.open(tmp_path / "store")
    update = update_index(run, second, tmp_path / "index")
    # An image and a caption of the removed and of the new row, and the corrected caption.
    assert (update.n_added, update.n_removed) == (3, 3)
    assert read_description(tmp_path / "index")["data"] == second.digest
    build_index(run, second, tmp_path / "fresh")
    assert read_rows(tmp_path / "index", "images") == read_rows(tmp_path / "fresh", "images")
    assert read_rows(tmp_path / "index", "texts") == read_rows(tmp_path / "fresh", "texts")
    for part in ("images", "texts"):
        assert_close_vectors(tmp_path / "index", tmp_path / "fresh", part)
    # The first view is still there: the index goes back to it.
    back = update_index(run, FeatureStore.open(tmp_path / "store", "1"), tmp_path / "index")
    assert (back.n_added, back.n_removed) == (3, 3)
    assert read_description(tmp_path / "index")["data"] == first.digest


def test_small_edits_from_python_reach_the_index(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    extract_table(products, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    build_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    shutil.copy(tmp_path / "images" / "red-circle-0.png", tmp_path / "images" / "copy.png")
    add_images(
        tmp_path / "store",
        [tmp_path / "images" / "copy.png"],
        captions=["a copy"],
        split="train",
        device="cpu",
    )
    delete_images(tmp_path / "store", keys=["images/blue-square-1.png"])
    update = update_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    assert (update.n_added, update.n_removed) == (2, 2)
    keys = [row["key"] for row in read_rows(tmp_path / "index", "images")]
    assert "images/copy.png" in keys
    assert "images/blue-square-1.png" not in keys
    # What had the index open before sees the whole of its version.
    assert len(opened.find(Query(like=("a red circle",)), 99, "images")) == 36


def test_added_images_follow_the_rule_of_the_splits(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    lines = [line.rpartition("\t")[0] for line in products.read_text().splitlines()]
    write_rows(products, lines)
    extract_table(products, tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    split_store(store.files, (("train", 0.5), ("val", 0.5)))
    before = FeatureStore.open(tmp_path / "store").pairs
    # A copy of an image of each split: equal content stays together.
    copies: dict[str, str] = {}
    for split in ("train", "val"):
        key = str(before.keys[np.flatnonzero(before.splits == split)[0]])
        shutil.copy(tmp_path / key, tmp_path / "images" / f"copy-{split}.png")
        copies[f"images/copy-{split}.png"] = split
    add_images(tmp_path / "store", [tmp_path / key for key in copies], device="cpu")
    opened = FeatureStore.open(tmp_path / "store")
    # How the table was opened stays known, so that its images and columns can be read again.
    assert opened.source["options"] == store.source["options"]
    after = opened.pairs
    for key, split in copies.items():
        assert after.splits[after.row_of_key[key]] == split
    for key, split in zip(before.keys, before.splits, strict=True):
        assert after.splits[after.row_of_key[str(key)]] == split


def test_an_index_keeps_columns_of_the_table_for_conditions(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    header, *lines = products.read_text(encoding="utf-8").splitlines()
    # The color is a column, and empty for one product.
    priced = [
        f"{line}\t{'' if '-0.png' in line else line.split('/')[1].split('-')[0]}" for line in lines
    ]
    table = write_rows(products, [f"{header}\tcolor", *priced])
    extract_table(table, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    store = FeatureStore.open(tmp_path / "store")
    build_index(run, store, tmp_path / "index", columns=["color"])
    opened = SearchIndex.open(tmp_path / "index", device="cpu")
    color = next(iter(COLORS))
    hits = opened.find(Query(("a circle",)), k=50, where=f"color={color} and split=train")
    assert hits
    expected = {
        row["key"] for row in read_rows(tmp_path / "index", "images") if row.get("color") == color
    }
    assert {hit.key for hit in hits} <= expected
    assert len(opened.find(Query(("a circle",)), k=50, where="color=")) == 12
    with pytest.raises(OptionError, match=r"no field 'colour'.*color.*--column NAME"):
        opened.find(Query(("a circle",)), k=1, where="colour=red")


def test_an_update_of_an_index_reads_its_columns_again(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    header, *lines = products.read_text(encoding="utf-8").splitlines()
    table = write_rows(products, [f"{header}\tstate", *[f"{line}\told" for line in lines]])
    extract_table(table, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    build_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index", columns=["state"])
    write_rows(table, [f"{header}\tstate", *[f"{line}\tnew" for line in lines[:-1]]])
    extract_table(table, tmp_path / "store")
    update_index(run, FeatureStore.open(tmp_path / "store"), tmp_path / "index")
    rows = read_rows(tmp_path / "index", "images")
    assert {row["state"] for row in rows} == {"new"}
    assert len(rows) == len(lines) - 1


def test_columns_that_cannot_be_kept_are_refused(
    products: Path,
    extract_table: Extract,
    tmp_path: Path,
) -> None:
    extract_table(products, tmp_path / "store")
    run = fit(tmp_path / "store", tmp_path / "run")
    store = FeatureStore.open(tmp_path / "store")
    for column, error, message in (
        ("split", OptionError, "every row has it already"),
        ("unit price", OptionError, "letters, digits and _"),
        ("price", ManifestError, "--column"),
    ):
        with pytest.raises(error, match=message):
            build_index(run, store, tmp_path / "index", columns=[column])
    assert not (tmp_path / "index").exists()
