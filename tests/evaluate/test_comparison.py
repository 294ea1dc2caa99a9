"""`compare_runs` and `apecache compare`: fitted runs on one split, what is refused, and what is
warned of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

import apecache
from apecache.errors import MismatchError, OptionError
from apecache.evaluate.comparison import METRICS, SIGN_FLIPS, STUDENT
from apecache.evaluate.embeddings import embed_store
from apecache.evaluate.left_out import LeftOut
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

SPLITS = ["train"] * 96 + ["dev"] * 16 + ["val"] * 60
RECIPES = {"long": ["schedule.epochs=20", "optimizer.lr=0.01"], "short": ["schedule.epochs=1"]}
DEV = SplitSpec(dev="dev")


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(len(SPLITS), 6))
    owners = np.repeat(np.arange(len(SPLITS)), 2)
    image = hidden @ rng.normal(size=(6, 12)) + 0.2 * rng.normal(size=(len(SPLITS), 12))
    text = hidden[owners] @ rng.normal(size=(6, 10)) + 0.2 * rng.normal(size=(len(owners), 10))
    features = image.astype(np.float32), text.astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("compare") / "store",
        *features,
        owners.tolist(),
        SPLITS,
    )
    return made


@pytest.fixture(scope="module")
def runs(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in RECIPES.items():
        recipe = load_recipe(
            "projection",
            ["image.dim=16", "text.dim=16", "schedule.batch_size=32", *settings],
        )
        for seed in (0, 1):
            fit_head(
                store,
                recipe=recipe,
                out=folder / f"{name}-{seed}",
                spec=FitSpec(splits=DEV, seed=seed, device="cpu"),
            )
    return {path.name: path for path in folder.iterdir()}


def test_a_difference_is_that_of_the_recalls_and_stands_beside_chance(
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    found = apecache.compare_runs(runs["long-0"], runs["short-0"], store, device="cpu")
    reports = []
    for name in ("long-0", "short-0"):
        embedded = embed_store(load_heads(runs[name]), store, "val")
        reports.append(retrieval_report(embedded.image, embedded.text, embedded.image_of_text))
    rows = {row.metric: row for row in found.rows}
    assert list(rows) == list(METRICS)
    for metric, value in (("mean of all", "mean_recall"), ("mean R@1", "mean_recall_at_1")):
        assert rows[metric].value_a == pytest.approx(getattr(reports[0], value))
        assert rows[metric].value_b == pytest.approx(getattr(reports[1], value))
    row = rows["text to image R@5"]
    assert row.value_a == pytest.approx(reports[0].text_to_image[5])
    assert row.difference == pytest.approx(row.value_a - row.value_b)
    assert row.chance == pytest.approx(reports[0].chance_text_to_image[5])
    assert rows["mean of all"].low > 0
    assert rows["mean of all"].p_value < 0.01
    assert (found.n_images, found.n_texts, found.method) == (60, 120, SIGN_FLIPS)
    assert found.seen_in_training == ()


def test_a_run_does_not_differ_from_itself_and_sides_can_be_swapped(
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    same = apecache.compare_runs(runs["long-0"], runs["long-0"], store, device="cpu")
    assert {(row.difference, row.p_value) for row in same.rows} == {(0.0, 1.0)}
    assert all(row.low < 0 < row.high for row in same.rows)
    forth = apecache.compare_runs(runs["long-0"], runs["long-1"], store, device="cpu")
    back = apecache.compare_runs(runs["long-1"], runs["long-0"], store, device="cpu")
    for one, other in zip(forth.rows, back.rows, strict=True):
        assert (one.difference, one.p_value) == pytest.approx((-other.difference, other.p_value))
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_seeds_of_both_sides_are_averaged_and_their_spread_counts(
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    sides = [[runs[f"{name}-{seed}"] for seed in (0, 1)] for name in ("long", "short")]
    found = apecache.compare_runs(sides[0], sides[1], store, device="cpu")
    single = [apecache.compare_runs(a, b, store, device="cpu") for a, b in zip(*sides, strict=True)]
    assert (found.n_seeds_a, found.n_seeds_b, found.method) == (2, 2, STUDENT)
    for row, first, second in zip(found.rows, single[0].rows, single[1].rows, strict=True):
        assert row.difference == pytest.approx((first.difference + second.difference) / 2)


def test_what_cannot_be_compared_is_refused(
    runs: dict[str, Path],
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match="their recipe differ"):
        apecache.compare_runs([runs["long-0"], runs["short-1"]], runs["short-0"], store)
    with pytest.raises(OptionError, match="different seeds"):
        apecache.compare_runs([runs["long-0"], runs["long-0"]], runs["short-0"], store)
    with pytest.raises(OptionError, match="has no run"):
        apecache.compare_runs([], runs["short-0"], store)
    recipe = load_recipe(
        "projection",
        ["image.dim=16", "text.dim=16", "schedule.batch_size=32", "schedule.epochs=1"],
    )
    fit_head(
        store,
        recipe=recipe,
        out=tmp_path / "split",
        spec=FitSpec(splits=SplitSpec(dev_images=8), device="cpu"),
    )
    with pytest.raises(MismatchError, match="trained on different splits"):
        apecache.compare_runs(runs["short-0"], tmp_path / "split", store)
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(len(SPLITS), dim)).astype(np.float32) for dim in (12, 10)]
    other = write_store(tmp_path / "other", *features, list(range(len(SPLITS))), SPLITS)
    fit_head(other, recipe=recipe, out=tmp_path / "table", spec=FitSpec(splits=DEV, device="cpu"))
    with pytest.raises(MismatchError, match="trained on different tables"):
        apecache.compare_runs(runs["short-0"], tmp_path / "table", store)


def test_the_command_compares_two_runs_or_groups_of_seeds(
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    where = ["--store", str(store.path), "--device", "cpu"]
    two = [str(runs["long-0"]), str(runs["short-0"])]
    done = CliRunner().invoke(app, ["compare", *two, *where, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert (shown["a"], shown["b"], shown["split"]) == (two[:1], two[1:], "val")
    assert [row["metric"] for row in shown["rows"]] == list(METRICS)
    done = CliRunner().invoke(app, ["compare", *two, *where])
    assert done.exit_code == 0, done.output
    for words in (
        "A - B",
        "95 % interval",
        "chance",
        "image to text R@1",
        "mean of all",
        SIGN_FLIPS,
    ):
        assert words in done.output
    assert "no variance over seeds of A and B" in done.output
    groups = [
        word
        for side, name in (("--a", "long"), ("--b", "short"))
        for seed in (0, 1)
        for word in (side, str(runs[f"{name}-{seed}"]))
    ]
    done = CliRunner().invoke(app, ["compare", *groups, *where])
    assert done.exit_code == 0, done.output
    assert STUDENT in done.output
    assert "no variance over seeds" not in done.output


def test_what_is_left_out_is_said_as_evaluate_says_it(
    runs: dict[str, Path],
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
) -> None:
    first_val = SPLITS.index("val")
    rng = np.random.default_rng(2)
    features = [
        rng.normal(size=(n_rows, dim)).astype(np.float32)
        for n_rows, dim in ((len(SPLITS), 12), (2 * len(SPLITS), 10))
    ]
    # One bad image of val, one bad caption of another, and a bad image outside the split.
    lossy_store = write_store(
        tmp_path / "lossy",
        *features,
        np.repeat(np.arange(len(SPLITS)), 2).tolist(),
        SPLITS,
        bad_images=(0, first_val),
        bad_texts=(2 * first_val + 2,),
    )
    left_out = LeftOut(unreadable_images=1, unusable_captions=1, captions_of_unreadable_images=2)
    comparison = apecache.compare_runs(runs["long-0"], runs["short-0"], lossy_store, device="cpu")
    assert comparison.left_out == left_out
    assert (
        apecache.compare_runs(runs["long-0"], runs["short-0"], store, device="cpu").left_out
        == LeftOut()
    )
    names = [str(runs["long-0"]), str(runs["short-0"])]
    where = ["--store", str(lossy_store.path), "--split", "val", "--device", "cpu"]
    shown = CliRunner().invoke(app, ["compare", *names, *where])
    evaluated = CliRunner().invoke(app, ["evaluate", names[0], *where])
    assert str(left_out) in shown.output.splitlines()
    assert str(left_out) in evaluated.output.splitlines()
    in_json = json.loads(CliRunner().invoke(app, ["compare", *names, *where, "--json"]).stdout)
    assert in_json["left_out"] == vars(left_out)
    nothing = ["--store", str(store.path), "--device", "cpu"]
    assert "left out" not in CliRunner().invoke(app, ["compare", *names, *nothing]).output


@pytest.mark.parametrize(
    "arguments",
    [["one"], ["one", "two", "three"], ["one", "two", "--a", "x"], ["--a", "x"]],
)
def test_the_command_takes_two_runs_or_both_groups(arguments: list[str]) -> None:
    wrong = CliRunner().invoke(app, ["compare", *arguments, "--store", "s"])
    assert (wrong.exit_code, "expected two runs, or --a RUN and --b RUN" in wrong.output) == (
        2,
        True,
    ), wrong.output


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_split_that_training_saw_is_warned_of(
    split: str,
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    found = apecache.compare_runs(runs["long-0"], runs["short-0"], store, split, device="cpu")
    assert found.seen_in_training == (str(runs["long-0"]), str(runs["short-0"]))
    command = [
        "compare",
        str(runs["long-0"]),
        str(runs["short-0"]),
        "--store",
        str(store.path),
        "--split",
        split,
    ]
    done = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert "its figures are too high" in done.output


def test_evaluation_prints_chance_and_intervals_beside_every_recall(
    runs: dict[str, Path],
    store: FeatureStore,
) -> None:
    command = [
        "evaluate",
        str(runs["long-0"]),
        "--store",
        str(store.path),
        "--csls",
        "--by-language",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = [
        line.split("\u2502")[1].strip()
        for line in done.output.splitlines()
        if line.startswith("\u2502")
    ]
    names = [
        line
        for line in lines
        if line in ("95 % interval", "with CSLS", "chance") or line.startswith("chance, ")
    ]
    assert names[:4] == ["95 % interval", "with CSLS", "95 % interval", "chance"]
    assert [name.partition(",")[0] for name in names[4:]] == ["95 % interval", "chance"]
    shown = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    reports = [shown, shown["csls"], *shown["languages"].values()]
    for report in reports:
        for way in ("image_to_text", "text_to_image"):
            for k, (low, high) in report["intervals"][way].items():
                assert low <= report[way][k] <= high
                assert high > low
                assert report["chance"][way][k] > 0
