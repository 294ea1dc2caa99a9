"""`--track` of both trainers and of sweeps, from the command line, read back by each library."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner, Result

from apecache.runs.folder import read_history

EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
COMMANDS = ("fit-head", "fit-encoder", "sweep")
Arguments = Callable[[str], list[str]]


@pytest.fixture
def arguments(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """Of a short fit or sweep into `run`, in a folder where the libraries may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")

    def build(command: str) -> list[str]:
        recipe = "lit" if command == "fit-encoder" else "projection"
        made = [command, str(tiny_store), "--recipe", recipe, "--out", str(tmp_path / "run")]
        made += ["--dev-split", "val", "--device", "cpu"]
        if command != "sweep":
            return [*made, "--set", "schedule.epochs=2", "--set", "schedule.batch_size=4"]
        space = tmp_path / "space.toml"
        space.write_text(
            '"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [1]}\n'
        )
        return [*made, "--space", str(space), "--trials", "2", "--json"]

    return build


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def expected_points(command: str, done: Result, run: Path) -> list[tuple[int, float]]:
    """Step and mean recall of each line of the history, or number and mean of each trial."""
    if command != "sweep":
        return [(line["step"], line["dev"]["mean_recall"]) for line in read_history(run)]
    trials = json.loads(done.stdout)["trials"]
    return sorted((trial["number"], trial["mean"]) for trial in trials)


@pytest.mark.parametrize("command", COMMANDS)
def test_tensorboard(command: str, arguments: Arguments, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = call(*arguments(command), "--track", f"tensorboard={tmp_path / 'events'}")
    assert done.exit_code == 0, done.output
    found = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("dev/mean_recall")
    points = {(each.step, round(each.value, 3)) for each in found}
    expected = expected_points(command, done, tmp_path / "run")
    assert points == {(step, round(value, 3)) for step, value in expected}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_mlflow(command: str, arguments: Arguments, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    try:
        mlflow.search_experiments()
    except Exception as error:
        pytest.skip(f"this mlflow has no store of files: {error}")
    done = call(*arguments(command), "--track", "mlflow=tests")
    assert done.exit_code == 0, done.output
    (logged,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    assert logged.info.status == "FINISHED"
    points = expected_points(command, done, tmp_path / "run")
    assert logged.data.metrics["dev/mean_recall"] == pytest.approx(points[-1][1])
    if command != "sweep":
        assert (
            logged.data.params["name"]
            == json.loads((tmp_path / "run/recipe.json").read_text())["name"]
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
@pytest.mark.parametrize("command", COMMANDS)
def test_libraries_that_keep_files(
    tracker: str,
    command: str,
    arguments: Arguments,
    tmp_path: Path,
) -> None:
    """In a process of their own: they read their folder once. Standard output is JSON alone."""
    if find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    options = [*arguments(command), "--track", f"{tracker}=tests"]
    options += [] if "--json" in options else ["--json"]
    done = subprocess.run(
        [sys.executable, "-m", "apecache", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = "*.wandb" if tracker == "wandb" else "trackio/*"
    assert list(tmp_path.rglob(kept))
    json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tracker_that_is_not_installed_names_its_extra(
    command: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is fitted."""
    from apecache.train import trackers, tracking

    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    for tracker, extra in EXTRAS.items():
        value = f"tensorboard={tmp_path / 'events'}" if tracker == "tensorboard" else tracker
        refused = call(*arguments(command), "--track", value)
        assert refused.exit_code == 1, refused.output
        assert f"apecache[{extra}]" in refused.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("value", "message"),
    [("wandbb", "did you mean wandb"), ("tensorboard", "tensorboard=FOLDER")],
)
def test_a_wrong_tracker_is_a_usage_error(
    command: str,
    value: str,
    message: str,
    arguments: Arguments,
    tmp_path: Path,
) -> None:
    refused = call(*arguments(command), "--track", value)
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.output.split())
    assert not (tmp_path / "run").exists()
