"""Copies of a store, between a folder and object storage (moto's S3 on loopback)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote import Faults, S3Server
from tiny import Grown, tree

from apecache.errors import DamagedError, StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.copy import copy_store
from apecache.store.reader import FeatureStore
from benchmarks.reliability.injection.tower import NAME, TowerSpec, run


def test_a_copy_there_and_back_is_the_same_store(
    grown_once: Grown,
    bucket: str,
    tmp_path: Path,
) -> None:
    report = copy_store(grown_once.store, f"{bucket}/store")
    assert report.sound
    assert report.store == f"{bucket}/store"
    copy_store(f"{bucket}/store", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(grown_once.store)


def test_what_is_there_already_is_not_fetched_again(
    grown_once: Grown,
    bucket: str,
    tmp_path: Path,
    s3_server: S3Server,
) -> None:
    copy_store(grown_once.store, f"{bucket}/store")
    copy_store(f"{bucket}/store", tmp_path / "back")
    name = "features.zarr/text/tiny-bert/features/c.1.0"
    (tmp_path / "back" / name).write_bytes(b"rotten")
    (tmp_path / "back/records/.tmp-1-2").write_bytes(b"")
    with s3_server.faults(Faults()) as seen:
        copy_store(f"{bucket}/store", tmp_path / "back")
    fetched = [path for method, path in seen.requests if method == "GET" and "/c." in path]
    assert fetched == [f"/{bucket.removeprefix('s3://')}/store/{name}"]
    assert tree(tmp_path / "back") == tree(grown_once.store)


def test_an_interrupted_copy_is_no_store_and_is_finished(
    tower_store_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real: Callable[..., Any] = LocalFiles.write
    for stop in (0, 5, 30, 1000):
        left = iter(range(stop))

        def write(self: LocalFiles, *arguments: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(self, *arguments)

        monkeypatch.setattr(LocalFiles, "write", write)
        if stop == 1000:
            copy_store(tower_store_once, tmp_path / "copy")
            break
        with pytest.raises(KeyboardInterrupt):
            copy_store(tower_store_once, tmp_path / "copy")
        with pytest.raises(StoreError):
            FeatureStore.open(tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(tower_store_once)


def test_nothing_else_is_overwritten(
    tower_store_once: Path,
    tmp_path: Path,
    no_fsync: None,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    run(tmp_path / "larger", TowerSpec(images=14))
    for name in ("mine", "larger"):
        before = tree(tmp_path / name)
        with pytest.raises(StoreError, match="give another place for the copy"):
            copy_store(tower_store_once, tmp_path / name)
        assert tree(tmp_path / name) == before


def test_a_damaged_store_makes_no_sound_copy(damage: Callable[..., Path], tmp_path: Path) -> None:
    store = damage(f"features.zarr/image/{NAME}/features/c.1.0", lambda data: data[:-1])
    with pytest.raises(
        DamagedError,
        match=r"features/c.1.0: its hash differs from its record; try apecache verify",
    ):
        copy_store(store, tmp_path / "copy")
