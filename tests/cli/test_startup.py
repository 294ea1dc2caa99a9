"""The command line before any work: help, versions, exit codes of wrong usage, speed."""

import subprocess
import sys

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

COMMANDS = (
    "extract", "scout", "info", "plan", "fit-head", "fit-encoder", "sweep", "lint",
    "evaluate", "index", "search", "report", "serve", "demo",
)  # fmt: skip
runner = CliRunner()


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from apecache_cli.app import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
print(result.output)
heavy = ("torch", "transformers", "timm", "zarr", "numpy", "faiss", "pydantic", "starlette", "uvicorn")
print("HEAVY", [m for m in heavy if m in sys.modules])
"""
    output = run_python(code)
    assert "HEAVY []" in output
    for command in COMMANDS:
        assert command in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_a_json_option(command: str) -> None:
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Example: apecache " + command in result.output
    assert "--json" in result.output


def test_no_arguments_show_the_help() -> None:
    assert "Usage" in runner.invoke(app, []).output


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apecache", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("apecache 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["extract"],
        ["info", "store", "--no-such-option"],
        ["search", "index", "dog", "-k", "0"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2
