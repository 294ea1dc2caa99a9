"""A bundle opens where the encoders' own folders are gone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

import apecache
from apecache.errors import RunError
from apecache.runs.bundle import bundled_encoders, write_bundle
from apecache.runs.heads import DESCRIPTION
from apecache.runs.remote import kept_run
from benchmarks.small_encoders import build_run

TEXTS = ["a red circle", "the blue square"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run and its encoders, in a folder that a test may remove."""
    return build_run(tmp_path / "made", "timm + hf BERT", "linear")


def test_a_bundle_opens_after_a_move(made: Path, tmp_path: Path) -> None:
    expected = apecache.load(made, device="cpu").encode_text(TEXTS)
    report = write_bundle(made, tmp_path / "bundle")
    assert report.encoders == {"image": "encoders/image", "text": "encoders/text"}
    shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    shutil.rmtree(made.parent)
    model = apecache.load(tmp_path / "elsewhere", device="cpu")
    assert np.array_equal(model.encode_text(TEXTS), expected)
    assert model.encode_image([np.zeros((40, 40, 3), np.uint8)]).shape == (1, 16)


def test_the_command_adds_an_index_that_opens_too(
    tiny_run: Path,
    tiny_index: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("faiss")
    command = ["bundle", str(tiny_run), str(tmp_path / "out"), "--index", str(tiny_index), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["has_index"]
    shutil.move(tmp_path / "out", tmp_path / "moved")
    index = apecache.SearchIndex.open(tmp_path / "moved" / "index", device="cpu")
    assert str(index.text.folder).startswith(str(tmp_path / "moved"))  # type: ignore[union-attr]
    original = apecache.SearchIndex.open(tiny_index, device="cpu")
    assert index.search("a red circle", k=3) == original.search("a red circle", k=3)


def test_an_index_of_another_run_is_refused(made: Path, tiny_index: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was not built with"):
        write_bundle(made, tmp_path / "out", index=tiny_index)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="is not an index"):
        write_bundle(made, tmp_path / "out", index=tmp_path)


def test_damage_is_named(made: Path, tmp_path: Path) -> None:
    write_bundle(made, tmp_path / "out")
    (tmp_path / "out" / "bundle.json").write_text("[]")
    with pytest.raises(RunError, match=r"bundle\.json is damaged"):
        bundled_encoders(tmp_path / "out")
    assert bundled_encoders(made) == (None, None)


def test_a_run_on_the_hub_is_read_and_never_written(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    write_bundle(made, tmp_path / "snapshot")
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = apecache.load("hf://ORG/NAME@v1", device="cpu")
    assert asked == [("ORG/NAME", "v1")]
    expected = apecache.load(made, device="cpu").encode_text(TEXTS)
    assert np.array_equal(model.encode_text(TEXTS), expected)
    with pytest.raises(RunError, match="expected hf://ORG/NAME"):
        apecache.load("hf://NAME")
    with pytest.raises(RunError, match="is for reading"), kept_run("hf://ORG/NAME"):
        pass
    assert (tmp_path / "snapshot" / DESCRIPTION).is_file()
