"""Which folders `apecache demo` takes for its own unfinished ones, and an interrupt of it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from apecache_cli.app import app
from apecache_cli.demo import call, is_unfinished
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("names", "unfinished"),
    [
        ((), False),
        (("encoders",), True),
        (("encoders", "store", "run-ape", ".index.tmp-0123abcd"), True),
        # Without the encoders, which come first, these may be folders of the user.
        (("store", "index"), False),
        (("encoders", "thesis"), False),
        (("encoders", "store", "run-ape", "run-projection", "index", "report.html"), False),
    ],
)
def test_only_an_interrupted_demo_is_resumed(
    names: tuple[str, ...],
    unfinished: bool,
    tmp_path: Path,
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    assert is_unfinished(tmp_path) == unfinished
    assert not is_unfinished(tmp_path / "missing")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    refused = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert (refused.exit_code, "exists already" in refused.output) == (3, True), refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_options_become_the_words_that_a_user_would_type(
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed: list[list[str]] = []
    command = SimpleNamespace(main=lambda words, **_: typed.append(words))
    context: Any = SimpleNamespace(find_root=lambda: SimpleNamespace(command=command))
    options = {"out": Path("my run"), "overwrite": True, "template": ("a {}", "{}")}
    call(context, "index", "run", options=options)
    words = ["index", "run", "--out", "my run", "--overwrite"]
    assert typed == [[*words, "--template", "a {}", "--template", "{}"]]
    assert "$ apecache index run --out 'my run' --overwrite" in capsys.readouterr().err


@pytest.mark.usefixtures("packaged_encoders")
@pytest.mark.slow
def test_the_command_that_an_interrupt_prints_resumes_the_demo(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "apecache", "demo", "--out", "my demo"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    store = tmp_path / "my demo" / "store"
    deadline = time.monotonic() + 300
    while not list(store.glob("records/image/*/commits/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate()
    assert process.returncode == 130, shown
    printed = shlex.split(shown.splitlines()[-1].partition("resume with: ")[2])
    assert printed[:2] == ["apecache", "demo"]
    resumed = subprocess.run(
        [sys.executable, "-m", *printed],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "my demo" / "report.html").is_file()
    # What the demo proposes works when it is pasted.
    _, _, proposed = resumed.stdout.partition("Try next:\n")
    commands = [shlex.split(line) for line in proposed.splitlines()]
    assert [words[1] for words in commands] == ["search", "compare", "fit-head"]
    for words in commands:
        pasted = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert pasted.returncode == 0, pasted.stderr
    # A finished demo is not replaced.
    again = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "my demo")])
    assert "exists already" in again.output
