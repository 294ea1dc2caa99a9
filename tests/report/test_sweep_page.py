"""The page of a sweep: its table, its drawing, what mattered, and what it says where something is
missing."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import SMALL

from apecache.errors import MissingExtraError, RunError
from apecache.report.charts.axes import log_ticks
from apecache.report.charts.importance import importances
from apecache.report.charts.parallel import Axis, Parallel, axis_of, draw
from apecache.report.sweep_page import is_sweep, sweep_page
from apecache.store.reader import FeatureStore
from apecache.sweeps.run import SweepSpec, sweep
from apecache.sweeps.space import Dimension, load_space
from apecache.train.batches import SplitSpec
from apecache.train.head_data import FitSpec

SPLITS = ["train"] * 60 + ["dev"] * 20
SPACE = """
"optimizer.lr" = {log = [1e-5, 3e-2]}
"image.kind" = {choice = ["linear", "mlp"]}
"image.dropout" = {float = [0.0, 0.5], if = {"image.kind" = "mlp"}}
"schedule.epochs" = {choice = [3]}
"""


@pytest.fixture(scope="module")
def swept(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(len(SPLITS), 6))
    image, text = ((hidden @ rng.normal(size=(6, dim))).astype(np.float32) for dim in (12, 10))
    store: FeatureStore = write_store(folder / "store", image, text, range(len(SPLITS)), SPLITS)
    (folder / "space.toml").write_text(SPACE)
    spec = SweepSpec(9, seeds=2, fit=FitSpec(splits=SplitSpec(dev="dev"), device="cpu"))
    sweep(store, space=load_space(folder / "space.toml", (SMALL,)), out=folder / "sweep", spec=spec)
    return folder / "sweep"


def table_rows(source: str) -> list[list[str]]:
    body = source.partition(">Trials<")[2].partition("<tbody>")[2].partition("</tbody>")[0]
    return [
        [
            re.sub(r"<[^>]+>", "", cell).strip()
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in body.split("</tr>")[:-1]
    ]


def test_trials_stand_by_their_dev_score_with_intervals_and_the_command_of_the_best(
    swept: Path,
) -> None:
    assert is_sweep(swept)
    page = sweep_page(swept)
    assert page == swept / "report.html"
    source = page.read_text(encoding="utf-8")
    rows = table_rows(source)
    lines = [json.loads(line) for line in (swept / "trials.jsonl").read_text().splitlines()]
    best = sorted(lines, key=lambda line: -line["mean"])
    assert [int(row[0]) for row in rows] == [line["number"] for line in best]
    assert rows[0][2] == f"{best[0]['mean']:.1f}"
    assert rows[0][3].replace("\u00a0", " ") == f"{best[0]['low']:.1f} to {best[0]['high']:.1f}"
    assert rows[0][4] == f"{best[0]['chance']:.1f}"
    assert "apecache fit-head" in source
    assert f"--set optimizer.lr={best[0]['values']['optimizer.lr']}" in source
    for words in (
        "Settings and scores",
        "What mattered",
        "Training loss",
        "What the best run has cost",
        "The search",
    ):
        assert words in source, words
    assert "<script" not in source


def test_what_mattered_is_what_the_score_follows() -> None:
    rng = np.random.default_rng(0)
    lines = {
        "lr": {"log": [1e-4, 1.0]},
        "depth": {"int": [1, 9]},
        "kind": {"choice": ["a", "b"]},
        "same": {"choice": [1]},
    }
    space = {name: Dimension.model_validate(line) for name, line in lines.items()}
    points = [
        {
            "lr": float(10 ** rng.uniform(-4, 0)),
            "depth": int(rng.integers(1, 10)),
            "kind": "ab"[rng.integers(2)],
            "same": 1,
        }
        for _ in range(60)
    ]
    found = importances(space, points, [float(np.log10(point["lr"])) for point in points])
    assert next(iter(found)) == "lr"
    assert found["lr"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    assert "same" not in found
    assert importances(space, points[:7], list(range(7))) == {}
    assert importances(space, points, [1.0] * 60) == {}


def test_without_optuna_the_page_says_what_is_missing(
    swept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="sweep"):
        importances({}, [], [])
    source = sweep_page(swept, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "optuna is not installed" in source
    assert "What mattered" not in source


def test_an_unfinished_sweep_has_a_page_too(swept: Path, tmp_path: Path) -> None:
    part = shutil.copytree(swept, tmp_path / "part")
    shutil.rmtree(part / "best")
    (part / "command.txt").unlink()
    lines = (part / "trials.jsonl").read_text().splitlines()[:3]
    (part / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    source = sweep_page(part).read_text(encoding="utf-8")
    assert len(table_rows(source)) == 3
    assert "at least 8 are needed" in source
    assert "apecache fit-head" not in source


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sweep.json", "{", "is damaged"),
        ("sweep.json", "[]", "is damaged"),
        ("trials.jsonl", '{"number": 1}\n', "is damaged"),
        ("trials.jsonl", "", "no finished trial yet"),
    ],
)
def test_a_damaged_sweep_is_refused(
    swept: Path,
    tmp_path: Path,
    name: str,
    text: str,
    words: str,
) -> None:
    copy = shutil.copytree(swept, tmp_path / "copy")
    (copy / name).write_text(text)
    with pytest.raises(RunError, match=words):
        sweep_page(copy)
    with pytest.raises(RunError, match="is not a sweep"):
        sweep_page(tmp_path)


# --- the drawing ----------------------------------------------------------------------------------


def test_values_are_placed_on_their_axes() -> None:
    lr = axis_of("lr", Dimension(log=(1e-4, 1e-2)), [1e-4, 1e-3, 1e-2, None])
    assert [lr.place(value) for value in lr.values] == [0, pytest.approx(0.5), 1, None]
    assert [words for _, words in lr.labels()] == ["0.0001", "0.001", "0.01"]
    kind = axis_of("kind", Dimension(choice=("a", True, "c")), ["a", True, "b"])
    assert [kind.place(value) for value in kind.values] == [
        pytest.approx(1 / 6),
        pytest.approx(0.5),
        None,
    ]
    assert [words for _, words in kind.labels()] == ["a", "yes", "c"]
    depth = axis_of("depth", Dimension.model_validate({"int": [1, 9]}), [1, 3, 5])
    assert [depth.place(value) for value in depth.values] == [0, 0.5, 1]
    assert (
        axis_of("same", Dimension.model_validate({"float": [1, 1]}), [2.0, 2.0]).place(2.0) == 0.5
    )


def test_the_best_trial_is_drawn_last_and_alone_in_its_color() -> None:
    axes = (
        Axis(name="x", kind="linear", values=(0.0, 1.0, 0.5, None)),
        Axis(name="score", kind="linear", values=(3.0, 9.0, 1.0, 2.0)),
    )
    drawn = draw(Parallel(title="t", note="", axes=axes, scores=(3.0, 9.0, 1.0, 2.0)))
    assert [line.shade for line in drawn.lines].count("best") == 1
    assert drawn.lines[-1].shade == "best"
    assert drawn.lines[-1].path == f"M66.0 {drawn.top:.1f} L198.0 {drawn.top:.1f}"
    assert "not set" in [words for _, words in drawn.axes[0].marks]
    assert "not set" not in [words for _, words in drawn.axes[1].marks]


@given(
    st.lists(st.one_of(st.none(), st.floats(1e-12, 1e12)), min_size=1, max_size=20),
    st.sampled_from(["log", "linear"]),
)
def test_whatever_was_chosen_lies_within_the_drawing(values: list[float | None], kind: str) -> None:
    axis = Axis(name="x", kind=kind, values=tuple(values))
    drawn = draw(Parallel(title="t", note="", axes=(axis, axis), scores=tuple(range(len(values)))))
    numbers = [
        float(number) for line in drawn.lines for number in re.findall(r"-?\d+\.\d", line.path)
    ]
    assert all(0 <= x <= drawn.width for x in numbers[::2])
    assert all(drawn.top - 0.1 <= y <= drawn.height for y in numbers[1::2])
    assert all(drawn.top - 0.1 <= y <= drawn.height for axis in drawn.axes for y, _ in axis.marks)


@given(st.floats(-12, 12), st.floats(1e-3, 12))
def test_log_ticks_are_two_or_more_within_the_axis(low: float, width: float) -> None:
    ends = 10.0**low, 10.0 ** (low + width)
    found = log_ticks(*ends)
    assert len(found) >= 2
    assert list(found) == sorted(set(found))
    assert ends[0] <= found[0]
    assert found[-1] <= ends[1]
