"""Sweeps on features made for the purpose: what they choose, write, refuse, and how they go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import SMALL

import apecache.sweeps.halving
from apecache.errors import MismatchError, OptionError, RecipeError, RunError
from apecache.metrics.statistics import estimate_from_recalls
from apecache.recipes.recipe import Recipe
from apecache.store.reader import FeatureStore
from apecache.sweeps.run import SweepSpec, Trial, read_trials, sweep
from apecache.sweeps.space import Space, load_space
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

SPLITS = ["train"] * 96 + ["dev"] * 24
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")
RATES = '"optimizer.lr" = {log = [1e-5, 3e-2]}\n"schedule.epochs" = {choice = [9]}\n'
KINDS = '"image.kind" = {choice = ["linear", "mlp"]}\n"image.width" = {int = [8, 9]}\n'


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(len(SPLITS), 6))
    image, text = (
        hidden @ rng.normal(size=(6, dim)) + 0.3 * rng.normal(size=(len(SPLITS), dim))
        for dim in (12, 10)
    )
    features = image.astype(np.float32), text.astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("sweep") / "s",
        *features,
        range(len(SPLITS)),
        SPLITS,
    )
    return made


def make_space(folder: Path, text: str = RATES, recipes: tuple[str, ...] = (SMALL,)) -> Space:
    path = folder / "space.toml"
    path.write_text(text)
    return load_space(path, recipes)


def plain(trials: Any) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.number)


def test_the_best_trial_is_an_ordinary_run_that_a_solo_fit_makes_again(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    space = make_space(tmp_path)
    report = sweep(store, space=space, out=tmp_path / "out", spec=SweepSpec(6, fit=CPU))
    assert [t.mean for t in report.trials] == sorted((t.mean for t in report.trials), reverse=True)
    assert report.best == report.trials[0]
    alone = fit_head(
        store,
        recipe=space.recipe(report.best.values),
        out=tmp_path / "alone",
        spec=CPU,
    )
    assert (tmp_path / "out/best/head.safetensors").read_bytes() == (
        tmp_path / "alone/head.safetensors"
    ).read_bytes()
    assert report.best.recalls == pytest.approx((alone.dev.mean_recall,), abs=1e-9)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "best",
        "command.txt",
        "sweep.json",
        "trials.jsonl",
    ]
    assert (tmp_path / "out/command.txt").read_text() == f"{report.command}\n"
    assert f"--set optimizer.lr={report.best.values['optimizer.lr']}" in report.command


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
@pytest.mark.parametrize("halving", [False, True])
def test_a_sweep_that_is_broken_off_ends_as_one_that_was_not(
    sampler: Any,
    halving: bool,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = make_space(
        tmp_path,
        RATES + '"image.kind" = {choice = ["linear", "mlp"]}\n"image.width" = {int = [8, 9]}\n',
    )
    spec = SweepSpec(8, sampler, seeds=2, halving=halving, population=4, fit=CPU)
    whole = sweep(store, space=space, out=tmp_path / "whole", spec=spec)
    train = apecache.sweeps.halving.train_together
    calls = [0]

    def killed(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KeyboardInterrupt
        return train(*arguments, **keywords)

    monkeypatch.setattr(apecache.sweeps.halving, "train_together", killed)
    for _ in range(50):
        try:
            broken = sweep(store, space=space, out=tmp_path / "broken", spec=spec)
            break
        except KeyboardInterrupt:
            continue
    assert calls[0] >= 3
    assert broken.trials == whole.trials
    assert (tmp_path / "broken/trials.jsonl").read_bytes() == (
        tmp_path / "whole/trials.jsonl"
    ).read_bytes()
    assert sweep(store, space=space, out=tmp_path / "broken", spec=spec).trials == whole.trials


def test_a_population_goes_on_within_its_epochs(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after every third epoch that is saved; the epochs done in all are those of a
    whole sweep."""
    fit = replace(CPU, save_seconds=0.0)
    space = make_space(tmp_path)
    spec = SweepSpec(4, population=4, fit=fit)
    whole = sweep(store, space=space, out=tmp_path / "whole", spec=spec)
    save = apecache.sweeps.halving.save_checkpoint
    epochs = []

    def interrupted(*arguments: Any) -> None:
        save(*arguments)
        epochs.append(arguments[2]["members"][0]["epoch"])
        if len(epochs) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(apecache.sweeps.halving, "save_checkpoint", interrupted)
    broken = None
    while broken is None:
        try:
            broken = sweep(store, space=space, out=tmp_path / "broken", spec=spec)
        except KeyboardInterrupt:
            assert len(epochs) < 20
    assert epochs == list(range(1, 10))
    assert broken.trials == whole.trials


def test_halving_stops_two_thirds_twice_and_finds_the_same_kind_of_winner(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    space = make_space(tmp_path)
    whole = sweep(store, space=space, out=tmp_path / "whole", spec=SweepSpec(9, fit=CPU))
    halved = sweep(
        store,
        space=space,
        out=tmp_path / "halved",
        spec=SweepSpec(9, halving=True, fit=CPU),
    )
    assert sorted(t.epochs for t in halved.trials) == [1] * 6 + [3] * 2 + [9]
    assert [t.state for t in halved.trials].count("stopped") == 8
    same = next(t for t in whole.trials if t.number == halved.best.number)
    assert halved.best.state == "done"
    assert halved.best.recalls == pytest.approx(same.recalls, abs=1e-9)


@pytest.mark.parametrize(
    ("rungs", "epochs"),
    [(2, [3] * 6 + [9] * 3), (4, [1] * 6 + [1] * 2 + [9])],
)
def test_rungs_say_how_early_the_first_stop_is(
    rungs: int,
    epochs: list[int],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    spec = SweepSpec(9, halving=True, rungs=rungs, fit=CPU)
    found = sweep(store, space=make_space(tmp_path), out=tmp_path / "out", spec=spec)
    assert sorted(trial.epochs for trial in found.trials) == epochs


def test_trials_of_every_population_train_to_the_last_epoch(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    spec = SweepSpec(9, halving=True, rungs=2, population=2, fit=CPU)
    found = sweep(store, space=make_space(tmp_path), out=tmp_path / "out", spec=spec)
    # Three trials reach the last rung, in two populations.
    assert [trial.epochs for trial in found.trials if trial.state == "done"] == [9] * 3


def test_several_seeds_count_by_their_mean_with_an_interval(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = sweep(
        store,
        space=make_space(tmp_path),
        out=tmp_path / "out",
        spec=SweepSpec(2, seeds=3, fit=CPU),
    )
    for trial in report.trials:
        assert len(trial.recalls) == 3
        assert trial.mean == pytest.approx(np.mean(trial.recalls))
        estimate = estimate_from_recalls(trial.recalls, 24)
        assert (trial.low, trial.high) == pytest.approx((estimate.low, estimate.high))
        assert trial.low < trial.mean < trial.high
        assert trial.chance == pytest.approx(100 * (1 + 5 + 10) / 3 / 24)


def test_one_seed_has_the_interval_over_dev_images(store: FeatureStore, tmp_path: Path) -> None:
    (trial,) = sweep(
        store,
        space=make_space(tmp_path),
        out=tmp_path / "out",
        spec=SweepSpec(1, fit=CPU),
    ).trials
    assert trial.low is not None
    assert trial.high is not None
    assert trial.low < trial.mean < trial.high


def test_trials_of_older_versions_are_read(store: FeatureStore, tmp_path: Path) -> None:
    sweep(store, space=make_space(tmp_path), out=tmp_path / "out", spec=SweepSpec(1, fit=CPU))
    path = tmp_path / "out/trials.jsonl"
    line = json.loads(path.read_text())
    del line["chance"]
    path.write_text(json.dumps({**line, "low": None, "high": None}))
    assert read_trials(tmp_path / "out")[0].chance is None


def test_tpe_looks_where_trials_were_good(store: FeatureStore, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    report = sweep(
        store,
        space=make_space(tmp_path),
        out=tmp_path / "out",
        spec=SweepSpec(28, "tpe", population=7, fit=CPU),
    )
    rates = [float(t.values["optimizer.lr"]) for t in plain(report.trials)]
    assert np.mean(np.log(rates[14:])) > np.mean(np.log(rates[:14]))


def test_failing_trials_end_the_sweep_unless_it_keeps_going(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    text = '"optimizer.lr" = {choice = [0.02, 3e38]}\n"schedule.warmup" = {choice = [0.0]}\n'
    text += '"text.dim" = {choice = [8, 9]}\n'
    space = make_space(tmp_path, text)
    spec = SweepSpec(sampler="grid", fit=CPU)
    with pytest.raises(RecipeError, match=r"trial \d .*; or add --keep-going"):
        sweep(store, space=space, out=tmp_path / "out", spec=spec)
    report = sweep(store, space=space, out=tmp_path / "out", spec=replace(spec, keep_going=True))
    assert [t.state for t in report.trials] == ["done", "failed", "failed", "failed"]
    errors = " ".join(t.error for t in report.trials)
    assert "not finite" in errors
    assert "different widths" in errors


def test_heads_that_cannot_be_stacked_run_in_the_same_sweep(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    closed = tmp_path / "closed.toml"
    closed.write_text('name = "closed"\ninit = "cca"\nschedule.epochs = 0\n')
    line = f'"closed_form.ridge" = {{choice = [[0.1]], if = {{recipe = "{closed}"}}}}'
    space = make_space(tmp_path, line, (SMALL, str(closed)))
    report = sweep(
        store,
        space=space,
        out=tmp_path / "out",
        spec=SweepSpec(sampler="grid", fit=CPU),
    )
    assert {t.recipe for t in report.trials} == {SMALL, str(closed)}
    assert all(t.state == "done" and t.mean and t.mean > 20 for t in report.trials)
    recipe = json.loads((report.run / "recipe.json").read_text())
    assert Recipe.model_validate(recipe) == space.recipe(report.best.values)


def test_a_final_fit_that_was_broken_off_gives_way_to_a_better_trial(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    space = make_space(tmp_path)
    out = tmp_path / "out"
    spec = SweepSpec(2, fit=CPU)
    trials = sweep(store, space=space, out=out, spec=spec).trials
    # A checkpoint of the other trial's fit stands where the run of the best one will be.
    shutil.rmtree(out / "best")
    other = space.recipe(trials[-1].values)

    def stop(line: dict[str, Any]) -> None:
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(store, other, out / "best", replace(CPU, save_seconds=0.0), stop)
    assert not (out / "best/head.json").is_file()
    report = sweep(store, space=space, out=out, spec=spec)
    recorded = Recipe.model_validate_json((report.run / "recipe.json").read_text())
    assert recorded == space.recipe(report.best.values) != other


def test_what_changes_no_trial_is_no_other_sweep(store: FeatureStore, tmp_path: Path) -> None:
    space = make_space(tmp_path)
    sweep(store, space=space, out=tmp_path / "out", spec=SweepSpec(1, fit=CPU))
    priced = replace(CPU, price_per_hour=2.0)
    sweep(store, space=space, out=tmp_path / "out", spec=SweepSpec(1, fit=priced))


def test_another_sweep_or_a_foreign_folder_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    space = make_space(tmp_path)
    spec = SweepSpec(1, fit=CPU)
    sweep(store, space=space, out=tmp_path / "out", spec=spec)
    assert (
        len(sweep(store, space=space, out=tmp_path / "out", spec=replace(spec, n_trials=2)).trials)
        == 2
    )
    with pytest.raises(MismatchError, match="holds another sweep"):
        sweep(store, space=space, out=tmp_path / "out", spec=replace(spec, seeds=2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="is not a sweep"):
        sweep(store, space=space, out=tmp_path / "mine", spec=spec)
    with pytest.raises(OptionError, match="at least 1"):
        sweep(store, space=space, out=tmp_path / "out", spec=replace(spec, seeds=0))
    assert len(read_trials(tmp_path / "out")) == 2
