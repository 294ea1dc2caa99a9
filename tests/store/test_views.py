"""Views: tables whose rows say where their features lie."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tree

from apecache.errors import DamagedError, StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.array import FeatureArray
from apecache.store.gather import ViewArray
from apecache.store.layout import SOURCE
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record, seal_record
from apecache.store.verify import verify_store
from apecache.store.views import (
    commit_view,
    open_view,
    parse_view,
    read_view_record,
    remove_view,
    view_ids,
    view_record_name,
)
from benchmarks.reliability.injection import tower
from benchmarks.reliability.injection.syscalls import intercepted, unsynced
from benchmarks.reliability.injection.tower import EDITED, N_KEPT, NAME


@pytest.fixture(scope="session")
def edited_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 10 images, a block of 3 more, and two views; for tests that only read it."""
    folder = tmp_path_factory.mktemp("edited")
    with intercepted(folder, unsynced()):
        tower.run(folder / "store", EDITED)
    return folder / "store"


@pytest.fixture
def edited(edited_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(edited_once, tmp_path / "store"))


def test_the_newest_view_is_opened_and_others_by_id_number_or_name(edited_once: Path) -> None:
    first, last = view_ids(LocalFiles(edited_once))
    newest = FeatureStore.open(edited_once)
    assert newest.view is not None
    assert newest.view.record.view == last
    for name in (first, "1", "0001"):
        opened = FeatureStore.open(edited_once, name)
        assert opened.view is not None
        assert opened.view.record.view == first
        assert len(opened.pairs.keys) == opened.source["n_images"] == EDITED.images - 1 + 3
    with pytest.raises(StoreError, match=r"has no view 'editde'; found: .*did you mean edited"):
        FeatureStore.open(edited_once, "editde")
    with pytest.raises(StoreError, match="several views 'edited'"):
        FeatureStore.open(edited_once, "edited")


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize(("view", "n_kept"), [("1", EDITED.images - 1), ("2", N_KEPT)])
def test_a_view_gives_its_rows_in_order(
    edited_once: Path,
    modality: tower.Modality,
    view: str,
    n_kept: int,
) -> None:
    array = FeatureStore.open(edited_once, view).array(modality)
    wanted = tower.edited_values(EDITED, modality, n_kept)
    assert isinstance(array, ViewArray)
    assert np.array_equal(array.load(), wanted, equal_nan=True)
    assert array.load_ok().tolist() == (~np.isnan(wanted).any(1)).tolist()
    assert array.n_quarantined == len(array.quarantined()) == int((~array.load_ok()).sum())
    gathered = np.zeros_like(wanted)
    for rows, features in array.load_shards():
        gathered[rows] = features
    assert np.array_equal(gathered, wanted, equal_nan=True)
    pairs = FeatureStore.open(edited_once, view).pairs
    for row in array.quarantined():
        image_row = row["row"] if modality == "image" else pairs.image_rows[row["row"]]
        assert row["key"] == pairs.keys[image_row]


def test_any_order_with_repetitions_and_gaps_is_gathered(edited_once: Path) -> None:
    store = FeatureStore.open(edited_once)
    array = store.array("image")
    assert store.view is not None
    plain = FeatureArray(**{name: value for name, value in vars(array).items() if name in _FIELDS})
    stored = plain.load()
    chance = np.random.default_rng(0)
    for _ in range(20):
        index = chance.integers(-1, len(stored), chance.integers(0, 30))
        view_array = ViewArray(**_fields(plain), view=store.view, index=index)
        wanted = np.where((index < 0)[:, None], np.nan, stored[index])
        assert np.array_equal(view_array.load(), wanted, equal_nan=True)
        gathered = np.zeros_like(wanted)
        for rows, features in view_array.load_shards(threads=2):
            gathered[rows] = features
        assert np.array_equal(gathered, wanted, equal_nan=True)
        content = [*plain.content(), ""]
        assert view_array.content() == [content[row] for row in index]


_FIELDS = ("files", "record", "appended", "rows_to_come")


def _fields(array: FeatureArray) -> dict[str, object]:
    return {name: getattr(array, name) for name in _FIELDS}


def test_a_view_that_does_not_read_back_as_written_is_not_committed(
    edited: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = LocalFiles(edited)
    view = open_view(files, view_ids(files)[0])
    monkeypatch.setattr(LocalFiles, "put_if_absent", _spoiling(LocalFiles.put_if_absent))
    with pytest.raises(DamagedError, match="not what was written"):
        commit_view(files, view)
    assert len(view_ids(files)) == 2


def _spoiling(create):  # type: ignore[no-untyped-def]
    def spoiled(self, name, *buffers):  # type: ignore[no-untyped-def]
        return create(self, name, *(b"rot" if "/c/" in name else data for data in buffers))

    return spoiled


def test_a_view_whose_record_is_lost_is_noticed(edited: Path) -> None:
    last = view_ids(LocalFiles(edited))[-1]
    (edited / view_record_name(last)).unlink()
    with pytest.raises(DamagedError, match=r"is missing; write it again with: apecache repair"):
        FeatureStore.open(edited)
    assert [problem.object for problem in verify_store(edited).problems] == [view_record_name(last)]


def test_rows_that_its_blocks_do_not_have_are_refused(edited: Path) -> None:
    files = LocalFiles(edited)
    name = view_record_name(view_ids(files)[-1])
    record = read_record(files, name)
    record["blocks"][-1]["n_images"] -= 1
    (edited / name).write_bytes(seal_record(name, record, of_view=True))
    with pytest.raises(DamagedError, match="rows that its blocks do not have"):
        FeatureStore.open(edited).array("image").load()


def test_a_view_of_another_block_is_refused(edited: Path) -> None:
    files = LocalFiles(edited)
    name = view_record_name(view_ids(files)[-1])
    record = read_record(files, name)
    record["blocks"][0]["digest"] = "0" * 64
    (edited / name).write_bytes(seal_record(name, record, of_view=True))
    with pytest.raises(DamagedError, match=r"is not the block that view .* was made of"):
        FeatureStore.open(edited)
    assert SOURCE in [problem.object for problem in verify_store(edited).problems]


def test_a_removed_view_leaves_all_features(edited: Path) -> None:
    files = LocalFiles(edited)
    first, last = view_ids(files)
    before = tree(edited)
    remove_view(files, first)
    gone = before.keys() - tree(edited).keys()
    assert all(name.startswith((f"views/{first}/", f"records/views/{first}")) for name in gone)
    assert view_ids(files) == [last]
    assert verify_store(edited).problems == ()


def test_the_same_view_is_committed_once(edited: Path) -> None:
    files = LocalFiles(edited)
    last = view_ids(files)[-1]
    before = tree(edited)
    record = commit_view(files, open_view(files, last), number=2)
    assert (record.view, tree(edited)) == (last, before)


def test_plain_zarr_reads_a_view(edited_once: Path) -> None:
    import zarr

    last = view_ids(LocalFiles(edited_once))[-1]
    view = zarr.open_group(str(edited_once / "views" / last), mode="r")
    rows = view["image_content_row"][:]
    folders = [block["folder"] for block in view.attrs["apecache"]["blocks"]]  # type: ignore[index,union-attr]
    blocks = [
        zarr.open_group(str(edited_once / folder / "features.zarr"), mode="r")[
            f"image/{NAME}/features"
        ][:]
        for folder in folders
    ]
    features = np.concatenate(blocks)[rows]
    assert np.array_equal(
        features,
        FeatureStore.open(edited_once).array("image").load(),
        equal_nan=True,
    )
    assert view["image_key"][:].tolist() == FeatureStore.open(edited_once).pairs.keys.tolist()


def test_a_view_holds_further_columns_of_its_table(edited: Path) -> None:
    store = FeatureStore.open(edited)
    assert list(store.pairs.columns) == ["color"]
    colors = store.pairs.columns["color"].tolist()
    assert colors == [f"color {key}" for key in store.pairs.keys]
    with pytest.raises(KeyError):
        store.pairs.columns["price"]
    # A copy reads nothing from the store any more.
    copied = copy.deepcopy(store.pairs)
    assert copied.columns["color"].tolist() == colors


def test_a_damaged_further_column_is_noticed(edited: Path) -> None:
    last = view_ids(LocalFiles(edited))[-1]
    column = edited / "views" / last / "image_column_color"
    (column / "c" / "0").write_bytes(b"damaged")
    with pytest.raises(DamagedError, match="image_column_color"):
        FeatureStore.open(edited).pairs.columns["color"]
    problems = [problem.object for problem in verify_store(edited).problems]
    assert problems == [f"views/{last}/image_column_color/c/0"]


@pytest.mark.parametrize("columns", ["color", [1], {"a": 1}, None])
def test_a_record_whose_columns_are_no_names_is_refused(edited: Path, columns: object) -> None:
    files = LocalFiles(edited)
    last = view_ids(files)[-1]
    record = read_view_record(files, last)
    value = {**record.to_json(), "columns": columns}
    with pytest.raises(DamagedError):
        parse_view(value, last, "here")
