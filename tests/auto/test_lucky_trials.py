"""A whole search with made-up fits: luck with one seed does not win, a better recipe does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apecache.auto.ladder as ladder
import apecache.auto.search_fits as search_fits
from apecache.auto.ladder import AutoReport, AutoSpec, auto_heads
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.heads import load_heads, save_heads
from apecache.store.reader import FeatureStore
from apecache.sweeps.trials import Trial
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

N_IMAGES = 2400
DIM = 12
POOR = 1.0
USUAL = 0.6
GOOD = 0.2
"""Noise on the weights of a fit: the less, the better."""
BETTER = ("optimizer.lr=0.003",)


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(N_IMAGES, DIM))
    text = hidden + 0.3 * rng.normal(size=hidden.shape)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("lucky") / "s",
        hidden.astype(np.float32),
        text.astype(np.float32),
        list(range(N_IMAGES)),
        ["train"] * (N_IMAGES - 200) + ["val"] * 200,
    )
    return made


def searched(
    store: FeatureStore,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise_of_trial: dict[int, float],
) -> AutoReport:
    """Search where a fit's quality is set by its recipe and seed alone.

    Args:
        noise_of_trial: Noise of the best trial by seed; the sweep itself uses seed 0.
    """

    def noisy_fit(of: FeatureStore, recipe: Recipe, out: Path, spec: FitSpec) -> None:
        fit_head(of, recipe=load_recipe("procrustes"), out=out, spec=spec)
        noise = POOR
        if recipe.has_steps:
            is_trial = recipe.optimizer.lr == 0.003
            noise = noise_of_trial[spec.seed] if is_trial else USUAL
        generator = torch.Generator().manual_seed(spec.seed + 10 * len(out.name))
        heads = load_heads(out)
        with torch.no_grad():
            for parameter in heads.text.head.parameters():
                size = parameter.std()
                parameter += noise * size * torch.randn(parameter.shape, generator=generator)
        save_heads(heads, out)

    trial = Trial(
        number=7,
        recipe="projection",
        settings=BETTER,
        values={},
        state="done",
        mean=90.0,
    )
    monkeypatch.setattr(search_fits, "fit_head", noisy_fit)
    monkeypatch.setattr(ladder, "run_trials", lambda *_: (trial,))
    # Ensembles of made-up fits would win, and hide which trial is chosen.
    monkeypatch.setattr(ladder._Search, "_ensembles", lambda *_: [])
    spec = AutoSpec(budget_seconds=1e4, splits=SplitSpec(dev="val"), device="cpu")
    return auto_heads(store, out, spec)


def test_a_trial_that_was_lucky_with_its_seed_is_not_chosen(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lucky = {0: GOOD, 1: USUAL, 2: USUAL, 3: USUAL}
    report = searched(store, tmp_path / "out", monkeypatch, lucky)
    assert report.chosen == "projection"
    assert "other seeds" in report.rungs[4].outcome


def test_a_trial_that_is_better_with_every_seed_is_chosen(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    better = dict.fromkeys(range(4), GOOD)
    report = searched(store, tmp_path / "out", monkeypatch, better)
    assert report.chosen == "sweep"
    assert report.decisions[-1].difference.low > 0
    assert "optimizer.lr=0.003" in report.commands[0]
