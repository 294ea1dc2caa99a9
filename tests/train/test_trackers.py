"""Trackers get the lines of the history; each library is used offline and read back."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from apecache.errors import OptionError
from apecache.train.trackers import flat_settings, parse_tracker, track_fit, track_sweep

SETTINGS = {"loss": {"kind": "infonce", "temperature": 0.07}, "name": "projection"}


def line(step: int, recall: float) -> dict[str, Any]:
    recalls = {"1": recall, "5": recall, "10": recall}
    return {
        "step": step,
        "loss": 1.0 / (1 + step),
        "lr": 0.001,
        "temperature": 0.07,
        "dev": {"mean_recall": recall, "image_to_text": recalls, "text_to_image": recalls},
    }


def test_trackers_are_parsed_and_settings_are_flat() -> None:
    assert parse_tracker("wandb") == ("wandb", "apecache")
    assert parse_tracker("tensorboard=/tmp/a=b") == ("tensorboard", "/tmp/a=b")
    for text, message in (("wandbb", "expected one of .*wandb"), ("tensorboard", "its folder")):
        with pytest.raises(OptionError, match=message):
            parse_tracker(text)
    assert flat_settings(SETTINGS) == {
        "loss.kind": "infonce",
        "loss.temperature": "0.07",
        "name": "projection",
    }


def test_a_sweep_has_a_point_for_each_trial(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with track_sweep(f"tensorboard={tmp_path / 'events'}", "sweep") as log:
        log(0, {"dev/mean_recall": 2.5})
        log(3, {"dev/mean_recall": 4.5})
    found = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("dev/mean_recall")
    assert [(each.step, each.value) for each in found] == [(0, 2.5), (3, 4.5)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own: libraries write beside the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_curves_and_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        mlflow.set_tracking_uri(f"file://{here}/mlruns")
        mlflow.search_experiments()
    except Exception as error:
        pytest.skip(f"this mlflow has no store of files: {error}")
    with track_fit("mlflow=tests", "run-0", SETTINGS) as log:
        log(line(0, 1.0))
        log(line(8, 20.5))
    (run,) = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    assert run.data.metrics["dev/mean_recall"] == 20.5
    assert run.data.metrics["dev/image_to_text/R-at-1"] == 20.5
    assert run.data.params["loss.kind"] == "infonce"
    assert run.info.status == "FINISHED"
    with pytest.raises(ZeroDivisionError), track_fit("mlflow=tests", "run-1", {}):
        raise ZeroDivisionError
    runs = mlflow.search_runs(experiment_names=["tests"], output_format="list")
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED"}


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[dict[str, Any]] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self, **options: Any) -> None:
        self.finished.append(options)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_object_gets_every_line_and_is_closed(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    import types

    from apecache.train import trackers

    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(**settings))
        return runs[-1]

    module = types.ModuleType(name)
    module.init = init  # type: ignore[attr-defined]
    module.finish = lambda: runs[-1].finish()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers, "find_spec", lambda _: object())
    with track_fit(f"{name}=mine", "run-0", SETTINGS) as log:
        log(line(4, 3.0))
    (run,) = runs
    assert run.settings["project"] == "mine"
    assert run.settings["name"] == "run-0"
    assert json.loads(json.dumps(run.settings["config"]))["loss.kind"] == "infonce"
    assert run.logged[0][0] == 4
    assert run.logged[0][1]["dev/text_to_image/R@10"] == 3.0
    assert len(run.finished) == 1
    with pytest.raises(ZeroDivisionError), track_sweep(name, "sweep"):
        raise ZeroDivisionError
    assert runs[1].finished == ([{"exit_code": 1}] if name == "wandb" else [{}])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(here))
    with track_fit("wandb=tests", "run-0", SETTINGS) as log:
        log(line(0, 1.0))
    assert list(here.rglob("*.wandb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_its_files_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(here / "trackio"))
    pytest.importorskip("trackio")
    with track_fit("trackio=tests", "run-0", SETTINGS) as log:
        log(line(0, 1.0))
    assert any(path.is_file() for path in here.rglob("*"))
