"""Several arrays of a store, read as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apecache.errors import OptionError, StoreError
from apecache.store.gather import ViewArray
from apecache.store.joined import join_arrays
from apecache.store.reader import FeatureStore

ROWS = 23
SPLITS = ["train"] * ROWS
OWNERS = list(range(ROWS))


@pytest.fixture(scope="module")
def features() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(ROWS, 3)).astype(np.float16),
        "b": rng.normal(size=(ROWS, 5)).astype(np.float32),
        "words": rng.normal(size=(ROWS, 4)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def store(
    write_store: Any,
    tmp_path_factory: pytest.TempPathFactory,
    features: dict[str, Any],
) -> FeatureStore:
    """Two image arrays, whose shards end at other rows and which lack other rows."""
    folder = tmp_path_factory.mktemp("joined") / "s"
    for name, shard_rows, bad in (("a", 4, (2, 9)), ("b", 7, (9, 20))):
        made = write_store(
            folder,
            features[name],
            features["words"],
            OWNERS,
            SPLITS,
            names=(name, "words"),
            modalities=("image", "text") if name == "a" else ("image",),
            shard_rows=shard_rows,
            bad_images=bad,
        )
    return made  # type: ignore[no-any-return]


def test_features_stand_side_by_side_in_the_order_named(
    store: FeatureStore,
    features: dict[str, Any],
) -> None:
    joined = store.array("image", "b,a")
    assert (joined.rows, joined.dim, joined.row_shape) == (ROWS, 8, (8,))
    assert joined.dtype == np.float32
    ok = joined.load_ok()
    assert np.flatnonzero(~ok).tolist() == [2, 9, 20]
    expected = np.concatenate((features["b"], features["a"].astype(np.float32)), axis=1)
    assert np.array_equal(joined.load()[ok], expected[ok])
    assert [row["row"] for row in joined.quarantined()] == [2, 9, 20]
    assert joined.n_quarantined == 3
    assert joined.complete


def test_blocks_are_the_rows_of_load(store: FeatureStore) -> None:
    joined = store.array("image", "a,b")
    blocks = list(joined.load_shards())
    assert [int(rows[0]) for rows, _ in blocks] == [0, 4, 7, 8, 12, 14, 16, 20, 21]
    rows = np.concatenate([rows for rows, _ in blocks])
    assert np.array_equal(rows, np.arange(len(rows)))
    features = np.concatenate([features for _, features in blocks])
    assert np.array_equal(features, joined.load(), equal_nan=True)


@pytest.mark.parametrize("n_extra", [2, -3])
def test_arrays_of_a_view_with_more_or_fewer_rows_are_joined(
    store: FeatureStore,
    n_extra: int,
) -> None:
    index = np.resize(np.arange(ROWS)[::-1], ROWS + n_extra)
    singles = [store.array("image", name) for name in ("a", "b")]
    of_view = [
        # `load` needs no view.
        ViewArray(
            files=array.files,
            record=array.record,
            view=None,  # type: ignore[arg-type]
            index=index,
        )
        for array in singles
    ]
    joined = join_arrays(of_view)
    assert joined.rows == len(index)
    expected = join_arrays(singles).load()[index]
    assert np.array_equal(joined.load(), expected, equal_nan=True)
    blocks = list(joined.load_shards())
    assert sum(len(rows) for rows, _ in blocks) == len(index)
    ok = join_arrays(singles).load_ok()[index]
    assert np.array_equal(joined.load_ok(), ok)


def test_the_identity_depends_on_the_encoders_and_their_order(store: FeatureStore) -> None:
    digests = {
        store.array("image", name).record.encoder.digest for name in ("a", "b", "a,b", "b,a")
    }
    assert len(digests) == 4
    assert str(store.array("image", "a,b").record.spec) == "timm:a + timm:b"


def test_what_cannot_be_joined_is_refused(store: FeatureStore) -> None:
    with pytest.raises(OptionError, match="one is named twice"):
        store.array("image", "a,a")
    with pytest.raises(StoreError, match="no image features 'c'"):
        store.array("image", "a,c")


def test_tokens_are_not_joined(write_store: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(4, 3)).astype(np.float32)
    tokens = rng.normal(size=(4, 2, 3)).astype(np.float32)
    for name, image in (("a", pooled), ("t", tokens)):
        made = write_store(
            tmp_path / "s",
            image,
            pooled,
            list(range(4)),
            ["train"] * 4,
            names=(name, "words"),
            modalities=("image", "text") if name == "a" else ("image",),
        )
    with pytest.raises(OptionError, match="features t are tokens"):
        made.array("image", "a,t")
