"""Files that commands write are as readable as the umask says, whichever library writes them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

SHORT = (
    "--dev-split",
    "val",
    "--device",
    "cpu",
    "--set",
    "schedule.epochs=2",
    "--set",
    "schedule.batch_size=4",
)


@pytest.fixture(params=[0o022, 0o077], ids=["022", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("load_once", "no_fsync")
def test_files_have_the_mode_that_the_umask_leaves(
    umask: int,
    tmp_path: Path,
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    space = tmp_path / "space.toml"
    space.write_text('"schedule.epochs" = {choice = [2]}\n')
    out = tmp_path / "out"
    encoders = (
        "--image",
        f"timm:{tiny_image_encoder}",
        "--text",
        f"hf:{tiny_text_encoder}",
        "--device",
        "cpu",
    )
    store = out / "store"
    run = out / "run"
    index = out / "index"
    fit = ("fit-head", store, "--recipe", "projection", *SHORT)
    sweep = (
        "sweep",
        store,
        "--recipe",
        "projection",
        "--space",
        space,
        "--trials",
        "1",
        *SHORT[:4],
    )
    commands: tuple[tuple[object, ...], ...] = (
        ("extract", shapes_once, "--store", store, *encoders),
        (*fit, "--out", run, "--tensorboard", out / "events", "--save-seconds", "0"),
        (
            "fit-encoder",
            store,
            "--recipe",
            "lit",
            *SHORT,
            "--out",
            out / "encoder",
            "--save-seconds",
            "0",
        ),
        (*sweep, "--out", out / "sweep"),
        ("index", run, "--store", store, "--out", index),
        ("index", run, "--store", store, "--out", index, "--update"),
        ("export-run", run, out / "tensors", "--to", "safetensors"),
        ("export-run", run, out / "onnx", "--to", "onnx-heads"),
        ("export-run", run, out / "sentences", "--to", "sentence-transformers"),
        ("ensemble", run, run, "--out", out / "both"),
        ("evaluate", run, "--task", "zeroshot", "--labels", shapes_once),
        ("report", run, "--store", store, "--out", out / "page.html"),
        ("copy", store, out / "copy"),
        ("export", store, out / "features.npz", "--npz"),
        ("export", store, out / "features", "--parquet"),
    )
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {
        "head.safetensors",
        "images.faiss",
        "seal.json",
        "zarr.json",
        "model.safetensors",
        "page.html",
    } <= names
    wrong = {
        str(path.relative_to(out)): oct(mode)
        for path in files
        if (mode := _mode(path)) != 0o666 & ~umask
    }
    assert wrong == {}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
