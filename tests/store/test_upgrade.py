"""Formats: a store of every released one is read (tests/golden), the newest needs nothing, a newer
one is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tree

from apecache.errors import StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.copy import copy_store
from apecache.store.layout import FORMAT_VERSION, PAIRS, SOURCE, VIEW_FORMAT_VERSION
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record, seal_record
from apecache.store.upgrade import store_format, upgrade_store
from apecache.store.verify import verify_store

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = range(1, FORMAT_VERSION + 1)


def make() -> Any:
    """The script that made them."""
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", FORMATS)
def test_a_store_of_every_format_is_sound_and_serves_what_it_always_did(number: int) -> None:
    store = GOLDEN / f"format-{number}"
    report = verify_store(store)
    assert report.problems == ()
    assert report.n_objects > 20
    assert make().served(store) == json.loads((GOLDEN / f"format-{number}.json").read_text())
    assert store_format(store) == number


@pytest.mark.parametrize("number", FORMATS)
def test_golden_stores_hold_nothing_of_the_machine_that_made_them(number: int) -> None:
    for name, data in tree(GOLDEN / f"format-{number}").items():
        assert b"/home" not in data, name
        assert b"/root" not in data, name
        assert b"/tmp" not in data, name


def test_an_older_store_becomes_one_with_views_and_nothing_is_encoded(tmp_path: Path) -> None:
    store = Path(shutil.copytree(GOLDEN / "format-1", tmp_path / "store"))
    before = tree(store)
    assert upgrade_store(store, tmp_path / "new") is True
    assert tree(store) == before
    assert store_format(tmp_path / "new") == VIEW_FORMAT_VERSION
    # Every object of the old store is in the new one as it was.
    upgraded = tree(tmp_path / "new")
    assert {name: upgraded[name] for name in before} == before
    wanted = json.loads((GOLDEN / "format-1.json").read_text())
    assert without_keys(make().served(tmp_path / "new")) == without_keys(wanted)
    # Runs have recorded the identity of the table.
    assert FeatureStore.open(tmp_path / "new").digest == FeatureStore.open(store).digest
    assert verify_store(tmp_path / "new").problems == ()
    assert upgrade_store(store, tmp_path / "new") is True
    assert tree(tmp_path / "new") == upgraded


def without_keys(served: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys of quarantined rows: a view gives its own, a block those it was given."""
    for name, array in served.items():
        if "/" in name:
            for row in array["quarantined"]:
                del row["key"]
    return served


def test_an_interrupted_upgrade_is_finished_by_the_next(tmp_path: Path) -> None:
    store = GOLDEN / "format-1"
    copy_store(store, tmp_path / "new")
    assert store_format(tmp_path / "new") == 1
    assert upgrade_store(store, tmp_path / "new") is True
    assert store_format(tmp_path / "new") == VIEW_FORMAT_VERSION


def test_a_store_of_the_newest_format_needs_no_upgrade_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    upgrade_store(GOLDEN / "format-1", tmp_path / "store")
    before = tree(tmp_path / "store")
    assert upgrade_store(tmp_path / "store", tmp_path / "new") is False
    assert tree(tmp_path / "store") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [SOURCE, PAIRS])
def test_a_newer_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(GOLDEN / f"format-{FORMAT_VERSION}", tmp_path / "store"))
    body = read_record(LocalFiles(store), name)
    (store / name).write_bytes(seal_record(name, {**body, "format": VIEW_FORMAT_VERSION + 1}))
    said = (
        f"{name} has format {VIEW_FORMAT_VERSION + 1}; this apecache reads up to {VIEW_FORMAT_VERSION}: "
        "upgrade apecache"
    )
    for use in (
        store_format,
        verify_store,
        lambda path: upgrade_store(path, tmp_path / "new"),
        opened,
    ):
        with pytest.raises(StoreError, match=said) as caught:
            use(store)
        assert caught.value.exit_code == 3


def opened(store: Path) -> None:
    assert FeatureStore.open(store).source
    assert FeatureStore.open(store).pairs


def test_what_is_no_store_is_not_upgraded(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        upgrade_store(tmp_path / "none", tmp_path / "new")
