"""Help at 80 columns, groups of options, and options whose value has several entries."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from apecache_cli.app import app
from apecache_cli.encoders import view_spec
from apecache_cli.engine import ray_spec
from apecache_cli.option_groups import (
    ADVANCED,
    OptionGroup,
    takes_groups,
)
from apecache_cli.source_options import SourceOptions, SplitSourceOptions
from typer.main import get_command
from typer.testing import CliRunner

from apecache.errors import OptionError

COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
PANELS = ("Cache", "Train", "Evaluate", "Search", "Tools")
COMMON_OPTIONS = 8
"""Most options in the first panel of a command, `--help` aside."""


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def panel_titles(text: str) -> list[str]:
    return re.findall(r"^╭─ (.+?) ─+╮$", text, flags=re.MULTILINE)


def test_every_command_is_in_a_panel() -> None:
    assert panel_titles(help_of()) == ["Options", *PANELS]
    assert {command.rich_help_panel for command in COMMANDS.values()} == set(PANELS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_whole_at_80_columns_and_expert_options_come_last(name: str) -> None:
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 80
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        for flag in (*parameter.opts, *parameter.secondary_opts):
            # A column that is too narrow ends in an ellipsis.
            assert re.search(rf"[ ,]{re.escape(flag)}[ ,]", text) or not flag.startswith("--"), flag
    titles = panel_titles(text)
    assert ADVANCED not in titles[:-1]
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    assert sum(p.rich_help_panel is None for p in options) <= COMMON_OPTIONS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_first_paragraph_of_a_help_is_one_line_of_the_list(name: str) -> None:
    command = COMMANDS[name]
    assert "\n" not in command.short_help
    assert command.help.startswith(command.short_help)
    assert len(command.short_help) <= 100


@dataclass(frozen=True, kw_only=True)
class Shape(OptionGroup):
    width: Annotated[int, typer.Option(help="Width.")]
    height: Annotated[int, typer.Option(help="Height.")] = 2


def test_a_group_is_its_options() -> None:
    areas = []
    small = typer.Typer()

    @small.command()
    @takes_groups
    def area(name: Annotated[str, typer.Argument()], shape: Shape) -> None:
        areas.append((name, shape))

    assert CliRunner().invoke(small, ["box", "--width", "3"]).exit_code == 0
    assert areas == [("box", Shape(width=3, height=2))]
    # A field without a default is a required option.
    assert CliRunner().invoke(small, ["box"]).exit_code == 2


def test_split_names_the_column_only_where_it_means_nothing_else() -> None:
    def flags(name: str) -> set[str]:
        return {flag for parameter in COMMANDS[name].params for flag in parameter.opts}

    for name in ("extract", "repair", "scout", "evaluate"):
        assert {"--split", "--split-column"} <= flags(name)
    by_flag = {p.opts[0]: p.name for p in COMMANDS["extract"].params}
    assert by_flag["--split"] == "split_column"
    assert issubclass(SplitSourceOptions, SourceOptions)


def test_shares_of_splits_may_have_a_seed() -> None:
    spec = SourceOptions(split_fraction="train=.5, val=.5, seed=3").spec("image")
    assert spec.split_fraction == (("train", 0.5), ("val", 0.5))
    assert (spec.split_seed, spec.require) == (3, ("image",))
    assert SourceOptions(split_fraction="train=.5,val=.5").spec().split_seed == 0
    with pytest.raises(OptionError, match="a whole number as seed"):
        SourceOptions(split_fraction="train=.5,val=.5,seed=.5").spec()


def test_views_have_a_count_a_scale_and_a_seed() -> None:
    assert (view_spec("4").count, view_spec("4").scale, view_spec("4").seed) == (4, (0.2, 1.0), 0)
    views = view_spec("2, scale=0.5-0.9, seed=7")
    assert (views.count, views.scale, views.seed) == (2, (0.5, 0.9), 7)


@pytest.mark.parametrize("text", ["0", "x", "", "2,scale=1", "2,scale=0-1", "2,seed=x", "2,flip=1"])
def test_other_views_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="expected a count"):
        view_spec(text)


def test_a_ray_cluster_has_an_address_and_resources() -> None:
    assert ray_spec(None) is None
    cluster = ray_spec("10.0.0.1:6379, actors=4, cpus=2, gpus=0.5")
    assert cluster is not None
    assert (cluster.address, cluster.actors, cluster.cpus, cluster.gpus) == (
        "10.0.0.1:6379",
        4,
        2,
        0.5,
    )
    defaults = ray_spec("auto")
    assert defaults is not None
    assert (defaults.actors, defaults.cpus, defaults.gpus) == (None, 1, None)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("", "''"),
        ("actors=2", "'actors=2'"),
        ("auto,actors=0", "'actors=0'"),
        ("auto,actors=1.5", "'actors=1.5'"),
        ("auto,cpus=two", "'cpus=two'"),
        ("auto,gpus=-1", "'gpus=-1'"),
        ("auto,gpus=inf", "'gpus=inf'"),
        ("auto,gpus=nan", "'gpus=nan'"),
        ("auto,disks=1", "'disks=1'"),
        ("auto,cpus=1,cpus=2", "'cpus=2'"),
        ("auto,", "''"),
    ],
)
def test_other_clusters_are_refused(text: str, entry: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"found {entry}")):
        ray_spec(text)
