"""`apecache recipes`, and `fit-head` going on after a kill by its command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.recipes.recipe import load_recipe, parse_recipe, zoo_names

runner = CliRunner()


def test_every_recipe_is_listed_with_what_it_needs_and_trains() -> None:
    result = runner.invoke(app, ["recipes", "--json", "--image-dim", "768", "--text-dim", "768"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [recipe["name"] for recipe in found["recipes"]] == zoo_names()
    by_name = {recipe["name"]: recipe for recipe in found["recipes"]}
    assert by_name["lilt-projection"]["n_trained_parameters"] == 393_729
    assert by_name["token-anchors"]["cut"] == "tokens"
    assert all(recipe["source"] and recipe["summary"] for recipe in found["recipes"])


def test_one_recipe_is_shown_with_its_source() -> None:
    result = runner.invoke(app, ["recipes", "sail"])
    assert result.exit_code == 0
    assert "source: SAIL" in result.stderr
    assert "sharelock" not in result.output


@pytest.mark.parametrize("name", ["lilt-o", "mixed", "freeze/Vuf-Tuu", "shared-encoder"])
def test_the_settings_of_one_recipe_are_shown_resolved_as_a_file(name: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["recipes", name])
    path = tmp_path / "shown.toml"
    path.write_text(result.stdout, encoding="utf-8")
    recipe = load_recipe(name)
    assert load_recipe(path) == recipe.model_copy(update={"source": ""})
    in_json = json.loads(runner.invoke(app, ["recipes", name, "--json"]).stdout)["recipes"][0]
    assert parse_recipe(in_json["settings"], name) == recipe


def test_the_list_and_one_recipe_say_in_the_same_words_that_a_tower_trains() -> None:
    # Wide enough for the words to stay on one line.
    listed = runner.invoke(app, ["recipes"], env={"COLUMNS": "300"})
    shown = runner.invoke(app, ["recipes", "lilt-i"], env={"COLUMNS": "300"})
    row = next(line for line in listed.stdout.splitlines() if "lilt-i " in line)
    assert "trains the tower" in row
    assert "trains the tower" in shown.stderr


def test_an_unknown_recipe_ends_with_the_nearest_name() -> None:
    result = runner.invoke(app, ["recipes", "sial"])
    assert result.exit_code == 3
    assert "did you mean sail" in result.stderr


@pytest.mark.slow
def test_a_killed_fit_goes_on_by_the_same_command_and_another_is_refused(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    sets = ("--set", "schedule.epochs=100000", "--set", "schedule.batch_size=4")
    settings = [*sets, "--dev-split", "val", "--device", "cpu"]
    fit = [
        sys.executable,
        "-m",
        "apecache",
        "fit-head",
        str(tiny_store),
        "--recipe",
        "projection",
        *settings,
    ]
    killed = [*fit, "--out", str(tmp_path / "run"), "--save-seconds", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        killed,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    changed = subprocess.run(
        [*killed, "--seed", "1"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert changed.returncode == 4, changed.stderr
    assert "seed is 1, there 0" in changed.stderr


def test_runs_are_combined_and_the_combination_is_evaluated(
    tiny_store: Path,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    both = tmp_path / "both"
    result = runner.invoke(
        app,
        ["ensemble", str(tiny_run), str(tiny_run), "--out", str(both), "--json"],
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dim"] == 32
    found = []
    for run in (both, tiny_run):
        result = runner.invoke(
            app,
            ["evaluate", str(run), "--store", str(tiny_store), "--split", "val", "--json"],
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[0] == found[1]
    assert found[0]["seen_in_training"]
    result = runner.invoke(app, ["ensemble", str(tiny_run), str(tiny_run), "--out", str(both)])
    assert result.exit_code == 3
