"""Features of a view are read in any order, and runs of rows straight to their places."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from apecache.errors import DamagedError
from apecache.store.array import FeatureArray
from apecache.store.gather import ViewArray
from apecache.store.layout import chunk_name
from apecache.store.reader import FeatureStore
from benchmarks.made_up_store import write_feature_store

pytestmark = pytest.mark.usefixtures("no_fsync")
N_ROWS = 200
SHARD_ROWS = 64


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """200 images in shards of 64, and 200 captions as ragged tokens."""
    rng = np.random.default_rng(0)
    return write_feature_store(
        tmp_path / "store",
        rng.standard_normal((N_ROWS, 8)).astype(np.float16),
        rng.standard_normal((N_ROWS, 3, 8)).astype(np.float16),
        image_rows=list(range(N_ROWS)),
        splits=["train"] * N_ROWS,
        shard_rows=SHARD_ROWS,
        text_lengths=np.full(N_ROWS, 3, np.uint16),
    )


def view_array(array: FeatureArray, index: NDArray[np.int64]) -> ViewArray:
    """Return the array by an index of its rows, without a view: `load` needs none."""
    return ViewArray(
        files=array.files,
        record=array.record,
        view=None,  # type: ignore[arg-type]
        index=index,
    )


def in_runs() -> NDArray[np.int64]:
    """Most rows in order: some are dropped, some repeated, some missing, one moved to the end."""
    index = np.arange(N_ROWS)
    index = np.delete(index, [0, 50, 51, 120, 199])
    index = np.insert(index, [20, 90, 90], [3, 70, 199])
    return np.append(index, [-1, 0])


INDEXES = {
    "in order": np.arange(N_ROWS),
    "in runs": in_runs(),
    "one shard": np.arange(64, 128),
    "scattered": np.random.default_rng(1).permutation(N_ROWS),
    "backwards, twice": np.repeat(np.arange(N_ROWS)[::-1], 2),
    "one row": np.array([77]),
    "one row, often": np.full(100, 77),
    "none": np.array([-1, -1]),
}


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("name", INDEXES)
def test_rows_of_a_view_are_those_of_the_index(
    store: FeatureStore,
    modality: str,
    name: str,
) -> None:
    array = store.array("image" if modality == "image" else "text")
    index = INDEXES[name]
    # The appended row of NaN is what -1 finds.
    whole = array.load()
    wanted = np.concatenate([whole, np.full_like(whole[:1], np.nan)])[index]
    gathered = view_array(array, index)
    assert np.array_equal(gathered.load(), wanted, equal_nan=True)
    assert np.array_equal(gathered.load(threads=1), wanted, equal_nan=True)
    collected = np.zeros_like(wanted)
    for rows, features in gathered.load_shards():
        collected[rows] = features
    assert np.array_equal(collected, wanted, equal_nan=True)


# The last shard has 8 rows, and no runs.
@pytest.mark.parametrize(("name", "n_shards"), [("in runs", 1), ("scattered", 4)])
def test_runs_are_read_straight_to_their_places(
    store: FeatureStore,
    name: str,
    n_shards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = view_array(store.array("image"), INDEXES[name])
    n_copied = 0
    read_into = FeatureArray._read_into

    def counted(*arguments: object) -> None:
        nonlocal n_copied
        n_copied += 1
        read_into(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureArray, "_read_into", counted)
    array.load()
    assert n_copied == n_shards


@pytest.mark.parametrize("row", [50, 60])
def test_damage_is_found_also_in_a_row_that_the_view_lacks(store: FeatureStore, row: int) -> None:
    array = store.array("image")
    path = Path(store.path) / chunk_name(array.record, "features", 0)
    data = bytearray(path.read_bytes())
    data[row * 16] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="shard 0"):
        view_array(array, in_runs()).load()


def test_features_with_scales_are_gathered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((N_ROWS, 8)).astype(np.float16)
    store = write_feature_store(
        tmp_path / "store",
        features,
        features,
        image_rows=list(range(N_ROWS)),
        splits=["train"] * N_ROWS,
        shard_rows=SHARD_ROWS,
        storage="int8",
    )
    array = store.array("image")
    index = np.delete(np.arange(N_ROWS), [7, 70])
    assert np.array_equal(view_array(array, index).load(), array.load()[index])
