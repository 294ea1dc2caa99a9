"""Taking things out of a store, and putting back what it knows twice: right whenever it is
interrupted."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Grown, damaged, put, tree

from apecache.errors import DamagedError, IncompleteError, MismatchError, StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import PAIRS, SOURCE
from apecache.store.maintenance import (
    find_array,
    remove_array,
    restore_fingerprint,
    restore_source,
    rewrite_metadata,
    uncommit,
)
from apecache.store.reader import FeatureStore
from apecache.store.table import read_contents
from apecache.store.verify import verify_store
from apecache.store.writer import ArrayWriter, PairColumns

pytestmark = pytest.mark.usefixtures("no_fsync")

IMAGE = ("image", "tiny-vit")


def columns(store: FeatureStore, **changed: Any) -> PairColumns:
    pairs = store.pairs
    source = store.source
    names = ("keys", "splits", "labels", "captions", "languages", "image_rows")
    plain = {name: getattr(pairs, name).tolist() for name in names}
    if source.get("view_only"):
        plain["contents"] = read_contents(store.files)
    recorded = {name: source[name] for name in ("digest", "origin")}
    recorded["options"] = source.get("options", {})
    return PairColumns(**{**plain, **recorded, **changed})


def test_uncommitted_shards_are_pending_and_nothing_is_served(grown: Grown) -> None:
    before = tree(grown.store)
    uncommit(LocalFiles(grown.store), *IMAGE, [1])
    gone = {"records/image/tiny-vit/seal.json", "records/image/tiny-vit/commits/00000001.json"}
    assert before.keys() - tree(grown.store).keys() == gone
    array = FeatureStore.open(grown.store).array("image")
    assert ArrayWriter(array.files, array.record).pending() == [1]
    with pytest.raises(IncompleteError):
        array.load()


def test_the_seal_goes_before_the_first_record(
    grown: Grown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(
        LocalFiles,
        "remove",
        lambda self, name: removed.append(name.split("/", 3)[-1]),
    )
    uncommit(LocalFiles(grown.store), *IMAGE, [2, 0])
    assert removed == ["seal.json", "commits/00000002.json", "commits/00000000.json"]


def test_zarrs_metadata_is_written_as_it_was(grown: Grown) -> None:
    before = tree(grown.store)
    record = FeatureStore.open(grown.store).array("image").record
    for name in before:
        if name.startswith("features.zarr/image/tiny-vit/") and name.endswith("zarr.json"):
            put(grown.store, damaged(before, name, "flip"))
    rewrite_metadata(LocalFiles(grown.store), record)
    assert tree(grown.store) == before


def test_a_lost_fingerprint_is_written_again_from_its_copy(grown: Grown) -> None:
    before = tree(grown.store)
    (grown.store / "records/image/tiny-vit/fingerprint.json").unlink()
    restore_fingerprint(LocalFiles(grown.store), *IMAGE)
    assert tree(grown.store) == before


@pytest.mark.parametrize("how", ["flip", "empty", "truncate", "delete"])
def test_a_fingerprint_whose_copy_is_lost_too_is_not_made_up(grown: Grown, how: str) -> None:
    copy = "features.zarr/image/tiny-vit/zarr.json"
    digest = tree(grown.store)[copy].index(b'"digest"')
    put(grown.store, damaged(tree(grown.store), copy, how))
    if how == "flip":  # one letter of what the digest stands for
        before = tree(grown.store)[copy]
        put(grown.store, {copy: before.replace(b"timm-pil", b"timm-pix")})
    (grown.store / "records/image/tiny-vit/fingerprint.json").unlink()
    with pytest.raises(StoreError, match="apecache remove STORE image/tiny-vit, and extract again"):
        restore_fingerprint(LocalFiles(grown.store), *IMAGE)
    assert not (grown.store / "records/image/tiny-vit/fingerprint.json").exists()
    assert digest


@pytest.mark.parametrize("lost", [(SOURCE,), (SOURCE, PAIRS)])
def test_a_lost_source_is_written_again_for_the_table_that_all_else_fits(
    grown: Grown,
    lost: tuple[str, ...],
) -> None:
    store = FeatureStore.block(LocalFiles(grown.store / "segments/0001"))
    table = columns(store)
    root = store.source["root"]
    before = tree(grown.store)
    put(store.path, dict.fromkeys(lost))
    restore_source(store.files, table, root)
    assert tree(grown.store)[f"segments/0001/{SOURCE}"] == before[f"segments/0001/{SOURCE}"]


@pytest.mark.parametrize("lost", [(SOURCE,), (SOURCE, PAIRS)])
@pytest.mark.parametrize(
    "change",
    [
        lambda table: {"digest": "0" * 64, "captions": ["other", *table.captions[1:]]},
        lambda table: {"digest": "0" * 64, "splits": table.splits[::-1], "labels": table.keys},
        lambda table: {"digest": "0" * 64, "keys": table.keys[:-1]},
    ],
)
def test_a_source_is_not_written_for_another_table(
    grown: Grown,
    lost: tuple[str, ...],
    change: Callable[[PairColumns], dict[str, Any]],
) -> None:
    store = FeatureStore.block(LocalFiles(grown.store / "segments/0001"))
    other = columns(store, **change(columns(store)))
    put(store.path, dict.fromkeys(lost))
    with pytest.raises(MismatchError):
        restore_source(store.files, other, "")
    assert not (store.path / SOURCE).exists()


# Removing


@pytest.fixture
def two(tmp_path: Path, write_store: Callable[..., FeatureStore]) -> Path:
    """image/pixels, image/both, text/words and text/both."""
    features = np.ones((6, 2), np.float16)
    for names in (("pixels", "words"), ("both", "both")):
        table = (features, features, list(range(6)), [""] * 6)
        write_store(tmp_path / "store", *table, names=names, shard_rows=2, bad_images=(3,))
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pixels", ("image", "pixels")),
        ("words", ("text", "words")),
        ("image/both", ("image", "both")),
        ("text/both", ("text", "both")),
    ],
)
def test_an_array_is_found_by_its_name_or_with_its_modality(
    two: Path,
    name: str,
    found: tuple[str, str],
) -> None:
    assert find_array(LocalFiles(two), name) == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "both",
            (
                "several arrays are called 'both'; there are image/both, image/pixels, text/both, "
                "text/words"
            ),
        ),
        ("image/pixel", "no features 'image/pixel'.*did you mean image/pixels"),
        ("zarr.json", "no features"),
        ("image/../../x", "no features"),
    ],
)
def test_a_name_that_is_not_one_arrays_is_refused_with_those_there_are(
    two: Path,
    name: str,
    said: str,
) -> None:
    with pytest.raises(StoreError, match=said):
        find_array(LocalFiles(two), name)


def test_nothing_is_found_where_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        find_array(LocalFiles(tmp_path), "pixels")


def test_removing_takes_all_of_one_array_and_nothing_else(two: Path) -> None:
    before = tree(two)
    mine = {name: data for name, data in before.items() if "/image/both/" in f"/{name}"}
    went = remove_array(LocalFiles(two), "image", "both")
    assert went == {"objects": len(mine), "bytes": sum(map(len, mine.values()))}
    assert tree(two) == {name: data for name, data in before.items() if name not in mine}
    assert not (two / "records/image/both").exists()
    assert not (two / "features.zarr/image/both").exists()
    assert verify_store(two).problems == ()


def test_a_removal_that_the_disk_refuses_is_an_error_and_can_be_repeated(
    two: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree(two)
    real_unlink = os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if str(path).endswith("c.1.0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(StoreError, match="Input/output error"):
            remove_array(LocalFiles(two), "image", "both")
    # While data are left, the array is still known, so that removing it again finds them.
    assert find_array(LocalFiles(two), "image/both") == ("image", "both")
    remove_array(LocalFiles(two), "image", "both")
    assert tree(two) == {
        name: data for name, data in before.items() if "/image/both/" not in f"/{name}"
    }
    assert verify_store(two).problems == ()


@pytest.mark.parametrize("stop", range(9))
def test_an_interrupted_removal_serves_nothing_of_it_and_can_be_repeated(
    two: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """Killed before each of its calls: four removals of records (seal, three commits), three of
    folders, the fingerprint, and the rest."""
    whole = Path(shutil.copytree(two, two.with_name("whole")))
    remove_array(LocalFiles(whole), "image", "both")
    calls = iter(range(stop))
    real_remove = LocalFiles.remove
    real_rmtree = shutil.rmtree

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "remove", guarded(real_remove))
        patch.setattr(shutil, "rmtree", guarded(real_rmtree))
        with pytest.raises(KeyboardInterrupt):
            remove_array(LocalFiles(two), "image", "both")
    store = FeatureStore.open(two)
    assert store.array("text", "both").load().shape == (6, 2)
    left = [array.name for array in store.arrays("image")]  # the others can be opened at any moment
    if "both" in left and stop:
        with pytest.raises((IncompleteError, DamagedError)):
            store.array("image", "both").load()
    modality, name = find_array(LocalFiles(two), "image/both")
    remove_array(LocalFiles(two), modality, name)
    assert tree(two) == tree(whole)
    assert not (two / "records/image/both").exists()
