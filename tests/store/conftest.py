"""The stores of these tests are written by the tower of the fault injection: deterministic, and
without torch."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tower_store_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of `tower.SMALL`: 10 images and 20 captions in 3 + 4 shards; for tests that
    only read it."""
    from benchmarks.reliability.injection import tower
    from benchmarks.reliability.injection.syscalls import intercepted, unsynced

    folder = tmp_path_factory.mktemp("tower")
    with intercepted(folder, unsynced()):
        tower.run(folder / "store", tower.SMALL)
    return folder / "store"


@pytest.fixture
def tower_store(tower_store_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(tower_store_once, tmp_path / "store"))


@pytest.fixture
def damage(tower_store: Path) -> Callable[[str, Callable[[bytes], bytes | None]], Path]:
    """`damage(name, change)` replaces an object's bytes by `change(bytes)`, or removes it for
    None."""

    def apply(name: str, change: Callable[[bytes], bytes | None]) -> Path:
        path = tower_store / name
        after = change(path.read_bytes())
        path.unlink() if after is None else path.write_bytes(after)
        return tower_store

    return apply
