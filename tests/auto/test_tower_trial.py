"""A short trial of the text tower: what trains, from where, for how long, and why there is none."""

import functools
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_pairs import Planted
from tiny import make_shapes, tree

from apecache.auto import tower_trial as module
from apecache.auto.fold_fit import fit_in_memory
from apecache.auto.forecast import ForecastReport, ForecastSpec, forecast
from apecache.auto.tower_trial import LEAST_STEPS, TowerTrial, try_tower
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower
from apecache.errors import ApecacheError, EncoderError, OptionError, RecipeError
from apecache.evaluate.comparison import METRICS
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_setup import PreparedFit, set_up
from apecache.train.fit import cloned_tensors
from apecache.train.head_data import load_splits
from apecache.train.model import evaluate_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["schedule.epochs=4", "schedule.batch_size=16"]
DEV = SplitSpec(dev="val")
FEATURES = {"image_features": "tiny-vit", "text_features": "tiny-bert"}
CURVE: dict[str, Any] = {"recipe": "cca", "shares": (0.9, 0.95, 1.0), "seeds": 1}


@pytest.fixture(scope="module")
def shapes_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 images with two captions each, 48 of them to train on."""
    return make_shapes(tmp_path_factory.mktemp("trial-shapes") / "shapes", copies=6)


def extracted(table: Path, folder: Path, image: Path, text: Path, *cuts: Any) -> FeatureStore:
    """A store with pooled features, and with other cuts of the text encoder."""
    image_spec = parse_encoder(f"timm:{image}", "image")
    text_spec = parse_encoder(f"hf:{text}", "text")
    texts = [text_spec, *(replace(text_spec, **cut) for cut in cuts)]
    spec = ExtractSpec(image_spec, texts, storage_dtype="float32", device="cpu")
    extract(open_pairs(table), folder, spec)
    return FeatureStore.open(folder)


@pytest.fixture(scope="module")
def captions(
    shapes_table: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> FeatureStore:
    """Pooled features alone."""
    folder = tmp_path_factory.mktemp("captions") / "store"
    return extracted(shapes_table, folder, tiny_image_encoder, tiny_text_encoder)


@pytest.fixture(scope="module")
def tokens(
    shapes_table: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> FeatureStore:
    """Beside pooled features CLS, the tokens before the last block, and those after it."""
    folder = tmp_path_factory.mktemp("tokens") / "store"
    token_cuts = ({"pooling": "tokens", "layer": 1}, {"pooling": "tokens", "layer": -1})
    cuts = ({"pooling": "cls"}, *token_cuts)
    return extracted(shapes_table, folder, tiny_image_encoder, tiny_text_encoder, *cuts)


def fitted(store: FeatureStore, name: str = "projection", text: str = "tiny-bert") -> Any:
    """Heads in memory, their recipe and their mean R@1 on dev."""
    return fitted_once(str(store.path), name, text)


@functools.cache
def fitted_once(path: str, name: str, text: str) -> Any:
    store = FeatureStore.open(path)
    recipe = load_recipe(name, [] if name != "projection" else SHORT)
    train, dev = load_splits(
        store,
        image=store.array("image", "tiny-vit"),
        text=store.array("text", text),
        spec=DEV,
        device=torch.device("cpu"),
    )
    model = fit_in_memory(recipe, train=train, dev=dev).model
    return model, recipe, evaluate_model(model, dev).mean_recall_at_1


def tried(
    store: FeatureStore,
    name: str = "projection",
    text: str = "tiny-bert",
    **settings: Any,
) -> TowerTrial:
    model, recipe, _ = fitted(store, name, text)
    features = {**FEATURES, "text_features": text}
    spec = FitEncoderSpec(**features, splits=DEV, device="cpu")
    options = {"n_epochs": 80, "limit_seconds": 60.0, **settings}
    return try_tower(store, model=model, recipe=recipe, spec=spec, **options)


def recall(hits: RetrievalHits) -> float:
    return hits.value(METRICS["mean R@1"])


class Watch:
    """Keeps the trial that was set up, and its weights before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.setups: list[PreparedFit] = []
        self.before: dict[str, torch.Tensor] = {}

        def watched(*arguments: Any, **keywords: Any) -> PreparedFit:
            setup = set_up(*arguments, **keywords)
            self.setups.append(setup)
            self.before = cloned_tensors(dict(setup.model.named_parameters()))
            return setup

        monkeypatch.setattr(module, "set_up", watched)

    def changed(self) -> set[str]:
        parameters = self.setups[-1].model.named_parameters()
        return {name for name, p in parameters if not torch.equal(p, self.before[name])}


def blocks_of(names: set[str]) -> set[str]:
    """Numbers of the text tower's blocks among parameters, and what else of the tower there is."""
    of_tower = [name.split("layer.") for name in names if name.startswith("text.tower")]
    return {parts[-1].split(".")[0] for parts in of_tower}


# --- what trains ----------------------------------------------------------------------------------


def test_the_block_above_cached_tokens_trains_and_no_caption_is_read(
    tokens: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    monkeypatch.setattr(Tower, "embed", None)
    lines: list[str] = []
    trial = tried(tokens, announce=lines.append)
    assert trial.n_blocks == 1
    assert blocks_of(watch.changed()) == {"1"}
    assert {"image.head.body.weight", "text.head.body.weight"} <= watch.changed()
    assert recall(trial.after) != recall(trial.before)
    assert trial.n_steps == 80
    assert trial.n_epoch_steps == 1
    (line,) = lines
    assert "80 steps from tiny-bert-tokens-layer1, about" in line


def test_without_tokens_the_last_two_blocks_train_from_the_captions(
    captions: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    lines: list[str] = []
    trial = tried(captions, announce=lines.append)
    assert trial.n_blocks == 2
    assert blocks_of(watch.changed()) == {"0", "1"}
    assert "from the captions" in lines[0]


def test_tokens_of_other_inputs_than_the_heads_are_not_used(
    shapes_table: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    cut = {"pooling": "tokens", "layer": 1, "max_tokens": 8}
    store = extracted(shapes_table, tmp_path / "s", tiny_image_encoder, tiny_text_encoder, cut)
    lines: list[str] = []
    tried(store, n_epochs=1, announce=lines.append)
    assert "from the captions" in lines[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("projection", "tiny-bert"),
        ("projection", "tiny-bert-cls"),
        ("cca", "tiny-bert"),
        ("ridge", "tiny-bert"),
    ],
)
def test_it_begins_where_the_heads_ended(tokens: FeatureStore, name: str, text: str) -> None:
    lines: list[str] = []
    trial = tried(tokens, name, text=text, n_epochs=1, announce=lines.append)
    assert "from tiny-bert-tokens-layer1" in lines[0]
    assert recall(trial.before) == pytest.approx(fitted(tokens, name, text)[2])
    assert trial.before.n_images == trial.after.n_images == 24


def test_timing_changes_neither_weights_nor_draws(
    tokens: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = Watch(monkeypatch)
    first = tried(tokens, n_epochs=3)
    timed_weights = cloned_tensors(timed.setups[-1].model.kept_state())
    monkeypatch.setattr(module, "_seconds_of_step", lambda *_: 0.01)
    untimed = Watch(monkeypatch)
    second = tried(tokens, n_epochs=3)
    weights = untimed.setups[-1].model.kept_state()
    assert all(torch.equal(tensor, timed_weights[name]) for name, tensor in weights.items())
    assert recall(first.after) == recall(second.after)


# --- time -----------------------------------------------------------------------------------------


def test_a_plan_beyond_the_limit_is_shortened_and_said(
    tokens: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_seconds_of_step", lambda *_: 1.0)
    lines: list[str] = []
    trial = tried(tokens, limit_seconds=LEAST_STEPS + 5, announce=lines.append)
    assert trial.n_steps == LEAST_STEPS + 5
    assert f"{LEAST_STEPS + 5} of 80 steps" in lines[0]
    with pytest.raises(RecipeError, match="10 s allow 10 of 80 steps, and at least 50 are needed"):
        tried(tokens, limit_seconds=10)
    # As many as are planned are enough.
    assert tried(tokens, n_epochs=3, limit_seconds=10).n_steps == 3


def test_slow_steps_end_at_the_limit(
    tokens: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_seconds_of_step", lambda *_: 1e-6)
    begin = time.perf_counter()
    trial = tried(tokens, n_epochs=100_000, limit_seconds=0.5)
    assert 0 < trial.n_steps < 50_000
    assert time.perf_counter() - begin < 30


# --- what is left behind --------------------------------------------------------------------------


def test_nothing_is_left_behind(
    tokens: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = tree(Path(tokens.path))
    tried(tokens, n_epochs=1)
    assert not list(tmp_path.iterdir())

    def interrupted(*_: Any, **__: Any) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "set_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(tokens)
    assert not list(tmp_path.iterdir())
    assert tree(Path(tokens.path)) == before


# --- forecasts with a trial -----------------------------------------------------------------------


def measured(store: FeatureStore, out: Path, lines: list[str], **settings: Any) -> ForecastReport:
    spec = ForecastSpec(**{**CURVE, **FEATURES, "splits": DEV, "device": "cpu", **settings})
    return forecast(store, out, spec, announce=lines.append)


def test_a_forecast_has_the_paired_gain_of_a_trained_tower(
    tokens: FeatureStore,
    tmp_path: Path,
) -> None:
    lines: list[str] = []
    report = measured(tokens, tmp_path, lines, tower_seconds=60.0, tower_epochs=80)
    gain = report.gains[-1]
    assert gain.change == "text tower trained, last 1 block"
    assert gain.baseline == pytest.approx(report.curve[-1].recalls[0])
    assert gain.recall != gain.baseline
    assert gain.paired_low is not None
    assert gain.paired_high is not None
    assert gain.paired_low < gain.recall - gain.baseline < gain.paired_high
    assert "80 steps of 1 in an epoch" in gain.note
    assert "a short trial" in gain.note
    assert len(lines) == 1
    assert not report.no_tower


def test_a_curve_without_all_images_gets_heads_of_its_own(
    tokens: FeatureStore,
    tmp_path: Path,
) -> None:
    whole = measured(tokens, tmp_path, [], tower_seconds=60.0)
    partial = measured(tokens, tmp_path, [], tower_seconds=60.0, shares=(0.9, 0.94, 0.98))
    assert partial.gains[-1].baseline == pytest.approx(whole.gains[-1].baseline)


def test_an_encoder_that_is_gone_is_a_reason_and_no_error(
    shapes_table: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    encoder = Path(shutil.copytree(tiny_text_encoder, tmp_path / "tiny-bert"))
    store = extracted(shapes_table, tmp_path / "s", tiny_image_encoder, encoder)
    shutil.rmtree(encoder)
    lines: list[str] = []
    report = measured(store, tmp_path / "out", lines, tower_seconds=60.0)
    assert str(encoder) in report.no_tower
    assert not lines
    assert [gain.change for gain in report.gains] == ["only 1 caption of each image"]
    with pytest.raises(EncoderError):
        tried(store)


def test_what_has_no_tower_to_train_says_why(
    tokens: FeatureStore,
    clean: Planted,
    tmp_path: Path,
) -> None:
    """The planted store names an encoder that does not exist."""

    def reason(store: FeatureStore, **settings: Any) -> str:
        return measured(store, tmp_path, [], tower_seconds=60.0, **settings).no_tower

    eye = {"image_features": "eye0", "text_features": "words", "shares": (0.3, 0.5, 1)}
    assert "hf:words cannot be opened" in reason(clean.store, **eye)
    assert "canonical" in reason(tokens, recipe="csa")
    with pytest.raises(RecipeError, match="kind gated cannot take up its standardization"):
        tried(tokens, "gated")
    imported = FeatureStore.from_arrays(
        tokens.array("image", "tiny-vit").load(),
        tokens.array("text", "tiny-bert").load(),
        pairs=tokens.pairs.image_rows,
        names=("tiny-vit", "tiny-bert"),
    )
    spec = FitEncoderSpec(**FEATURES, device="cpu")
    model, recipe, _ = fitted(tokens)
    with pytest.raises(RecipeError, match="imported without their encoder"):
        try_tower(imported, model, recipe, spec=spec, n_epochs=1, limit_seconds=1)
    for name, words in (
        ("tiny-bert,tiny-bert-cls", "joins several"),
        ("tiny-bert-tokens-layer1", "no pooled output"),
    ):
        spec = FitEncoderSpec(image_features="tiny-vit", text_features=name, device="cpu")
        with pytest.raises(ApecacheError, match=words):
            try_tower(tokens, model, recipe, spec=spec, n_epochs=1, limit_seconds=1)


def test_settings_that_make_no_trial_are_refused(tokens: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="tower_epochs"):
        measured(tokens, tmp_path, [], tower_seconds=1.0, tower_epochs=0)
    with pytest.raises(OptionError, match="tower_seconds"):
        measured(tokens, tmp_path, [], tower_seconds=0.0)
