"""A store outlives its table: only new contents are encoded, and a view says where all others
are."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import COLORS, SHAPES, draw_shape, extract_tiny

from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.extraction.run import ExtractSpec
from apecache.extraction.run import extract as run_extraction
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import SOURCE, STAMPS, segment_record_name
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record, seal_record
from apecache.store.verify import verify_store
from benchmarks.reliability.edits import Catalog, Row, run_edits

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """12 pictures, each with two English captions and a German one."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for color in COLORS:
        for shape in SHAPES:
            key = f"images/{color}-{shape}.png"
            draw_shape(color, shape).save(folder / key)
            for caption in (f"a {color} {shape}", f"the {shape} in {color} on white"):
                rows.append(Row(image=key, caption=caption))
            rows.append(Row(image=key, caption=f"{shape} {color}", lang="de"))
    return Catalog(folder=folder, rows=rows)


@pytest.fixture
def new_images(tmp_path: Path) -> list[Path]:
    paths = []
    for number, color in enumerate(COLORS):
        paths.append(tmp_path / f"new-{number}.png")
        draw_shape(color, "circle", 60).save(paths[-1])
    return paths


@pytest.fixture
def extract(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Callable[..., object]:
    def run(table: Path, store: Path, **options: object) -> object:
        options = {"max_bad": 0.2, **options}
        return extract_tiny(
            table,
            store=store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            **options,
        )

    return run


def test_twelve_edits_encode_only_what_is_new(
    catalog: Catalog,
    new_images: list[Path],
    extract: Callable[..., object],
    tmp_path: Path,
) -> None:
    results = list(run_edits(catalog, tmp_path / "store", new_images, extract))  # type: ignore[arg-type]
    assert [result.edit.name for result in results if not result.right] == []
    assert len(results) == 13  # a file is missing, and is back: one edit of two steps
    assert verify_store(tmp_path / "store").problems == ()


def test_the_undone_table_has_the_identity_of_the_first(
    catalog: Catalog,
    extract: Callable[..., object],
    tmp_path: Path,
) -> None:
    """Runs that were trained before an edit belong to the table after it was undone."""
    store = tmp_path / "store"
    rows = list(catalog.rows)
    extract(catalog.write(), store)
    first = FeatureStore.open(store).digest
    catalog.rows = rows[3:]
    extract(catalog.write(), store)
    second = FeatureStore.open(store)
    assert second.digest != first
    assert second.view_of(first) is not None
    catalog.rows = rows
    extract(catalog.write(), store)
    assert FeatureStore.open(store).digest == first


def test_a_store_that_was_appended_to_by_an_older_version_lives_on(
    catalog: Catalog,
    extract: Callable[..., object],
    tmp_path: Path,
) -> None:
    """It has no views, and its table is that of its blocks together."""
    store = tmp_path / "store"
    table = catalog.write()
    source = open_pairs(table)
    rows = list(catalog.rows)
    catalog.rows = [row for row in rows if row.image in source.keys[:8]]
    extract(catalog.write(), store)
    catalog.rows = [row for row in rows if row.image in source.keys[8:]]
    extract(catalog.write(), store / "segments/0001")
    (store / "segments/0001" / STAMPS).unlink()
    (store / STAMPS).unlink()
    files = LocalFiles(store)
    name = segment_record_name("0001")
    identity = read_record(files.child("segments/0001"), SOURCE)
    keys = ("digest", "n_images", "n_texts")
    files.put_if_absent(name, seal_record(name, {key: identity[key] for key in keys}))
    before = FeatureStore.open(store)
    features = before.array("image").load()
    assert before.pairs.keys.tolist() == source.keys
    catalog.rows = rows
    report = extract(catalog.write(), store)
    assert report.nothing_to_do  # type: ignore[attr-defined]
    assert FeatureStore.open(store).view is None
    catalog.rows = rows[::-1]
    report = extract(catalog.write(), store)
    assert report.nothing_to_do  # type: ignore[attr-defined]
    after = FeatureStore.open(store)
    assert np.array_equal(after.array("image").load(), features[::-1])
    assert FeatureStore.open(store, "0000").digest == before.digest
    assert verify_store(store).problems == ()


def test_unreadable_rows_are_tried_again_when_they_change_or_are_asked_for(
    catalog: Catalog,
    extract: Callable[..., object],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    path = catalog.folder / catalog.images[0]
    good = path.read_bytes()
    path.write_bytes(b"<html>")
    extract(catalog.write(), store)
    assert FeatureStore.open(store).array("image").n_quarantined == 1
    assert extract(catalog.table, store).nothing_to_do  # type: ignore[attr-defined]
    assert FeatureStore.open(store).view is None
    retried = extract(catalog.table, store, retry=True)
    assert retried.arrays[0].n_encoded == 1  # type: ignore[attr-defined]
    assert FeatureStore.open(store).array("image").n_quarantined == 1
    path.write_bytes(good)
    healed = extract(catalog.table, store)
    assert healed.arrays[0].n_encoded == 1  # type: ignore[attr-defined]
    array = FeatureStore.open(store).array("image")
    assert (array.n_quarantined, array.load_ok().all()) == (0, True)


def test_another_encoder_is_added_to_all_blocks_but_never_with_another_content(
    catalog: Catalog,
    extract: Callable[..., object],
    other_text_encoder: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    """A replaced photo stays what it was in the old view, which the new encoder cannot see."""
    store = tmp_path / "store"
    extract(catalog.write(), store)
    draw_shape("red", "square", 60).save(catalog.folder / catalog.images[0])
    extract(catalog.table, store)
    spec = ExtractSpec(
        image=parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=parse_encoder(f"hf:{other_text_encoder}", "text"),
        add=True,
        device="cpu",
    )
    run_extraction(open_pairs(catalog.table), store, spec)
    cls = ExtractSpec(
        image=replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), pooling="mean"),
        add=True,
        max_bad=1.0,
        device="cpu",
    )
    run_extraction(open_pairs(catalog.table), store, cls)
    names = [array.name for array in FeatureStore.open(store).arrays("image")]
    assert len(names) == 2
    for name in names:
        assert FeatureStore.open(store).array("image", name).load_ok().all()
    (other,) = [name for name in names if name != "tiny-vit"]
    (row,) = FeatureStore.open(store, "0000").array("image", other).quarantined()
    assert (row["row"], row["reason"]) == (0, "changed")


def test_features_of_another_store_are_taken_where_contents_are_equal(
    catalog: Catalog,
    extract: Callable[..., object],
    new_images: list[Path],
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    extract(catalog.write(), other)
    features = FeatureStore.open(other).array("image").load()
    keys = FeatureStore.open(other).pairs.keys.tolist()
    key = "images/new.png"
    shutil.copy(new_images[0], catalog.folder / key)
    added = Row(image=key, caption="a new picture")
    # Every second image of the other store, and a new one between.
    kept = [row for row in catalog.rows if row.image in keys[::2]]
    catalog.rows = [*kept[:3], added, *kept[3:]]
    store = tmp_path / "store"
    report = extract(catalog.write(), store, reuse=other)
    assert [array.n_encoded for array in report.arrays] == [1, 1]  # type: ignore[attr-defined]
    opened = FeatureStore.open(store)
    assert opened.pairs.keys.tolist() == [keys[0], key, *keys[2::2]]
    loaded = opened.array("image").load()
    assert np.array_equal(loaded[[0, *range(2, 7)]], features[::2])
    assert opened.array("image").load_ok().all()
    assert verify_store(store).problems == ()
    assert extract(catalog.table, store, reuse=other).nothing_to_do  # type: ignore[attr-defined]
    assert extract(catalog.table, store).nothing_to_do  # type: ignore[attr-defined]
