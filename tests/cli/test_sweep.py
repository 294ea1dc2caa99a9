"""`apecache sweep` on a small store: its output, and the command that it gives."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

runner = CliRunner()


def test_a_sweep_prints_json_a_table_and_a_command_that_makes_its_best_again(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [2]}\n')
    options = [
        "--recipe",
        "projection",
        "--space",
        str(space),
        "--out",
        str(tmp_path / "out"),
        "--trials",
        "3",
    ]
    command = ["sweep", str(tiny_store), *options, "--dev-split", "val", "--device", "cpu"]
    result = runner.invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["trials"]) == 3
    assert report["trials"][0] == report["best"]
    again = runner.invoke(app, command)
    assert again.exit_code == 0, again.output
    assert report["command"] in again.output
    fitted = runner.invoke(app, [*shlex.split(report["command"])[1:], "--device", "cpu"])
    assert fitted.exit_code == 0, fitted.output
    runs = [tmp_path / "out" / name / "head.safetensors" for name in ("best", "best-again")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_wrong_settings_end_with_their_exit_codes(tiny_store: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.lrr" = {log = [1e-4, 1e-2]}\n')
    options = [
        "sweep",
        str(tiny_store),
        "--recipe",
        "projection",
        "--space",
        str(space),
        "--out",
        str(tmp_path / "o"),
    ]
    wrong = runner.invoke(app, [*options, "--dev-split", "val"])
    assert (wrong.exit_code, "did you mean lr" in wrong.output) == (3, True), wrong.output
    assert runner.invoke(app, [*options, "--sampler", "magic"]).exit_code == 2


@pytest.mark.slow
def test_an_interrupted_or_killed_sweep_goes_on_with_the_same_command(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [40]}\n')

    def command(out: str) -> list[str]:
        options = [
            "--recipe",
            "projection",
            "--space",
            str(space),
            "--out",
            str(tmp_path / out),
            "--trials",
            "6",
        ]
        return [
            "sweep",
            str(tiny_store),
            *options,
            "--population",
            "2",
            "--dev-split",
            "val",
            "--device",
            "cpu",
        ]

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, "-m", "apecache", *arguments], **settings)

    assert runner.invoke(app, command("whole")).exit_code == 0
    for sent, lines in ((signal.SIGINT, 2), (signal.SIGKILL, 4)):
        process = start(command("broken"))
        wait_for_lines(process, tmp_path / "broken" / "trials.jsonl", lines)
        process.send_signal(sent)
        _, said = process.communicate()
        if sent == signal.SIGINT:
            assert (process.returncode, "interrupted; resume with: apecache sweep" in said) == (
                130,
                True,
            ), said
    assert runner.invoke(app, command("broken")).exit_code == 0
    for name in ("trials.jsonl", "best/head.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


FORKS = """
import json, os, sys
import apecache.sweeps.run
from apecache_cli.app import app
for line in sys.stdin:
    child = os.fork()
    if not child:
        app(json.loads(line))
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_ends_with_the_same_table(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    """At random moments, within populations as well: every epoch is saved. One process imports and
    forks the others."""
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [27]}\n')

    def command(out: str) -> list[str]:
        options = [
            "--recipe",
            "projection",
            "--space",
            str(space),
            "--out",
            str(tmp_path / out),
            "--trials",
            "9",
        ]
        options += ["--halving", "--population", "3", "--save-seconds", "0"]
        return ["sweep", str(tiny_store), *options, "--dev-split", "val", "--device", "cpu"]

    assert runner.invoke(app, command("warm")).exit_code == 0
    begin = time.monotonic()
    assert runner.invoke(app, command("whole")).exit_code == 0
    seconds = time.monotonic() - begin
    numbers = random.Random(0)
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
    }
    with subprocess.Popen([sys.executable, "-c", FORKS], text=True, **pipes) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(10):
            print(json.dumps(command("broken")), file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            time.sleep(numbers.uniform(0, seconds / 5))
            with suppress(ProcessLookupError):  # it was done
                os.kill(child, signal.SIGKILL)
        parent.stdin.close()
    assert runner.invoke(app, command("broken")).exit_code == 0
    for name in ("trials.jsonl", "best/head.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"ended before {count} trials: {process.communicate()}")
