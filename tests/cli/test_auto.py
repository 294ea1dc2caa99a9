"""`apecache auto`, `forecast` and `curate` on a small store: their output, and commands that run."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from planted_pairs import Planted, write_planted
from tiny import extract_tiny, make_shapes
from typer.testing import CliRunner

runner = CliRunner()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def planted(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """One caption in ten is of another image; a second encoder stands beside the first."""
    folder = tmp_path_factory.mktemp("planted") / "s"
    return write_planted(write_store, folder, share_wrong=0.1, encoders=2)


def run(*words: object) -> str:
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_curate_writes_a_keep_list_that_fit_head_takes(planted: Planted, tmp_path: Path) -> None:
    out = tmp_path / "curated"
    command = ("curate", planted.store.path, "--out", out, "--image-features", "eye0")
    shown = json.loads(run(*command, "--device", "cpu", "--json"))
    assert shown["n_dropped"] > 30
    assert Path(shown["page"]).is_file()
    fit = ("fit-head", planted.store.path, "--recipe", "cca", "--image-features", "eye0,eye1")
    options = ("--out", tmp_path / "run", "--keep", shown["keep"], "--device", "cpu", "--json")
    report = json.loads(run(*fit, *options))
    assert report["n_train_images"] > 200


def test_curate_prints_a_table(planted: Planted, tmp_path: Path) -> None:
    command = ("curate", planted.store.path, "--out", tmp_path, "--image-features", "eye0")
    shown = run(*command, "--device", "cpu", "--folds", 2)
    assert "left out of the keep list" in shown
    assert "fit-head" in shown


def test_forecast_prints_curve_and_predictions(planted: Planted, tmp_path: Path) -> None:
    command = ("forecast", planted.store.path, "--out", tmp_path, "--recipe", "cca")
    options = ("--image-features", "eye0", "--shares", "0.25,0.5,1", "--seeds", 1)
    shown = run(*command, *options, "--device", "cpu")
    assert "measured" in shown
    assert "predicted" in shown
    assert (tmp_path / "index.html").is_file()
    wrong = runner.invoke(app, [str(word) for word in (*command, "--shares", "a,b")])
    assert wrong.exit_code == 2


def test_forecast_measures_a_trained_tower_and_says_what_it_costs(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    table = make_shapes(tmp_path / "shapes", copies=6)
    extract_tiny(table, store=store, image=tiny_image_encoder, text=tiny_text_encoder)
    command = ("forecast", store, "--out", tmp_path / "out", "--recipe", "cca", "--seeds", 1)
    options = ("--shares", "0.94,0.97,1", "--device", "cpu", "--tower")
    result = runner.invoke(app, [str(word) for word in (*command, *options, "1m", "--json")])
    assert result.exit_code == 0, result.output
    assert "text tower: 1 step from the captions, about 1 s" in result.stderr
    gain = json.loads(result.stdout)["gains"][-1]
    assert gain["change"] == "text tower trained, last 2 blocks"
    assert gain["paired_low"] <= gain["recall"] - gain["baseline"] <= gain["paired_high"]
    assert json.loads((tmp_path / "out" / "forecast.json").read_text())["gains"][-1] == gain
    page = (tmp_path / "out" / "index.html").read_text()
    assert gain["change"] in page
    assert gain["note"] in page
    shown = run(*command, *options, "1m")
    assert "text tower trained, last 2 blocks" in shown
    assert "a short trial" in shown
    wrong = runner.invoke(app, [str(word) for word in (*command, *options, "soon")])
    assert wrong.exit_code == 2
    assert "--tower soon" in wrong.stderr


def test_forecast_says_why_no_tower_is_tried(planted: Planted, tmp_path: Path) -> None:
    command = ("forecast", planted.store.path, "--out", tmp_path, "--recipe", "cca")
    options = ("--image-features", "eye0", "--shares", "0.25,0.5,1", "--seeds", 1)
    shown = run(*command, *options, "--device", "cpu", "--tower", "1m")
    assert "no trial of the text tower: encoder hf:words cannot be opened" in shown
    assert "No trial of the text tower: encoder hf:words" in (tmp_path / "index.html").read_text()


def test_auto_ends_with_a_run_and_the_command_that_makes_it_again(
    planted: Planted,
    tmp_path: Path,
) -> None:
    out = tmp_path / "search"
    command = ("auto", planted.store.path, "--out", out, "--budget", "1s", "--dev-split", "val")
    shown = json.loads(run(*command, "--image-features", "eye0", "--device", "cpu", "--json"))
    assert shown["run"] == str(out / "best")
    first = shlex.split(shown["commands"][0])
    position = first.index("--out") + 1
    again = tmp_path / "again"
    run(*first[1:position], again, *first[position + 1 :], "--device", "cpu")
    made = out / "best" if len(shown["commands"]) == 1 else out / "final" / "0"
    assert (again / "head.safetensors").read_bytes() == (made / "head.safetensors").read_bytes()
    assert "rung" in run(*command, "--image-features", "eye0", "--device", "cpu")
    wrong = runner.invoke(app, [str(word) for word in (*command, "--budget", "soon")])
    assert wrong.exit_code == 2
