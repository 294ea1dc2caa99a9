"""`apecache fit-encoder` on a small store, and what `fit-head` leaves to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from typer.testing import CliRunner, Result

from apecache.runs.folder import read_history

SHORT = [
    "--set",
    "schedule.epochs=2",
    "--set",
    "schedule.batch_size=4",
    "--dev-split",
    "val",
    "--device",
    "cpu",
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_lit_from_the_command_line(tiny_store: Path, tmp_path: Path) -> None:
    arguments = [
        "fit-encoder",
        tiny_store,
        "--recipe",
        "lit",
        "--out",
        tmp_path / "run",
        *SHORT,
        "--slice",
        "2",
    ]
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert "cached" in done.output
    assert "epoch   2  loss" in done.output
    again = call(*arguments)
    assert again.exit_code == 3
    assert "exists already" in again.output
    found: Any = json.loads(call(*arguments, "--overwrite", "--json").stdout.splitlines()[-1])
    assert found["cached"] == ["image"]
    assert found["n_epochs"] == 2


def test_towers_are_compiled_where_that_is_asked_for(
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[object] = []

    def kept(run: Any, **_: Any) -> Any:
        compiled.append(run)
        return run

    monkeypatch.setattr(torch, "compile", kept)
    arguments = ["fit-encoder", tiny_store, "--recipe", "lit", "--out", tmp_path / "run", *SHORT]
    done = call(*arguments, "--compile")
    assert done.exit_code == 0, done.output
    # The images are cached: a sum, which shows that this machine can compile, and the texts.
    assert len(compiled) == 2
    assert json.loads((tmp_path / "run" / "encoder.json").read_text())["used"]["compile"]
    assert "torch.compile" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "recipe"),
    [("fit-encoder", "lit"), ("fit-head", "projection")],
)
def test_curves_go_to_tensorboard_too(
    tiny_store: Path,
    tmp_path: Path,
    command: str,
    recipe: str,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [command, tiny_store, "--recipe", recipe, "--out", tmp_path / "run", *SHORT]
    done = call(*arguments, "--tensorboard", tmp_path / "events")
    assert done.exit_code == 0, done.output
    assert "epoch   2  loss" in done.output
    found = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("dev/mean_recall")
    assert [each.step for each in found] == [
        line["step"] for line in read_history(tmp_path / "run")
    ]


def test_a_live_image_tower_reads_its_images_below_root(
    tiny_store: Path,
    shapes_once: Path,
    tmp_path: Path,
    images_are_gone: None,
) -> None:
    arguments = ["fit-encoder", tiny_store, "--recipe", "lilt-d", *SHORT]
    refused = call(*arguments, "--out", tmp_path / "run")
    assert (refused.exit_code, "needs the images" in refused.output) == (2, True)
    elsewhere = call(*arguments, "--out", tmp_path / "run", "--root", tmp_path)
    assert (elsewhere.exit_code, "cannot be read" in elsewhere.output) == (3, True)
    done = call(*arguments, "--out", tmp_path / "run", "--root", shapes_once.parent, "--overwrite")
    assert done.exit_code == 0, done.output
    assert "neither" in done.output


@pytest.mark.parametrize(
    ("command", "recipe", "message"),
    [
        ("fit-head", "lit", "use apecache fit-encoder"),
        ("fit-encoder", "projection", "use fit-head"),
    ],
)
def test_recipes_of_the_other_trainer_are_refused(
    command: str,
    recipe: str,
    message: str,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    refused = call(command, tiny_store, "--recipe", recipe, "--out", tmp_path / "run")
    assert refused.exit_code == 3
    assert message in refused.output
    assert len(refused.output.strip().splitlines()) == 1


def test_a_closed_form_is_not_called_untrained(tiny_store: Path, tmp_path: Path) -> None:
    arguments = ["fit-head", tiny_store, "--recipe", "ridge", "--out", tmp_path / "run"]
    done = call(*arguments, "--dev-split", "val", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "epoch   0  closed form  dev mean recall" in done.output
    assert "closed form, without epochs" in done.output
