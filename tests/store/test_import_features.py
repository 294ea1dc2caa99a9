"""Features that exist become a store: each row goes to its image or text, and what has none is
named."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import apecache
from apecache import FeatureInput, FeatureStore, ImportSpec, OpenSpec, import_features
from apecache.data.pairs import Pair, PairSource
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import BadRowsError, DataError, EncoderError, MismatchError, OptionError
from apecache.store.import_rows import finite_rows, hash_rows
from apecache.store.verify import verify_store

DIM = 6


def vectors(n_rows: int, seed: int = 0, dim: int = DIM) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n_rows, dim)).astype(np.float32)


def table_of(captions: Sequence[int], prefix: str = "im/") -> PairSource:
    """Return a table of images with so many captions each."""
    pairs = [
        Pair(
            key=f"{prefix}{image}.jpg",
            captions=tuple(f"caption {number} of {image}" for number in range(count)),
            languages=("en",) * count,
            split="val" if image % 3 == 2 else "train",
            label=str(image % 2),
        )
        for image, count in enumerate(captions)
    ]
    return PairSource(tuple(pairs), origin="pairs.tsv")


def save(path: Path, values: NDArray[Any]) -> Path:
    np.save(path, values)
    return path


def load(store: Path, modality: Any) -> NDArray[Any]:
    return FeatureStore.open(store).array(modality).load()


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: nobody cuts the power in these tests."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def npy(tmp_path: Path) -> dict[str, Path]:
    return {
        "image": save(tmp_path / "image.npy", vectors(5)),
        "text": save(tmp_path / "text.npy", vectors(9, seed=1)),
    }


def by_row(npy: dict[str, Path], **more: Any) -> ImportSpec:
    return ImportSpec(
        image=FeatureInput(features=npy["image"]),
        text=FeatureInput(features=npy["text"]),
        by_row=True,
        **more,
    )


CAPTIONS = (2, 1, 3, 1, 2)


def test_rows_are_joined_by_position_only_when_asked_and_only_if_counts_are_equal(
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    pairs = table_of(CAPTIONS)
    spec = by_row(npy)
    report = import_features(tmp_path / "store", spec, pairs)
    assert np.array_equal(load(tmp_path / "store", "image"), vectors(5))
    assert np.array_equal(load(tmp_path / "store", "text"), vectors(9, seed=1))
    assert [(a.n_imported, a.dtype) for a in report.arrays] == [(5, "float32"), (9, "float32")]
    with pytest.raises(DataError, match=r"has no keys.*--image-keys.*--by-row"):
        import_features(tmp_path / "b", ImportSpec(image=spec.image, text=spec.text), pairs)
    with pytest.raises(DataError, match=r"has 5 rows, pairs.tsv 4 images; --by-row needs equal"):
        import_features(tmp_path / "c", spec, table_of((2, 1, 3, 3)))
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


def test_one_row_for_each_caption_is_not_taken_for_images(tmp_path: Path) -> None:
    path = save(tmp_path / "image.npy", vectors(9))
    spec = ImportSpec(image=FeatureInput(features=path), by_row=True)
    with pytest.raises(DataError, match="one row for each caption: give one for each image"):
        import_features(tmp_path / "store", spec, table_of(CAPTIONS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_keys_bring_every_row_to_its_image_and_its_captions(
    data: st.DataObject,
    tmp_path: Path,
) -> None:
    """Whatever the order of the rows, and whether captions or their order tell texts apart."""
    pairs = table_of(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=7)))
    image_order = data.draw(st.permutations(range(len(pairs))))
    text_order = data.draw(st.permutations(range(len(pairs.captions))))
    knows_captions = data.draw(st.booleans())
    if not knows_captions:
        # Rows of one image keep their order; only images are shuffled.
        rank = {image: position for position, image in enumerate(image_order)}
        text_order = sorted(range(len(pairs.captions)), key=lambda t: rank[pairs.image_rows[t]])
    folder = tmp_path / "drawn"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    of_images = vectors(len(pairs))
    of_texts = vectors(max(1, len(pairs.captions)), seed=1)[: len(pairs.captions)]
    keys = np.array(pairs.keys)
    np.savez(folder / "i.npz", emb=of_images[image_order], key=keys[image_order])
    spec = ImportSpec(image=FeatureInput(features=folder / "i.npz"), shard_rows=2)
    if pairs.captions:
        text_keys = keys[np.array(pairs.image_rows)[text_order]]
        columns = {"key": text_keys}
        if knows_captions:
            columns["caption"] = np.array(pairs.captions)[text_order]
        np.savez(folder / "t.npz", emb=of_texts[text_order], **columns)
        spec = ImportSpec(
            image=FeatureInput(features=folder / "i.npz"),
            text=FeatureInput(features=folder / "t.npz"),
            shard_rows=2,
        )
    report = import_features(folder / "store", spec, pairs)
    assert report.left_out == {}
    assert np.array_equal(load(folder / "store", "image"), of_images)
    if pairs.captions:
        assert np.array_equal(load(folder / "store", "text"), of_texts)


def test_rows_that_a_table_lacks_and_images_without_features_are_counted_and_named(
    tmp_path: Path,
) -> None:
    pairs = table_of((1, 1, 1, 1))
    keys = np.array(["im/3.jpg", "im/9.jpg", "im/0.jpg", "im/1.jpg", "im/1.jpg"])
    np.savez(tmp_path / "i.npz", emb=vectors(5), key=keys)
    spec = ImportSpec(image=FeatureInput(features=tmp_path / "i.npz"))
    with pytest.raises(BadRowsError, match=r"1 of 4 image rows .* im/2.jpg.*--max-bad 0.2[56]"):
        import_features(tmp_path / "store", spec, pairs)
    assert not (tmp_path / "store").exists()
    spec = ImportSpec(image=FeatureInput(features=tmp_path / "i.npz"), max_bad=0.3)
    report = import_features(tmp_path / "store", spec, pairs)
    assert report.left_out == {
        "image rows of a repeated key": 1,
        "images that are not in the table": 1,
    }
    assert report.arrays[0].reasons == {"missing": 1}
    assert "im/2.jpg" in report.arrays[0].examples[0]
    loaded = load(tmp_path / "store", "image")
    assert np.array_equal(loaded[[0, 1, 3]], vectors(5)[[2, 3, 0]])
    assert np.isnan(loaded[2]).all()
    assert FeatureStore.open(tmp_path / "store").array("image").load_ok().tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("match", "keys"),
    [("name", ["/data/0.jpg", "C:\\x\\1.jpg"]), ("stem", ["/data/0.png", "1"])],
)
def test_keys_may_be_compared_by_file_name_or_stem(
    match: Any,
    keys: list[str],
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "i.npz", emb=vectors(2), key=np.array(keys))
    given_input = FeatureInput(features=tmp_path / "i.npz")
    with pytest.raises(
        DataError, match=f"none of its keys.* 2 of them fit with --match-keys {match}"
    ):
        import_features(tmp_path / "store", ImportSpec(image=given_input), table_of((1, 1)))
    spec = ImportSpec(image=given_input, match_keys=match)
    import_features(tmp_path / "store", spec, table_of((1, 1)))
    assert np.array_equal(load(tmp_path / "store", "image"), vectors(2))


def test_two_keys_of_one_file_name_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", emb=vectors(2), key=np.array(["a/0.jpg", "b/0.jpg"]))
    spec = ImportSpec(image=FeatureInput(features=tmp_path / "i.npz"), match_keys="name")
    with pytest.raises(DataError, match=r"a/0.jpg and b/0.jpg are the same by --match-keys name"):
        import_features(tmp_path / "store", spec, table_of((1, 1)))


def test_an_index_says_which_texts_belong_to_which_images(tmp_path: Path) -> None:
    image_rows = np.array([2, 0, 0, 1, 2, 2])
    spec = ImportSpec(
        image=FeatureInput(features=vectors(3)),
        text=FeatureInput(features=vectors(6, seed=1)),
        image_rows=image_rows,
    )
    import_features(tmp_path / "store", spec)
    store = FeatureStore.open(tmp_path / "store")
    assert store.pairs.image_rows.tolist() == [0, 0, 1, 2, 2, 2]
    order = [1, 2, 3, 0, 4, 5]
    assert np.array_equal(store.array("text").load(), vectors(6, seed=1)[order])
    np.save(tmp_path / "rows.npy", np.array([0, 1, 3]))
    spec = ImportSpec(
        image=FeatureInput(features=vectors(3)),
        text=FeatureInput(features=vectors(3)),
        image_rows=tmp_path / "rows.npy",
    )
    with pytest.raises(DataError, match=r"rows of images up to 3, .* has 3 rows.*from 0"):
        import_features(tmp_path / "other", spec)


def test_rows_that_are_not_finite_or_beyond_float16_are_quarantined(tmp_path: Path) -> None:
    values = vectors(40)
    values[3, 2] = np.nan
    values[7, 0] = np.inf
    values[11, 1] = 1e6
    path = save(tmp_path / "image.npy", values)
    spec = ImportSpec(
        image=FeatureInput(features=path),
        storage_dtype="float16",
        max_bad=0.1,
        shard_rows=16,
    )
    report = import_features(tmp_path / "store", spec)
    assert report.arrays[0].reasons == {"not-finite": 2, "overflow": 1}
    ok = FeatureStore.open(tmp_path / "store").array("image").load_ok()
    assert np.flatnonzero(~ok).tolist() == [3, 7, 11]
    few = ImportSpec(image=FeatureInput(features=path), storage_dtype="float16", max_bad=0.05)
    with pytest.raises(BadRowsError, match="3 of 40 image rows have no features"):
        import_features(tmp_path / "few", few)


@pytest.mark.parametrize("storage", ["float16", "float32", "int8"])
def test_every_storage_type_takes_every_shape(storage: Any, tmp_path: Path) -> None:
    pooled = vectors(7)
    tokens = np.random.default_rng(2).standard_normal((7, 4, DIM)).astype(np.float32)
    shapes = {
        "pooled": FeatureInput(features=pooled, name="a"),
        "tokens": FeatureInput(features=tokens, name="b"),
        "views": FeatureInput(features=tokens, name="c", views=True),
    }
    for name, given_input in shapes.items():
        spec = ImportSpec(image=given_input, storage_dtype=storage, shard_rows=3)
        import_features(tmp_path / name, spec)
        array = FeatureStore.open(tmp_path / name).array("image")
        wanted = pooled if name == "pooled" else tokens
        assert np.allclose(array.load(), wanted, atol=0.05)
        assert (array.tokens, array.views) == {
            "pooled": (None, None),
            "tokens": (4, None),
            "views": (None, 4),
        }[name]


def test_ragged_tokens_keep_their_lengths(tmp_path: Path) -> None:
    lengths = np.array([2, 5, 1])
    flat = vectors(8)
    np.savez(tmp_path / "t.npz", emb=flat, lengths=lengths, key=np.array(["a", "b", "c"]))
    import_features(
        tmp_path / "store",
        ImportSpec(text=FeatureInput(features=tmp_path / "t.npz"), shard_rows=2),
    )
    array = FeatureStore.open(tmp_path / "store").array("text")
    found = array.load_lengths()
    assert found is not None
    assert found.tolist() == [2, 5, 1]
    assert np.array_equal(array.load()[1], flat[2:7])
    assert (array.load()[2, 1:] == 0).all()


# --- again ----------------------------------------------------------------------------------------


def files_of(store: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(store)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def test_the_same_import_again_has_nothing_to_do(npy: dict[str, Path], tmp_path: Path) -> None:
    pairs = table_of(CAPTIONS)
    import_features(tmp_path / "store", by_row(npy), pairs)
    before = files_of(tmp_path / "store")
    renamed = dict(npy)
    renamed["image"] = npy["image"].rename(tmp_path / "image-moved.npy")
    spec = ImportSpec(
        image=FeatureInput(features=renamed["image"], name="image"),
        text=FeatureInput(features=npy["text"]),
        by_row=True,
    )
    assert import_features(tmp_path / "store", spec, pairs).nothing_to_do
    assert files_of(tmp_path / "store") == before


def test_a_changed_source_is_refused_and_says_what_to_do(
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    pairs = table_of(CAPTIONS)
    import_features(tmp_path / "store", by_row(npy), pairs)
    before = files_of(tmp_path / "store")
    values = vectors(5)
    values[4, 3] += 1
    save(npy["image"], values)
    with pytest.raises(MismatchError, match=r"import.source: .*--image-name.*apecache remove") as e:
        import_features(tmp_path / "store", by_row(npy), pairs)
    assert [difference[0] for difference in e.value.differences] == ["import.source"]
    assert files_of(tmp_path / "store") == before
    other = FeatureInput(features=npy["image"], name="newer")
    import_features(tmp_path / "store", ImportSpec(image=other, by_row=True))
    assert [a.name for a in FeatureStore.open(tmp_path / "store").arrays("image")] == [
        "image",
        "newer",
    ]


def test_other_keys_for_the_same_file_are_another_source(tmp_path: Path) -> None:
    pairs = table_of((1, 1))
    np.save(tmp_path / "i.npy", vectors(2))

    def spec(*keys: str) -> ImportSpec:
        return ImportSpec(image=FeatureInput(features=tmp_path / "i.npy", keys=keys))

    import_features(tmp_path / "store", spec("im/0.jpg", "im/1.jpg"), pairs)
    with pytest.raises(MismatchError, match=r"import.rows"):
        import_features(tmp_path / "store", spec("im/1.jpg", "im/0.jpg"), pairs)


def test_recheck_writes_damaged_shards_again(npy: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    pairs = table_of(CAPTIONS)
    import_features(store, by_row(npy, shard_rows=2), pairs)
    chunk = store / "features.zarr/image/image/features/c.1.0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"123456789")
    assert not verify_store(store).sound
    assert import_features(store, by_row(npy, shard_rows=2), pairs).nothing_to_do
    import_features(store, by_row(npy, shard_rows=2, recheck=True), pairs)
    assert verify_store(store).sound


def test_an_import_that_was_stopped_goes_on_with_what_is_missing(
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    class StoppedError(Exception):
        pass

    def stop(state: Any) -> None:
        if state.done >= 4:
            raise StoppedError

    pairs = table_of(CAPTIONS)
    with pytest.raises(StoppedError):
        import_features(tmp_path / "store", by_row(npy, shard_rows=2), pairs, stop)
    report = import_features(tmp_path / "store", by_row(npy, shard_rows=2), pairs)
    assert report.arrays[0].n_imported < 5
    assert np.array_equal(load(tmp_path / "store", "image"), vectors(5))
    assert verify_store(tmp_path / "store").sound


# --- with a store that exists ---------------------------------------------------------------------


def test_features_are_added_by_the_table_of_the_store(npy: dict[str, Path], tmp_path: Path) -> None:
    pairs = table_of(CAPTIONS)
    store = tmp_path / "store"
    import_features(store, by_row(npy), pairs)
    keys = tuple(reversed(pairs.keys))
    added = FeatureInput(features=vectors(5, seed=7), keys=keys, name="added")
    import_features(store, ImportSpec(image=added))
    opened = FeatureStore.open(store)
    assert np.array_equal(opened.array("image", "added").load(), vectors(5, seed=7)[::-1])
    with pytest.raises(MismatchError, match="another table"):
        import_features(store, by_row(npy), table_of((2, 1, 3, 1, 2), prefix="other/"))


def test_rows_go_to_every_segment_of_a_store(
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    pairs = table_of((1, 2, 1, 1, 2))
    spec = apecache.ExtractSpec(
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        device="cpu",
        shard_rows=2,
    )
    store = tmp_path / "store"
    apecache.extract(pairs.part(0, 3), store, spec)
    apecache.extract(
        pairs,
        store,
        apecache.ExtractSpec(text=spec.text, device="cpu"),
    )
    added = FeatureInput(features=vectors(7), name="added")
    by_row = ImportSpec(text=added, shard_rows=2, by_row=True)
    report = import_features(store, by_row)
    assert report.arrays[0].rows == 7
    opened = FeatureStore.open(store)
    assert len(opened.segments) == 1
    assert np.array_equal(opened.array("text", "added").load(), vectors(7))
    assert import_features(store, by_row).nothing_to_do
    # Another order of the table is another view: each row gets the features that are its own.
    turned = replace(pairs, pairs=pairs.pairs[::-1])
    apecache.extract(turned, store, apecache.ExtractSpec(text=spec.text, device="cpu"))
    again = FeatureInput(features=vectors(7, seed=3), name="again")
    import_features(store, ImportSpec(text=again, by_row=True))
    loaded = FeatureStore.open(store).array("text", "again").load()
    assert np.array_equal(loaded, vectors(7, seed=3))
    assert not np.array_equal(FeatureStore.open(store).array("text", "added").load(), vectors(7))
    # Images that no encoder has seen are in no block.
    images = FeatureInput(features=vectors(5), keys=tuple(pairs.keys), name="images")
    with pytest.raises(MismatchError, match=r"no place for 2 image rows .* extract with --image"):
        import_features(store, ImportSpec(image=images))


def test_extract_adds_its_features_to_an_imported_store(
    shapes_once: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    pairs = apecache.open_pairs(shapes_once)
    store = tmp_path / "store"
    image = FeatureInput(features=vectors(len(pairs)), name="mine")
    import_features(store, ImportSpec(image=image, by_row=True), pairs)
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    apecache.extract(pairs, store, apecache.ExtractSpec(text=text, device="cpu"))
    opened = FeatureStore.open(store)
    assert [a.record.modality for a in opened.arrays()] == ["image", "text"]


# --- without a table ------------------------------------------------------------------------------


def test_keys_on_both_sides_pair_them_without_a_table(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", emb=vectors(3), key=np.array(["a", "b", "c"]))
    np.savez(
        tmp_path / "t.npz",
        emb=vectors(4, seed=1),
        key=np.array(["c", "a", "c", "x"]),
        caption=np.array(["one", "two", "three", "four"]),
    )
    spec = ImportSpec(
        image=FeatureInput(features=tmp_path / "i.npz"),
        text=FeatureInput(features=tmp_path / "t.npz"),
        splits=OpenSpec(split_fraction=(("train", 0.5), ("val", 0.5))),
    )
    report = import_features(tmp_path / "store", spec)
    assert report.left_out == {"texts without an image": 1}
    pairs = FeatureStore.open(tmp_path / "store").pairs
    assert pairs.captions.tolist() == ["two", "one", "three"]
    assert pairs.image_rows.tolist() == [0, 2, 2]
    assert set(pairs.splits) <= {"train", "val"}
    assert np.array_equal(load(tmp_path / "store", "text"), vectors(4, seed=1)[[1, 0, 2]])


def test_two_files_without_keys_are_not_paired_by_guess(
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    spec = by_row(npy)
    with pytest.raises(DataError, match=r"nothing says which texts .*--pairs.*--by-row"):
        import_features(tmp_path / "s", ImportSpec(image=spec.image, text=spec.text))
    with pytest.raises(DataError, match=r"has 5 rows, .* 9; --by-row needs equal counts"):
        import_features(tmp_path / "s", spec)


def test_one_record_of_parquet_holds_both_sides_and_repeated_images_are_one(
    tmp_path: Path,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float32())
    table = pa.table(
        {
            "image": ["a.jpg", "a.jpg", "b.jpg"],
            "caption": ["one", "two", "three"],
            "split": ["train", "train", "val"],
            "image_emb": pa.array(list(vectors(3)), kind),
            "text_emb": pa.array(list(vectors(3, seed=1)), kind),
        }
    )
    pq.write_table(table, tmp_path / "f.parquet")
    report = import_features(tmp_path / "store", ImportSpec(source=tmp_path / "f.parquet"))
    assert report.left_out == {"image rows of a repeated key": 1}
    pairs = FeatureStore.open(tmp_path / "store").pairs
    assert pairs.keys.tolist() == ["a.jpg", "b.jpg"]
    assert pairs.splits.tolist() == ["train", "val"]
    assert pairs.captions.tolist() == ["one", "two", "three"]
    assert np.array_equal(load(tmp_path / "store", "image"), vectors(3)[[0, 2]])
    assert np.array_equal(load(tmp_path / "store", "text"), vectors(3, seed=1))


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_an_export_comes_back_as_the_same_store(
    form: str,
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    from apecache.store.export import export_npz, export_parquet

    import_features(tmp_path / "store", by_row(npy), table_of(CAPTIONS))
    store = FeatureStore.open(tmp_path / "store")
    out = tmp_path / ("out.npz" if form == "npz" else "out")
    (export_npz if form == "npz" else export_parquet)(store, out)
    import_features(tmp_path / "back", ImportSpec(source=out))
    back = FeatureStore.open(tmp_path / "back")
    for column in ("keys", "splits", "labels", "captions", "languages", "image_rows"):
        assert getattr(back.pairs, column).tolist() == getattr(store.pairs, column).tolist()
    for array in store.arrays():
        again = back.array(array.record.modality, array.name)
        assert np.array_equal(again.load(), array.load())


def test_an_export_of_ragged_tokens_comes_back_with_their_lengths(tmp_path: Path) -> None:
    from apecache.store.export import export_npz

    np.savez(tmp_path / "t.npz", emb=vectors(8), lengths=np.array([2, 5, 1]))
    import_features(
        tmp_path / "store",
        ImportSpec(text=FeatureInput(features=tmp_path / "t.npz", name="words")),
    )
    store = FeatureStore.open(tmp_path / "store")
    export_npz(store, tmp_path / "out.npz")
    import_features(tmp_path / "back", ImportSpec(source=tmp_path / "out.npz"))
    back = FeatureStore.open(tmp_path / "back").array("text", "words")
    lengths = back.load_lengths()
    assert lengths is not None
    assert lengths.tolist() == [2, 5, 1]
    assert np.array_equal(back.load(), store.array("text").load())


def write_clip_retrieval(folder: Path, sizes: Sequence[int], texts: bool = True) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    for number, size in enumerate(sizes):
        rows = slice(first, first + size)
        for name in ("img_emb", "text_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        image = vectors(sum(sizes))[rows].astype(np.float16)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", image)
        if texts:
            text = vectors(sum(sizes), seed=1)[rows].astype(np.float16)
            np.save(folder / "text_emb" / f"text_emb_{number}.npy", text)
        keys = [f"{row}.jpg" for row in range(rows.start, rows.stop)]
        captions = [f"caption {row}" for row in range(rows.start, rows.stop)]
        metadata = pa.table({"image_path": keys, "caption": captions})
        pq.write_table(metadata, folder / "metadata" / f"metadata_{number}.parquet")
        first += size


def test_parts_of_clip_retrieval_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "laion", [1] * 12)
    import_features(tmp_path / "store", ImportSpec(source=tmp_path / "laion"))
    store = FeatureStore.open(tmp_path / "store")
    assert store.pairs.keys.tolist() == [f"{row}.jpg" for row in range(12)]
    assert store.pairs.captions.tolist() == [f"caption {row}" for row in range(12)]
    assert np.array_equal(store.array("image").load(), vectors(12).astype(np.float16))
    assert np.array_equal(store.array("text").load(), vectors(12, seed=1).astype(np.float16))


def test_clip_retrieval_without_texts_keeps_its_captions(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "laion", [3, 2], texts=False)
    shutil.rmtree(tmp_path / "laion/text_emb")
    import_features(tmp_path / "store", ImportSpec(source=tmp_path / "laion"))
    store = FeatureStore.open(tmp_path / "store")
    assert store.pairs.captions.tolist() == [f"caption {row}" for row in range(5)]
    assert [a.record.modality for a in store.arrays()] == ["image"]


def test_a_part_that_is_missing_shifts_no_rows(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "laion", [2, 2, 2])
    (tmp_path / "laion/text_emb/text_emb_1.npy").unlink()
    with pytest.raises(DataError, match="parts 1 are only in one of img_emb and text_emb"):
        import_features(tmp_path / "store", ImportSpec(source=tmp_path / "laion"))


# --- identity -------------------------------------------------------------------------------------


def shape_inputs(shapes_once: Path, tiny: Path, modality: Any) -> tuple[Any, NDArray[Any]]:
    """Return an encoder and what it gives for the table of shapes."""
    from apecache.data.images import load_image

    pairs = apecache.open_pairs(shapes_once)
    if modality == "text":
        text_encoder = load_text_encoder(parse_encoder(f"hf:{tiny}", "text"), "cpu")
        return text_encoder, text_encoder.encode(pairs.captions).numpy()
    import torch

    image_encoder = load_image_encoder(parse_encoder(f"timm:{tiny}", "image"), "cpu")
    pixels = [image_encoder.preprocess(load_image(k, pairs.media).image) for k in pairs.keys]
    return image_encoder, image_encoder.encode(torch.stack(pixels)).numpy()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_named_encoder_is_tried_on_a_few_rows_and_identifies_the_features(
    modality: Any,
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    tiny = tiny_image_encoder if modality == "image" else tiny_text_encoder
    encoder, features = shape_inputs(shapes_once, tiny, modality)
    pairs = apecache.open_pairs(shapes_once)

    def spec(values: NDArray[Any]) -> ImportSpec:
        given_input = FeatureInput(features=values, encoder=encoder.spec)
        sides: dict[str, Any] = {modality: given_input}
        return ImportSpec(by_row=True, device="cpu", **sides)

    report = import_features(tmp_path / "store", spec(features), pairs)
    assert report.arrays[0].n_compared == 8
    array = FeatureStore.open(tmp_path / "store").array(modality)
    assert array.record.encoder.digest == encoder.fingerprint.digest
    assert array.name == encoder.spec.slug
    with pytest.raises(MismatchError, match=r"gives other features for .* of the inputs"):
        import_features(tmp_path / "wrong", spec(features[::-1].copy()), pairs)
    with pytest.raises(MismatchError, match="pooled features of 7 numbers"):
        import_features(tmp_path / "wrong", spec(vectors(len(features), dim=7)), pairs)
    assert not (tmp_path / "wrong").exists()


def test_normalized_features_have_live_queries_that_are_normalized(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    image_encoder, images = shape_inputs(shapes_once, tiny_image_encoder, "image")
    text_encoder, texts = shape_inputs(shapes_once, tiny_text_encoder, "text")
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pairs = apecache.open_pairs(shapes_once)
    spec = ImportSpec(
        image=FeatureInput(features=images, encoder=image_encoder.spec),
        text=FeatureInput(features=texts, encoder=text_encoder.spec),
        by_row=True,
        device="cpu",
    )
    import_features(tmp_path / "store", spec, pairs)
    run = fitted(tmp_path)
    store = FeatureStore.open(tmp_path / "store")
    model = apecache.load(run, device="cpu")
    in_store = apecache.embed_store(model.run, store, split=None)
    live_texts = model.encode_text(pairs.captions)
    live_images = model.encode_image([shapes_once.parent / key for key in pairs.keys])
    assert np.abs(in_store.text.numpy() - live_texts).max() < 1e-3
    assert np.abs(in_store.image.numpy() - live_images).max() < 1e-3


def fitted(folder: Path) -> Path:
    """Fit a head on the store of a folder."""
    recipe = apecache.load_recipe("projection", ["schedule.epochs=1"])
    spec = apecache.FitSpec(device="cpu", splits=apecache.SplitSpec(dev="val"))
    apecache.fit_head(FeatureStore.open(folder / "store"), recipe, folder / "run", spec)
    return folder / "run"


def test_a_head_on_features_of_no_known_encoder_serves_what_is_stored_and_says_what_live_needs(
    npy: dict[str, Path],
    tmp_path: Path,
) -> None:
    pairs = table_of((1,) * 12)
    spec = ImportSpec(
        image=FeatureInput(features=vectors(12), name="clap"),
        text=FeatureInput(features=vectors(12, seed=1), name="words"),
        by_row=True,
    )
    import_features(tmp_path / "store", spec, pairs)
    run = fitted(tmp_path)
    store = FeatureStore.open(tmp_path / "store")
    model = apecache.load(run, device="cpu")
    embedded = apecache.embed_store(model.run, store, split=None)
    assert len(embedded.image) == 12
    index = tmp_path / "index"
    apecache.build_index(run, store, index)
    opened = apecache.SearchIndex.open(index, device="cpu")
    hits = opened.find(apecache.Query(keys=("im/3.jpg",)), k=1, target="images")
    assert hits[0].key == "im/3.jpg"
    with pytest.raises(EncoderError, match=r"text features words were imported.*--text-encoder"):
        model.encode_text(["a word"])
    with pytest.raises(EncoderError, match=r"searched by --key.*--text-encoder"):
        opened.search("a word")


def test_features_of_one_name_are_of_one_encoder_and_of_another_name_are_not(
    tmp_path: Path,
) -> None:
    digests = {}
    for store, name in (("train", "clap"), ("test", "clap"), ("other", "clip")):
        given_input = FeatureInput(features=vectors(4, seed=len(store)), name=name)
        import_features(tmp_path / store, ImportSpec(image=given_input))
        array = FeatureStore.open(tmp_path / store).array("image")
        digests[store] = array.record.encoder.digest
    assert digests["train"] == digests["test"]
    assert digests["train"] != digests["other"]


def test_options_that_say_nothing_are_refused(npy: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to import"):
        import_features(tmp_path / "s", ImportSpec())
    with pytest.raises(OptionError, match="holds both sides"):
        import_features(
            tmp_path / "s",
            ImportSpec(source=npy["image"], image=FeatureInput(features=npy["image"])),
        )
    with pytest.raises(DataError, match=r"say of which side .*--modality"):
        import_features(tmp_path / "s", ImportSpec(source=save(tmp_path / "x.npy", vectors(3))))


def test_an_import_of_arrays_loads_no_torch(npy: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from apecache import FeatureInput, ImportSpec, import_features; "
        f"import_features({str(tmp_path / 's')!r}, "
        f"ImportSpec(image=FeatureInput(features={str(npy['image'])!r}))); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


# --- from memory ----------------------------------------------------------------------------------


def test_a_store_of_arrays_in_memory(tmp_path: Path) -> None:
    pairs = table_of(CAPTIONS)
    image = vectors(5)
    text = vectors(9, seed=1)
    store = FeatureStore.from_arrays(image, text, pairs, path=tmp_path / "store")
    assert store.pairs.keys.tolist() == pairs.keys
    assert np.array_equal(store.array("text", "text").load(), text)
    FeatureStore.from_arrays(image, text, pairs, path=tmp_path / "store")
    by_index = FeatureStore.from_arrays(image, text, np.array(pairs.image_rows))
    assert by_index.pairs.image_rows.tolist() == pairs.image_rows
    row_with_row = FeatureStore.from_arrays(image, text[:5])
    assert row_with_row.pairs.image_rows.tolist() == list(range(5))
    with pytest.raises(DataError, match="has 5 rows, text array 9"):
        FeatureStore.from_arrays(image, text)
    with pytest.raises(OptionError, match="at least one array"):
        FeatureStore.from_arrays(None, None)


# --- rows -----------------------------------------------------------------------------------------


@given(
    dim=st.integers(1, 40),
    dtype=st.sampled_from(["float16", "float32"]),
    bad=st.lists(
        st.tuples(
            st.integers(0, 9), st.integers(0, 39), st.sampled_from([np.nan, np.inf, -np.inf])
        ),
    ),
)
def test_rows_that_are_not_finite_are_found(dim: int, dtype: str, bad: list[Any]) -> None:
    values = np.random.default_rng(dim).standard_normal((10, dim)).astype(dtype)
    values[0] = np.finfo(dtype).max
    for row, column, value in bad:
        values[row, column % dim] = value
    assert np.array_equal(finite_rows(values), np.isfinite(values).all(1))


@given(dim=st.integers(1, 40), dtype=st.sampled_from(["float16", "float32"]))
def test_hashes_of_rows_are_equal_exactly_for_equal_rows(dim: int, dtype: str) -> None:
    values = np.random.default_rng(dim).standard_normal((40, dim)).astype(dtype)
    values[7] = values[3]
    hashes = hash_rows(values)
    assert hash_rows(values[5:9]) == hashes[5:9]
    for row in range(40):
        same = [other for other in range(40) if np.array_equal(values[row], values[other])]
        assert [other for other in range(40) if hashes[other] == hashes[row]] == same
