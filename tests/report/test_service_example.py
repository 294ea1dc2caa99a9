"""The FastAPI example serves an index that another process replaces."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="a package of the example, not of ours")
pytest.importorskip("httpx", reason="FastAPI's test client needs it")
pytest.importorskip("faiss")

EXAMPLE = Path(__file__).parents[2] / "examples" / "service.py"


def load_example(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    monkeypatch.setenv("INDEX", str(folder))
    spec = importlib.util.spec_from_file_location("service_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_changed_index_is_opened_again(
    tiny_index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import warnings

    with warnings.catch_warnings():
        # The test client of some versions warns of its own dependencies.
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient
    folder = Path(shutil.copytree(tiny_index, tmp_path / "index"))
    module = load_example(monkeypatch, folder)
    client = TestClient(module.app)
    hits = client.get("/search", params={"text": "a red circle", "k": 3}).json()
    assert len(hits) == 3
    assert {"key", "caption", "score", "rank"} <= set(hits[0])
    first = module.current()
    assert module.current() is first
    changed = (folder / "index.json").stat().st_mtime + 5
    os.utime(folder / "index.json", (changed, changed))
    assert module.current() is not first
