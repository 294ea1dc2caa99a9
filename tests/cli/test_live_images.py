"""Commands read images from the source that a store recorded, here tars and a data set."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from inputs import write_tar
from tiny import make_shapes
from typer.testing import CliRunner, Result

from apecache.data.sources import open_pairs

FIT = (
    "--recipe",
    "lilt-d",
    "--set",
    "schedule.epochs=1",
    "--set",
    "schedule.batch_size=4",
    "--dev-split",
    "val",
    "--device",
    "cpu",
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes as tars in split folders, whose texts have a caption on each line."""
    folder = tmp_path_factory.mktemp("tars")
    table = make_shapes(folder / "shapes")
    members: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    for pair in open_pairs(table):
        key = Path(pair.key).stem
        image = (table.parent / pair.key).read_bytes()
        texts = "\n".join(pair.captions).encode()
        members[pair.split] |= {f"{key}.png": image, f"{key}.txt": texts}
    for split, content in members.items():
        write_tar(folder / "data" / split / "0.tar", content | {f"{split}.npy": b"x"})
    return folder / "data"


def test_tars_feed_a_live_image_tower_a_report_and_an_index(
    tars: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    encoders = ("--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}")
    store = tmp_path / "store"
    options = ("--caption-lines", "--device", "cpu", "--json")
    extracted = call("extract", tars, "--store", store, *encoders, *options)
    assert extracted.exit_code == 0, extracted.output
    found: Any = json.loads(extracted.stdout.splitlines()[-1])
    assert found["skipped"] == {"members .npy": 2}
    assert found["columns"]["split"] == "folder"
    assert [array["rows"] for array in found["arrays"]] == [12, 24]
    fitted = call("fit-encoder", store, "--out", tmp_path / "run", *FIT)
    assert fitted.exit_code == 0, fitted.output
    page = call("report", tmp_path / "run", "--store", store, "--device", "cpu")
    assert page.exit_code == 0, page.output
    html = (tmp_path / "run-report.html").read_text()
    assert "does not know where its images lie" not in html
    assert "data:image/jpeg" in html
    indexed = call("index", tmp_path / "run", "--store", store, "--out", tmp_path / "index")
    assert indexed.exit_code == 0, indexed.output
    description = json.loads((tmp_path / "index" / "index.json").read_text())
    assert description["source"]["options"]["media"] == "TarMedia"
    moved = tars.with_name("moved")
    os.rename(tars, moved)
    try:
        lost = call("fit-encoder", store, "--out", tmp_path / "again", *FIT)
        assert (lost.exit_code, "--source" in lost.output) == (2, True)
        again = call("fit-encoder", store, "--out", tmp_path / "again", *FIT, "--source", moved)
        assert again.exit_code == 0, again.output
        without = call("report", tmp_path / "run", "--store", store, "--source", moved)
        assert without.exit_code == 0, without.output
    finally:
        os.rename(moved, tars)


def test_a_resumed_extraction_needs_the_same_scale(
    tars: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    encoder = ("--image", f"timm:{tiny_image_encoder}", "--device", "cpu")
    arguments = ("extract", tars, "--store", tmp_path / "store", *encoder)
    assert call(*arguments, "--scale", "0,255").exit_code == 0
    other = call(*arguments, "--scale", "0,1000")
    assert (other.exit_code, "made with --scale 0,255, not 0,1000" in other.output) == (4, True)
    assert call(*arguments, "--scale", "a,b").exit_code == 2
    assert call(*arguments, "--quoting", "all").exit_code == 2
