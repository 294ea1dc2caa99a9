"""Splits that are assigned later, rows that are deleted, and what compaction frees."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tree

from apecache.errors import DataError, ManifestError, OptionError
from apecache.fingerprint import Modality
from apecache.storage.local_files import LocalFiles
from apecache.store.compact import compact_store
from apecache.store.gather import ViewArray, gathered_scaled
from apecache.store.near_duplicates import near_images
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store
from apecache.store.view_edits import (
    delete_rows,
    joined_groups,
    parse_rule,
    split_rule,
    split_store,
)
from apecache.store.views import name_view, remove_view, view_ids
from benchmarks.made_up_store import write_feature_store
from benchmarks.reliability.injection import tower
from benchmarks.reliability.injection.syscalls import intercepted, unsynced
from benchmarks.reliability.injection.tower import EDITED, MODALITIES, SMALL, TowerSpec

pytestmark = pytest.mark.usefixtures("no_fsync")
HALVES = (("train", 0.5), ("val", 0.5))


def made(folder: Path, spec: TowerSpec) -> LocalFiles:
    with intercepted(folder, unsynced()):
        tower.run(folder / "store", spec)
    return LocalFiles(folder / "store")


@pytest.fixture
def small(tmp_path: Path) -> LocalFiles:
    return made(tmp_path, SMALL)


@pytest.fixture
def edited(tmp_path: Path) -> LocalFiles:
    return made(tmp_path, EDITED)


# Splits


def test_splits_are_a_new_view_of_the_same_rows(small: LocalFiles) -> None:
    before = FeatureStore.at(small)
    features = {m: before.array(m).load() for m in MODALITIES}
    record = split_store(small, HALVES)
    after = FeatureStore.at(small)
    assert set(after.pairs.splits) == {"train", "val"}
    assert after.digest != before.digest
    assert after.pairs.keys.tolist() == before.pairs.keys.tolist()
    for modality, values in features.items():
        assert np.array_equal(after.array(modality).load(), values, equal_nan=True)
    # The first table is a view too, with the digest that earlier runs have recorded.
    assert FeatureStore.at(small, "0000").digest == before.digest
    assert (record.parent, record.splits) == (view_ids(small)[0], "content;0;train=0.5,val=0.5")
    assert verify_store(small.place).problems == ()


def test_the_same_rule_gives_the_same_splits_and_another_seed_others(small: LocalFiles) -> None:
    splits = []
    for seed in (0, 0, 1):
        split_store(small, HALVES, by="key", seed=seed)
        splits.append(FeatureStore.at(small).pairs.splits.tolist())
    assert splits[0] == splits[1] != splits[2]
    assert len(view_ids(small)) == 3  # the same splits again are no new view


def test_groups_that_share_a_content_are_one() -> None:
    assert joined_groups(["a", "b", "c", "d"], ["1", "2", "1", ""]) == ["a", "b", "a", "d"]
    assert joined_groups(["c", "b", "b", "a"], ["1", "1", "2", "2"]) == ["a"] * 4


def test_labels_stay_together(small: LocalFiles) -> None:
    split_store(small, HALVES, by="label")
    pairs = FeatureStore.at(small).pairs
    assert len({*zip(pairs.labels, pairs.splits, strict=True)}) == len(set(pairs.labels))


@pytest.mark.parametrize("by", ["content", "key", "a column; of ~ the table"])
@pytest.mark.parametrize("near", [None, 0.95])
def test_a_rule_is_read_back(by: str, near: float | None) -> None:
    assert parse_rule(split_rule(HALVES, by, 3, near)) == (HALVES, by, 3)


def near_store(folder: Path) -> FeatureStore:
    """40 images in 20 pairs of nearly equal features; pairs 0 and 1 are connected by a third."""
    rng = np.random.default_rng(0)
    bases = rng.standard_normal((20, 64)).astype(np.float32)
    noise = rng.standard_normal((40, 64)).astype(np.float32)
    features = np.repeat(bases, 2, axis=0) + 0.05 * noise
    return write_feature_store(
        folder,
        features,
        features[:, :8],
        image_rows=list(range(40)),
        splits=[""] * 40,
        bad_images=(39,),
    )


def test_near_duplicates_stay_together(tmp_path: Path) -> None:
    store = near_store(tmp_path / "store")
    pairs = near_images(store, 0.95)
    # The last image has no features, so it is near to none.
    assert pairs == [(row, row + 1) for row in range(0, 38, 2)]
    files = LocalFiles(tmp_path / "store")
    split_store(files, HALVES)
    apart = FeatureStore.at(files).pairs.splits
    assert (apart[0:38:2] != apart[1:38:2]).any()
    record = split_store(files, HALVES, near=0.95)
    together = FeatureStore.at(files).pairs.splits
    assert (together[0:38:2] == together[1:38:2]).all()
    assert set(together) == {"train", "val"}
    assert record.splits == "content~0.95;0;train=0.5,val=0.5"


def test_groups_that_are_near_are_connected() -> None:
    assert joined_groups(["a", "b", "c", "d"], [""] * 4, [(1, 2), (2, 3)]) == ["a", "b", "b", "b"]


def test_near_duplicates_need_features_and_a_cosine(small: LocalFiles, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"near-duplicates 1\.5: expected a cosine"):
        split_store(small, HALVES, near=1.5)
    texts_alone = write_feature_store(
        tmp_path / "texts",
        np.zeros((4, 2), np.float16),
        np.ones((4, 2), np.float16),
        image_rows=[0, 1, 2, 3],
        splits=[""] * 4,
        modalities=("text",),
    )
    with pytest.raises(DataError, match="need pooled features of images; found: none"):
        near_images(texts_alone, 0.9)


# Names


def test_a_view_gets_a_name_and_stays_what_it_is(edited: LocalFiles) -> None:
    first, last = view_ids(edited)
    old = FeatureStore.at(edited, first)
    old_keys = old.pairs.keys.tolist()
    old_features = old.array("image").load()
    record = name_view(edited, first, "before")
    assert (record.name, record.number, record.digest) == ("before", 1, old.digest)
    assert view_ids(edited) == [record.view, last]
    named = FeatureStore.at(edited, "before")
    assert named.pairs.keys.tolist() == old_keys
    assert np.array_equal(named.array("image").load(), old_features, equal_nan=True)
    # The same name again changes nothing; another view cannot have it.
    assert name_view(edited, record.view, "before") == record
    with pytest.raises(OptionError, match="has the name 'before'; choose another"):
        name_view(edited, last, "before")
    assert verify_store(edited.place).problems == ()


@pytest.mark.parametrize("name", ["", " ", "12", "0001-1a2b3c4d", "two\nlines"])
def test_names_that_cannot_be_told_from_ids_are_refused(edited: LocalFiles, name: str) -> None:
    with pytest.raises(OptionError, match="expected a word"):
        name_view(edited, view_ids(edited)[0], name)


@pytest.mark.parametrize(
    ("fractions", "by"),
    [((("train", 0.5),), "content"), (HALVES, "caption")],
)
def test_wrong_options_are_refused(
    small: LocalFiles,
    fractions: tuple[tuple[str, float], ...],
    by: str,
) -> None:
    before = tree(Path(small.place))
    with pytest.raises((OptionError, ManifestError)):
        split_store(small, fractions, by=by)
    assert tree(Path(small.place)) == before


# Deleting


def test_deleted_rows_are_left_out_of_the_new_view_alone(small: LocalFiles) -> None:
    before = FeatureStore.at(small)
    keep = np.arange(SMALL.images) % 3 > 0
    delete_rows(small, lambda table: keep)
    after = FeatureStore.at(small)
    assert after.pairs.keys.tolist() == before.pairs.keys[keep].tolist()
    texts = keep[before.pairs.image_rows]
    assert after.pairs.captions.tolist() == before.pairs.captions[texts].tolist()
    owners = after.pairs.keys[after.pairs.image_rows]
    assert owners.tolist() == before.pairs.keys[before.pairs.image_rows][texts].tolist()
    wanted = {"image": keep, "text": texts}
    for modality in MODALITIES:
        loaded = after.array(modality).load()
        old = before.array(modality).load()[wanted[modality]]
        assert np.array_equal(loaded, old, equal_nan=True)
    for all_or_none in (
        np.ones(len(after.pairs.keys), bool),
        np.zeros(len(after.pairs.keys), bool),
    ):
        with pytest.raises(DataError, match="images would be deleted"):
            delete_rows(small, lambda table, mask=all_or_none: mask)  # type: ignore[misc]


def test_further_columns_follow_every_edit(edited: LocalFiles) -> None:
    def colors(view: str | None = None) -> dict[str, str]:
        pairs = FeatureStore.at(edited, view).pairs
        values = pairs.columns["color"].tolist()
        return dict(zip(pairs.keys.tolist(), values, strict=True))

    before = colors()
    oldest = view_ids(edited)[0]
    oldest_colors = colors(oldest)
    # Splits by a column that the view holds need no table.
    split_store(edited, HALVES, by="color")
    assert colors() == before
    delete_rows(edited, lambda table: table.columns["color"] != next(iter(before.values())))
    kept = dict(list(before.items())[1:])
    assert colors() == kept
    name_view(edited, view_ids(edited)[-1], "small")
    assert colors() == kept
    for view_id in view_ids(edited)[1:-1]:
        remove_view(edited, view_id)
    compact_store(edited)
    assert colors() == kept
    assert colors(view_ids(edited)[0]) == oldest_colors
    assert not verify_store(edited.place).problems


# Compaction


def values(files: LocalFiles) -> dict[str, bytes]:
    """What all views give, by digest."""
    found = {}
    for view_id in view_ids(files):
        opened = FeatureStore.at(files, view_id)
        for modality in MODALITIES:
            array = opened.array(modality)
            rows = [{**row, "row": row["row"]} for row in array.quarantined()]
            described = (array.load().tobytes(), array.content(), rows, opened.pairs.keys.tolist())
            found[f"{opened.digest} {modality}"] = repr(described).encode()
    return found


def test_compaction_frees_what_no_view_needs_and_changes_no_view(edited: LocalFiles) -> None:
    first, _ = view_ids(edited)
    remove_view(edited, first)
    wanted = values(edited)
    digest = FeatureStore.at(edited).digest
    report = compact_store(edited, "0")
    # 4 of 10 images are kept, with their captions, and all of the new block.
    assert report.n_rows == 6 + 12
    assert set(report.blocks) == {"", "segments/0001"}
    assert values(edited) == wanted
    assert FeatureStore.at(edited).digest == digest
    assert verify_store(edited.place).problems == ()
    assert compact_store(edited, "0").n_rows == 0
    assert values(edited) == wanted


@pytest.mark.parametrize("tokens", [None, 3])
def test_features_of_int8_are_compacted_bit_by_bit(tmp_path: Path, tokens: int | None) -> None:
    """Integers and scales are copied: another rounding would give other features."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((50, 8)).astype(np.float16)
    text = rng.standard_normal((50, 8) if tokens is None else (50, tokens, 8)).astype(np.float16)
    write_feature_store(
        tmp_path / "store",
        image,
        text,
        image_rows=list(range(50)),
        splits=[""] * 50,
        bad_images=(7,),
        shard_rows=16,
        storage="int8",
        text_lengths=None if tokens is None else np.full(50, 2, np.uint16),
    )
    files = LocalFiles(tmp_path / "store")
    delete_rows(files, lambda table: np.arange(50) % 3 > 0)
    remove_view(files, view_ids(files)[0])
    before = FeatureStore.at(files)
    wanted = [before.array(modality).load() for modality in MODALITIES]
    stored = stored_integers(before, "image")
    report = compact_store(files, "0")
    assert (report.n_rows, report.blocks) == (17 + 17, ("",))
    after = FeatureStore.at(files)
    for modality, features in zip(MODALITIES, wanted, strict=True):
        assert np.array_equal(after.array(modality).load(), features, equal_nan=True)
    assert stored_integers(after, "image") == stored
    assert verify_store(files.place).problems == ()


def stored_integers(store: FeatureStore, modality: Modality) -> list[bytes]:
    """Return the integers and scales of a view's rows as they are stored."""
    array = store.array(modality)
    plain = array.stored if isinstance(array, ViewArray) else array
    index = array.index if isinstance(array, ViewArray) else np.arange(array.rows)
    values, scales = gathered_scaled(plain, index)
    return [values.tobytes(), scales.tobytes()]


@pytest.mark.parametrize(
    "leftover",
    ["features.zarr/image/tower/features/c.0.0", "records/pairs.json", "README.md"],
)
def test_what_a_power_cut_brings_back_of_a_removed_block_is_no_obstacle(
    edited: LocalFiles,
    leftover: str,
) -> None:
    path = Path(edited.place) / "segments" / "0001" / leftover
    data = path.read_bytes()
    remove_view(edited, view_ids(edited)[0])
    compact_store(edited, "0")
    assert edited.list("segments") == ["0002"]
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    delete_rows(edited, lambda table: np.arange(len(table.keys)) > 1)
    remove_view(edited, view_ids(edited)[0])
    wanted = values(edited)
    assert compact_store(edited, "0").n_rows == 2 + 4
    assert values(edited) == wanted
    assert edited.list("segments") == ["0003"]
    assert verify_store(edited.place).problems == ()


def test_compaction_without_unused_rows_does_nothing(edited: LocalFiles) -> None:
    delete_rows(edited, lambda table: np.arange(len(table.keys)) > 0)
    for view_id in view_ids(edited)[1:]:
        remove_view(edited, view_id)
    split_store(edited, HALVES)
    wanted = values(edited)
    assert compact_store(edited, "0").n_rows == 3  # an image of the first block, in no view
    assert values(edited) == wanted
    before = tree(Path(edited.place))
    assert compact_store(edited, "0").n_rows == 0
    assert tree(Path(edited.place)) == before


class KilledError(BaseException):
    pass


def test_an_interrupted_compaction_changes_no_view_and_is_finished_by_the_next(
    edited: LocalFiles,
    tmp_path: Path,
) -> None:
    """Killed before every seventh write or removal."""
    split_store(edited, HALVES)
    remove_view(edited, view_ids(edited)[0])
    wanted = values(edited)
    newest = FeatureStore.at(edited).digest
    whole = tmp_path / "whole"
    nth = 0
    while True:
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(edited.place, whole)
        files = _KilledFiles(whole, nth)
        try:
            compact_store(files, "0")
            break
        except KilledError:
            pass
        plain = LocalFiles(whole)
        assert FeatureStore.at(plain).digest == newest, nth
        found = values(plain)
        assert found == wanted, nth
        compact_store(plain, "0")
        assert values(plain) == wanted, nth
        assert verify_store(whole).sound, nth
        nth += 7
    assert nth > 40


class _KilledFiles(LocalFiles):
    """Die before the n-th change, in the store or in any block of it."""

    def __init__(self, root: Path, left: int, count: list[int] | None = None) -> None:
        super().__init__(root)
        self.count = [left] if count is None else count

    def child(self, folder: str) -> LocalFiles:
        return _KilledFiles(self.path(folder), 0, self.count)

    def _spend(self) -> None:
        if not self.count[0]:
            raise KilledError
        self.count[0] -= 1

    def write(self, name: str, *buffers: object) -> None:
        self._spend()
        super().write(name, *buffers)  # type: ignore[arg-type]

    def put_if_absent(self, name: str, *buffers: object) -> bool:
        self._spend()
        return super().put_if_absent(name, *buffers)  # type: ignore[arg-type]

    def remove(self, name: str) -> None:
        self._spend()
        super().remove(name)

    def remove_folder(self, folder: str) -> None:
        self._spend()
        super().remove_folder(folder)


def test_the_compaction_of_a_store_without_views_does_nothing(small: LocalFiles) -> None:
    before = tree(Path(small.place))
    assert compact_store(small, "0").n_bytes == 0
    assert tree(Path(small.place)) == before
