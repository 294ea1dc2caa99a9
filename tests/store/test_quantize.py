"""int8 features: what is lost, what is not there, and everything else a store promises."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401 - not within the first example
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from apecache.errors import DamagedError
from apecache.store.quantize import BLOCK_NUMBERS, quantize, restore
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store

SPLITS = [""] * 9
LENGTHS = np.array([5, 1, 2, 3, 4, 5, 5, 1, 2])

usual = arrays.arrays(
    np.float16,
    arrays.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-65504, 65504, width=16),
)


def restored(features: NDArray[np.floating]) -> NDArray[np.float32]:
    out = np.empty(features.shape, np.float32)
    restore(*quantize(features), out)
    return out


@given(usual)
def test_no_number_is_off_by_more_than_half_a_scale(features: NDArray[np.float16]) -> None:
    values, scales = quantize(features)
    assert (values.dtype, values.shape, scales.dtype) == (np.int8, features.shape, np.float32)
    assert scales.shape == features.shape[:-1]
    off = np.abs(restored(features) - features.astype(np.float32))
    assert (off <= scales[..., None] * np.float32(0.5001)).all()


@given(usual)
@settings(max_examples=30)
def test_what_was_restored_is_kept_as_it_is(features: NDArray[np.float16]) -> None:
    once = restored(features)
    assert np.allclose(restored(once), once, rtol=1e-6, atol=0)


def test_vectors_of_zeros_stay_and_what_is_not_finite_is_marked_by_its_scale() -> None:
    rows = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [-np.inf, 1], [-3, 1.5]], np.float32)
    values, scales = quantize(rows)
    assert values.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [-127, 64]]
    assert (scales[0], np.isfinite(scales).tolist()) == (0, [True, False, False, False, True])


def test_a_target_that_cannot_be_written_in_place_is_refused() -> None:
    out = np.empty((4, 6), np.float16)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        restore(*quantize(np.ones((4, 3), np.float16)), out)


def test_blocks_do_not_show() -> None:
    features = (
        np.random.default_rng(0).normal(size=(2 * BLOCK_NUMBERS // 7 + 3, 7)).astype(np.float16)
    )
    values, scales = quantize(features)
    for row in (0, BLOCK_NUMBERS // 7 - 1, BLOCK_NUMBERS // 7, len(features) - 1):
        alone, scale = quantize(features[row : row + 1])
        assert np.array_equal(values[row : row + 1], alone)
        assert scales[row] == scale[0]
        assert np.array_equal(restored(features)[row], restored(features[row : row + 1])[0])


def outliers(rng: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    """As transformers' tokens are: some of them many times as long as the others."""
    features = rng.normal(size=shape)
    features[..., ::4, :] *= 50
    return features.astype(np.float16)


@pytest.fixture
def store(write_store: Any, tmp_path: Path) -> FeatureStore:
    rng = np.random.default_rng(0)
    made: FeatureStore = write_store(
        tmp_path / "store", outliers(rng, 9, 3, 8), outliers(rng, 9, 5, 8), list(range(9)), SPLITS,
        shard_rows=4, bad_images=(2,), bad_texts=(6,), text_lengths=LENGTHS, storage="int8",
    )  # fmt: skip
    return made


def test_tokens_come_back_in_half_precision_with_their_gaps(store: FeatureStore) -> None:
    rng = np.random.default_rng(0)
    images = outliers(rng, 9, 3, 8)
    texts = outliers(rng, 9, 5, 8)
    image = store.array("image")
    text = store.array("text")
    for array in (image, text):
        assert (array.dtype, array.record.layout.dtype) == (np.float16, "int8")
    found = image.load()
    assert np.isnan(found[2]).all()
    assert image.load_ok().tolist() == [row != 2 for row in range(9)]
    kept = np.arange(9) != 2
    largest = np.abs(images[kept].astype(np.float32)).max(-1, keepdims=True)
    assert (np.abs(found[kept].astype(np.float32) - images[kept]) <= 0.0051 * largest).all()
    assert found[kept].any()
    words = text.load()
    there = np.arange(5) < LENGTHS[:, None]
    assert np.isnan(words[6]).all()
    there[6] = False
    assert (words[(np.arange(5) >= LENGTHS[:, None]) & (np.arange(9) != 6)[:, None]] == 0).all()
    assert np.allclose(words[there].astype(np.float32), restored(texts[there]), rtol=1e-3)
    assert text.load_lengths().tolist() == [*LENGTHS[:6], 0, *LENGTHS[7:]]  # type: ignore[union-attr]
    assert np.array_equal(image.load_shard(1), found[4:8])


def test_bytes_are_half_and_the_scales_are_counted(
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
) -> None:
    half = write_store(
        tmp_path / "half",
        np.zeros((9, 3, 8), np.float16),
        np.zeros((9, 8), np.float16),
        list(range(9)),
        SPLITS,
    )
    assert store.array("image").row_bytes == 3 * 8 + 3 * 4
    assert half.array("image").row_bytes == 3 * 8 * 2


def test_pooled_features_and_appended_rows_are_read_alike(write_store: Any, tmp_path: Path) -> None:
    features = np.random.default_rng(1).normal(size=(12, 8)).astype(np.float16)
    for folder, rows in (
        (tmp_path / "s", slice(0, 9)),
        (tmp_path / "s" / "segments" / "0001", slice(9, 12)),
    ):
        own = features[rows]
        write_store(
            folder,
            own,
            own,
            list(range(len(own))),
            [""] * len(own),
            shard_rows=4,
            storage="int8",
        )
    array = FeatureStore.open(tmp_path / "s").array("image")
    out = np.empty((12, 8), np.float16)
    assert np.allclose(array.load(out), restored(features).astype(np.float16))


def test_zarr_and_xarray_find_the_scales(store: FeatureStore) -> None:
    folder = Path(store.path) / "features.zarr"
    group = zarr.open_group(folder, mode="r")["image/pixels"]
    assert group["features"].dtype == np.int8  # type: ignore[union-attr, index]
    product = group["features"][:] * group["scale"][:][..., None]  # type: ignore[index, operator]
    assert np.allclose(product, store.array("image").load(), rtol=1e-3, equal_nan=True)
    tree = xarray.open_zarr(folder / "image" / "pixels", consolidated=False)
    assert np.array_equal((tree["features"] * tree["scale"]).to_numpy(), product, equal_nan=True)
    assert tree["scale"].dims == tree["features"].dims[:-1]


def test_a_chunk_that_was_never_written_reads_as_nan(write_store: Any, tmp_path: Path) -> None:
    features = np.ones((9, 8), np.float16)
    write_store(
        tmp_path / "s",
        features,
        features,
        list(range(9)),
        SPLITS,
        shard_rows=4,
        n_shards=1,
        storage="int8",
    )
    group = zarr.open_group(tmp_path / "s" / "features.zarr", mode="r")["image/pixels"]
    product = group["features"][:] * group["scale"][:][..., None]  # type: ignore[index, operator]
    assert np.isnan(product).all(1).tolist() == [False] * 4 + [True] * 5


@pytest.mark.parametrize("part", ["features", "scale"])
def test_damage_is_noticed_when_it_is_read_and_by_verify(store: FeatureStore, part: str) -> None:
    path = (
        Path(store.path)
        / "features.zarr"
        / "image"
        / "pixels"
        / part
        / ("c.1.0.0" if part == "features" else "c.1.0")
    )
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="shard 1"):
        store.array("image").load()
    (problem,) = verify_store(store.path).problems
    assert (problem.kind, problem.shard, problem.object.endswith(f"{part}/{path.name}")) == (
        "damaged",
        1,
        True,
    )
