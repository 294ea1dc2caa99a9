"""Options that are given twice."""

from typing import Any

import pytest
import typer
from apecache_cli.app import app
from typer.core import TyperOption
from typer.testing import CliRunner

GROUP: Any = typer.main.get_command(app)
OPTIONS = [
    (name, parameter)
    for name, command in GROUP.commands.items()
    for parameter in command.params
    if isinstance(parameter, TyperOption) and not parameter.is_eager
]
NAMES = [f"{name} {parameter.opts[0]}" for name, parameter in OPTIONS]


def typed(parameter: Any) -> list[str]:
    """The option as a user types it, with a value that any type takes."""
    return [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], "1"]


@pytest.mark.parametrize(("name", "parameter"), OPTIONS, ids=NAMES)
def test_an_option_of_one_value_is_refused_when_it_is_given_twice(
    name: str,
    parameter: Any,
) -> None:
    """Before anything else is looked at: the command lacks its arguments."""
    result = CliRunner().invoke(
        app,
        [name, *typed(parameter), *typed(parameter)],
        env={"COLUMNS": "300"},
    )
    assert result.exit_code in (0, 2, 3), result.output
    assert ("is given twice" in result.stderr) == (not parameter.multiple)
    if not parameter.multiple:
        assert result.exit_code == 2
        assert parameter.opts[0] in result.stderr


def test_the_two_forms_of_a_flag_and_two_names_of_an_option_are_one() -> None:
    for words in (["extract", "--compile", "--no-compile"], ["search", "-k", "3", "--top", "4"]):
        result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
        assert (result.exit_code, "is given twice" in result.stderr) == (2, True), result.output


def test_help_may_be_asked_for_twice() -> None:
    assert CliRunner().invoke(app, ["info", "--help", "--help"]).exit_code == 0
