"""The search climbs its rungs, resumes, and keeps the simpler of two that do not differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_pairs import Planted

import apecache.auto.ladder as ladder
import apecache.auto.search_fits as search_fits
from apecache.auto.budget import open_state, parse_duration
from apecache.auto.ladder import AutoReport, AutoSpec, auto_heads
from apecache.errors import MismatchError, OptionError, RunError
from apecache.evaluate.comparison import METRICS
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.protocols import retrieval_hits
from apecache.report.auto_page import write_auto_page
from apecache.runs.heads import load_heads
from apecache.store.equal import equal_images
from apecache.train.batches import SplitSpec, choose_splits
from apecache.train.head_data import load_splits
from apecache.train.keep_list import read_keep_list

pytestmark = pytest.mark.usefixtures("one_thread")

RUNGS = [
    "features",
    "closed forms",
    "default",
    "sweep",
    "best trial again",
    "ensembles",
    "decision",
    "refit",
]
SPEC = AutoSpec(budget_seconds=0.01, splits=SplitSpec(dev="val"), device="cpu")


@pytest.fixture(scope="module")
def report(clean: Planted, tmp_path_factory: pytest.TempPathFactory) -> AutoReport:
    """A search whose budget is used up at once: every rung does the least."""
    return auto_heads(clean.store, tmp_path_factory.mktemp("search") / "out", SPEC)


def test_every_rung_says_what_it_tried_and_what_is_left(report: AutoReport) -> None:
    assert [rung.name for rung in report.rungs] == RUNGS
    assert all(rung.tried and rung.outcome for rung in report.rungs)
    assert report.rungs[-1].left_seconds == 0
    assert len(report.rungs[0].tried) == 3  # each image encoder, and both together
    assert report.rungs[2].outcome.startswith("projection, 2 seeds")
    assert report.rungs[3].outcome.startswith("4 trials")
    assert any(entry.startswith("gated as it is") for entry in report.rungs[3].tried)


def test_the_winner_is_an_ordinary_run(report: AutoReport, clean: Planted) -> None:
    assert report.run.name == "best"
    embedded = embed_store(load_heads(report.run), clean.store, "val")
    assert len(embedded.image) == 60
    assert report.commands
    assert "fit-head" in report.commands[0]
    assert (report.out / "command.txt").read_text().splitlines() == list(report.commands)


def test_nothing_trained_on_the_images_that_decide(report: AutoReport, clean: Planted) -> None:
    kept = read_keep_list(report.out / "without-confirm.tsv", clean.store.pairs)
    n_left_out = len({clean.store.pairs.image_rows[row] for row in (~kept).nonzero()[0]})
    assert n_left_out == report.n_confirm_images == 26
    for folder in (report.out / "members").iterdir():
        assert load_heads(folder).training["n_train_images"] == 260 - 26
    training = load_heads(report.run).training
    for single in training.get("combined", [training]):
        assert single["n_train_images"] == 260


def test_copies_of_an_image_are_kept_aside_together(write_store: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n_images = 120
    content = [f"file {row // 3}" for row in range(n_images)]  # three copies of each image
    store = write_store(
        tmp_path / "s",
        rng.normal(size=(n_images, 4)).astype(np.float32),
        rng.normal(size=(n_images, 4)).astype(np.float32),
        list(range(n_images)),
        ["train"] * n_images,
        image_content=content,
    )
    identity = {"image_features": ["pixels"], "text_features": ["words"]}
    state = open_state(tmp_path / "out", identity, 1.0)
    search = ladder._Search(store, AutoSpec(device="cpu"), state, lambda _: None)
    confirm = {content[row] for row in search.confirm.nonzero()[0]}
    trained = {content[row] for row in (~search.confirm & ~search.dev).nonzero()[0]}
    assert confirm
    assert not confirm & trained
    _, dev = load_splits(
        store,
        image=store.array("image"),
        text=store.array("text"),
        spec=SplitSpec(),
        device=torch.device("cpu"),
    )
    assert len(dev) == search.dev.sum()  # the images that the fits choose on
    content_ids = equal_images(store.array("image"))
    assert np.array_equal(search.dev, choose_splits(store.pairs, SplitSpec(), content_ids)[1])


def test_candidates_compete_from_simple_to_complex(report: AutoReport) -> None:
    names = [decision.candidate for decision in report.decisions]
    assert names[:3] == ["projection", "sweep", "2 seeds of projection"]
    assert {decision.level for decision in report.decisions} == {1 - 0.05 / len(names)}
    last = report.decisions[-1]
    assert report.chosen == (last.candidate if last.replaced else last.against)


def test_dev_images_are_candidates_of_the_decision_but_no_queries(
    report: AutoReport,
    clean: Planted,
) -> None:
    identity = json.loads((report.out / "auto.json").read_text())["identity"]
    state = open_state(report.out, identity, 1.0)
    search = ladder._Search(clean.store, SPEC, state, lambda _: None)
    run = report.out / "members" / "closed-procrustes"
    hits = search._hits([run])
    alone = embed_store(load_heads(run), clean.store, among=search.confirm)
    terms = METRICS["mean R@1"]
    easier = retrieval_hits(alone.image, alone.text, alone.image_of_text)
    assert hits.n_images == search.confirm.sum() == 26
    assert hits.value(terms) < easier.value(terms)


def test_the_seed_that_chose_a_trial_does_not_judge_it(report: AutoReport) -> None:
    seeds: dict[str, set[int]] = {"projection": set(), "trial": set()}
    for folder in (report.out / "members").iterdir():
        name = folder.name.split("-")[0]
        if name in seeds:
            seeds[name].add(load_heads(folder).training["seed"])
    assert seeds == {"projection": {0, 1}, "trial": {1, 2}}


def test_a_finished_search_is_read_again_and_fits_nothing(
    report: AutoReport,
    clean: Planted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(search_fits, "fit_head", refuse)
    again = auto_heads(clean.store, report.out, SPEC)
    assert again.chosen == report.chosen
    assert again.commands == report.commands


def test_an_interrupted_search_resumes(
    clean: Planted,
    report: AutoReport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = search_fits.fit_head
    n_fits = 0

    def fail_after_five(*args: object, **settings: object) -> object:
        nonlocal n_fits
        n_fits += 1
        if n_fits == 6:
            raise KeyboardInterrupt
        return fit(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(search_fits, "fit_head", fail_after_five)
    with pytest.raises(KeyboardInterrupt):
        auto_heads(clean.store, tmp_path / "out", SPEC)
    state = json.loads((tmp_path / "out" / "auto.json").read_text())
    assert state["spent_seconds"] > 0
    resumed = auto_heads(clean.store, tmp_path / "out", SPEC)
    assert resumed.chosen == report.chosen


def test_another_search_in_the_folder_is_refused(
    report: AutoReport,
    clean: Planted,
    planted: Planted,
    tmp_path: Path,
) -> None:
    with pytest.raises(MismatchError, match="another search"):
        auto_heads(planted.store, report.out, SPEC)
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="not a search"):
        auto_heads(clean.store, tmp_path, SPEC)
    (tmp_path / "auto.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        open_state(tmp_path, {}, 1.0)


def test_the_page_shows_rungs_and_decisions(report: AutoReport, tmp_path: Path) -> None:
    page = write_auto_page(report, tmp_path / "index.html").read_text()
    assert all(rung in page for rung in RUNGS)
    assert f"Search for the best heads: {report.chosen}" in page


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("30", 30)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1m", "0s", "soon", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="like 90s, 10m or 2h"):
        parse_duration(text)


def test_a_store_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        auto_heads(tmp_path, tmp_path / "out")  # type: ignore[arg-type]
