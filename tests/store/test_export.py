"""Export: plain files that need no pickle and hold what the store serves, whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Grown

from apecache.errors import DamagedError, DataError, IncompleteError, MissingExtraError
from apecache.store import export
from apecache.store.export import export_npz, export_parquet
from apecache.store.reader import FeatureStore

CAPTIONS = ["a dog", "", "un œuf 🥚", "=1+1", "long " * 40]


@pytest.fixture
def small(tmp_path: Path, write_store: Callable[..., FeatureStore]) -> FeatureStore:
    """3 images (one unreadable) in float16 and 5 captions in float32."""
    chance = np.random.default_rng(0)
    image = chance.standard_normal((3, 4)).astype(np.float16)
    text = chance.standard_normal((5, 2)).astype(np.float32)
    rows = [0, 0, 1, 2, 2]
    splits = ["train", "", "val"]
    return write_store(
        tmp_path / "store",
        image,
        text,
        rows,
        splits,
        captions=CAPTIONS,
        bad_images=(1,),
        shard_rows=2,
    )


def test_npz_holds_the_table_and_every_array_in_order_without_pickle(
    small: FeatureStore,
    tmp_path: Path,
) -> None:
    names = export_npz(small, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert sorted(found) == sorted(names)
        assert found["image_key"].tolist() == small.pairs.keys.tolist()
        assert found["image_split"].tolist() == ["train", "", "val"]
        assert found["image_label"].tolist() == ["", "", ""]
        assert found["text_caption"].tolist() == CAPTIONS
        assert found["text_language"].tolist() == ["en"] * 5
        assert found["text_image_row"].tolist() == [0, 0, 1, 2, 2]
        for name in ("image.pixels", "text.words"):
            array = small.array(*name.split("."))  # type: ignore[arg-type]
            assert found[name].dtype == array.dtype
            assert found[name].tobytes() == array.load().tobytes()
            assert found[f"{name}.ok"].tolist() == array.load_ok().tolist()
        assert found["image.pixels.ok"].tolist() == [True, False, True]


def test_parquet_holds_the_table_and_every_array_with_nulls_where_there_is_none(
    small: FeatureStore,
    tmp_path: Path,
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export_parquet(small, tmp_path / "out") == ["images.parquet", "texts.parquet"]
    images, texts = (
        parquet.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("images", "texts")
    )
    assert images.column("key").to_pylist() == small.pairs.keys.tolist()
    assert images.column("split").to_pylist() == ["train", "", "val"]
    assert texts.column("caption").to_pylist() == CAPTIONS
    assert texts.column("image_row").to_pylist() == [0, 0, 1, 2, 2]
    features = small.array("image").load()
    assert images.column("pixels").to_pylist() == [features[0].tolist(), None, features[2].tolist()]
    assert texts.column("words").to_pylist() == small.array("text").load().tolist()
    assert str(images.schema.field("pixels").type).startswith("fixed_size_list<")
    assert "halffloat" in str(images.schema.field("pixels").type)


def test_a_store_that_grew_is_exported_whole(grown_once: Grown, tmp_path: Path) -> None:
    store = FeatureStore.open(grown_once.store)
    export_npz(store, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found["image.tiny-vit"].tobytes() == store.array("image").load().tobytes()
        assert found["text_image_row"].tolist() == list(range(16))
    export_parquet(store, tmp_path / "out")
    read = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "images.parquet")
    assert [
        row for row, value in enumerate(read.column("tiny-vit").to_pylist()) if value is None
    ] == [4, 13]


KINDS: list[tuple[Callable[..., Any], str]] = [(export_npz, "out.npz"), (export_parquet, "out")]


@pytest.mark.parametrize(("run", "name"), KINDS)
def test_an_incomplete_store_is_refused_and_nothing_is_left(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
    run: Callable[..., Any],
    name: str,
) -> None:
    """The images are whole, the texts are not: half an export must not look like one."""
    features = np.ones((6, 2), np.float16)
    table: Any = (features, features, list(range(6)), [""] * 6)
    write_store(tmp_path / "store", *table, modalities=("image",))
    store = write_store(tmp_path / "store", *table, modalities=("text",), shard_rows=2, n_shards=2)
    with pytest.raises(
        IncompleteError,
        match="text/words is 67% done; resume with the same apecache extract",
    ):
        run(store, tmp_path / "place" / name)
    assert not (tmp_path / "place").exists() or not list((tmp_path / "place").iterdir())


@pytest.mark.parametrize(("run", "name"), KINDS)
def test_a_damaged_store_is_refused_and_nothing_is_left(
    small: FeatureStore,
    tmp_path: Path,
    run: Callable[..., Any],
    name: str,
) -> None:
    (small.path / "features.zarr/text/words/features/c.1.0").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"c\.1\.0"):
        run(small, tmp_path / "place" / name)
    assert not list((tmp_path / "place").iterdir())


@pytest.mark.parametrize(("run", "name"), KINDS)
def test_what_a_killed_export_left_is_no_hindrance(
    small: FeatureStore,
    tmp_path: Path,
    run: Callable[..., Any],
    name: str,
) -> None:
    left = tmp_path / f".{name}.tmp"
    left.mkdir() if name == "out" else left.write_bytes(b"half")
    if name == "out":
        (left / "images.parquet").write_bytes(b"half")
    run(small, tmp_path / name)
    assert (tmp_path / name).exists()
    assert not left.exists()


def test_captions_too_long_for_fixed_width_strings_are_refused_with_a_way_out(
    small: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "MAX_TEXT_BYTES", 100)
    with pytest.raises(DataError, match="--parquet"):
        export_npz(small, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_without_pyarrow_the_extra_is_named(
    small: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"apecache\[parquet\]"):
        export_parquet(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
