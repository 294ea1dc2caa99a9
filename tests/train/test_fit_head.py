"""The head trainer on features made for the purpose: what it learns, reads, writes, and never
deletes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from recipes import SMALL

from apecache.errors import (
    DataError,
    IncompleteError,
    OptionError,
    RecipeError,
    RunError,
    StoreError,
)
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import Recipe, count_parameters, load_recipe, zoo_names
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.folder import read_history
from apecache.runs.heads import WEIGHTS, load_heads, save_heads
from apecache.storage.replace import scratch_of
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import FitReport, fit_head, untrained_heads
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.paired_rows import Features as Loaded

pytestmark = pytest.mark.usefixtures("one_thread")

N_TRAIN = 160
N_DEV = 32
N_VAL = 24
SPLITS = ["train"] * N_TRAIN + ["dev"] * N_DEV + ["val"] * N_VAL
N_IMAGES = len(SPLITS)
IMAGE_ROWS = [image for image in range(N_IMAGES) for _ in range(1 + image % 3)]
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")
Features = tuple[NDArray[np.float32], NDArray[np.float32]]


def planted_features(seed: int = 0, aligned: bool = True) -> Features:
    """Images [216, 12] and captions [431, 10]: two linear views of 6 hidden numbers per image, and
    a little noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(N_IMAGES, 6))
    image = hidden @ rng.normal(size=(6, 12)) + 0.1 * rng.normal(size=(N_IMAGES, 12))
    owners = IMAGE_ROWS if aligned else rng.permutation(IMAGE_ROWS)
    text = hidden[owners] @ rng.normal(size=(6, 10)) + 0.1 * rng.normal(size=(len(IMAGE_ROWS), 10))
    return image.astype(np.float32), text.astype(np.float32)


def make_recipe(*settings: str, name: str = SMALL) -> Recipe:
    """The small recipe of these tests, or one of the zoo made short."""
    short = ["schedule.epochs=6", "schedule.batch_size=32", "optimizer.lr=0.02"]
    return load_recipe(name, [*short, *settings])


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("planted") / "s",
        *planted_features(),
        IMAGE_ROWS,
        SPLITS,
    )
    return made


@pytest.fixture(scope="module")
def shuffled(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The same images, with captions that describe other ones."""
    features = planted_features(aligned=False)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("shuffled") / "s",
        *features,
        IMAGE_ROWS,
        SPLITS,
    )
    return made


@pytest.fixture(scope="module")
def fitted(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    """A finished run on the planted store; for tests that only read it."""
    return fit_head(
        store,
        recipe=make_recipe(),
        out=tmp_path_factory.mktemp("runs") / "run",
        spec=CPU,
    )


def weights(run: Path) -> bytes:
    return (run / "head.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- it learns ------------------------------------------------------------------------------------


def test_the_loss_falls_and_planted_pairs_are_found_far_above_chance(fitted: FitReport) -> None:
    losses = [line["loss"] for line in read_history(fitted.run)][1:]
    assert losses[-1] < 0.5 * losses[0]
    chance = sum(fitted.dev.chance_text_to_image.values()) + sum(
        fitted.dev.chance_image_to_text.values()
    )
    assert fitted.dev.mean_recall > 3 * chance / 6
    assert fitted.dev.text_to_image[1] > 10 * fitted.dev.chance_text_to_image[1]
    assert fitted.dev.mean_recall > fitted.untrained.mean_recall + 20


def test_what_was_learned_holds_on_the_split_that_was_never_read(
    store: FeatureStore,
    fitted: FitReport,
) -> None:
    embedded = embed_store(load_heads(fitted.run), store, "val")
    report = retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    assert report.n_images == N_VAL
    assert report.text_to_image[1] > 10 * report.chance_text_to_image[1]


def test_captions_that_belong_to_other_images_teach_nothing(
    shuffled: FeatureStore,
    tmp_path: Path,
) -> None:
    """The control of the tests above: if pairs came from anywhere but the table, this would learn
    as well."""
    report = fit_head(shuffled, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    assert report.dev.text_to_image[1] < 5 * report.dev.chance_text_to_image[1]


# `identity` takes both sides of one model: tests/encoders/test_pairs.py.
@pytest.mark.parametrize("name", [name for name in zoo_names() if name != "identity"])
def test_every_recipe_of_the_zoo_fits_real_features(
    name: str,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    spec = FitSpec(splits=SplitSpec(dev="val"), device="cpu")
    recipe = load_recipe(name, ["schedule.batch_size=4"])
    if recipe.schedule.epochs:
        recipe = load_recipe(name, ["schedule.epochs=2", "schedule.batch_size=4"])
    if recipe.cut == "tokens":
        with pytest.raises(
            RecipeError,
            match="needs tokens, but the image features are pooled; extract tokens",
        ):
            fit_head(FeatureStore.open(tiny_store), recipe=recipe, out=tmp_path / "run", spec=spec)
        return
    store = FeatureStore.open(tiny_store)
    report = fit_head(store, recipe=recipe, out=tmp_path / "run", spec=spec)
    assert (report.n_train_images, report.n_dev_images) == (8, 4)
    assert report.n_trained_parameters == count_parameters(
        recipe,
        store.array("image").dim,
        store.array("text").dim,
    )
    heads = load_heads(tmp_path / "run")
    assert heads.training["recipe"]["name"] == name
    embedded = embed_store(heads, store, "val")
    assert (
        retrieval_report(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )
        == report.dev
    )
    assert (
        heads.training["n_negatives"]
        == report.n_negatives
        == (0 if not recipe.schedule.epochs else report.n_negatives)
    )


@pytest.mark.parametrize("name", ["deep-adapter", "freeze-align", "token-anchors"])
def test_recipes_on_tokens_fit_tokens_of_different_lengths(
    name: str,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each pooled feature as several tokens, most of them noise or padding that holds NaN."""

    def load_tokens(
        array: FeatureArray,
        rows_of_splits: Sequence[NDArray[np.int64]],
        device: torch.device,
    ) -> list[Loaded]:
        pooled = torch.from_numpy(array.load())
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(len(pooled), 4, pooled.shape[1], generator=generator)
        tokens[:, :2] = pooled.unsqueeze(1)
        lengths = torch.randint(2, 5, (len(pooled),), generator=generator)
        every_row = Loaded(
            tokens.masked_fill((torch.arange(4) >= lengths.unsqueeze(1)).unsqueeze(-1), torch.nan),
            lengths,
        )
        return [every_row.select(rows) for rows in rows_of_splits]

    monkeypatch.setattr("apecache.train.head_data.load_rows", load_tokens)
    settings = [
        "optimizer.lr=0.01",
        "augmentation.token_dropout=0.1",
        "image.n_heads=2",
        "text.n_heads=2",
    ]
    report = fit_head(
        store,
        recipe=make_recipe(*settings, name=name),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert report.dev.text_to_image[1] > 5 * report.dev.chance_text_to_image[1]
    assert load_heads(tmp_path / "run").image.head.spec.cut == "tokens"


@pytest.mark.parametrize("name", ["ridge", "procrustes", "cca", "csa", "asif"])
def test_closed_forms_find_planted_pairs_without_a_step(
    name: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(store, recipe=load_recipe(name), out=tmp_path / "run", spec=CPU)
    assert report.dev.text_to_image[5] > 3 * report.dev.chance_text_to_image[5]
    assert (report.best_epoch, report.n_epochs, report.n_trained_parameters) == (0, 0, 0)
    assert report.untrained == report.dev
    heads = load_heads(tmp_path / "run")
    embedded = embed_store(heads, store, "val")
    found = retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    assert found.text_to_image[5] > 3 * found.chance_text_to_image[5]
    if name == "csa":
        assert set(heads.training["closed_form"]) == {"ridge", "rank", "power"}


def test_what_a_closed_form_leaves_open_is_chosen_on_dev(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    """Every candidate by itself: the one that was chosen is the best of them."""
    alone = []
    for number, (ridge, rank) in enumerate((r, k) for r in (0.01, 30.0) for k in (1, 6)):
        settings = [f"closed_form.ridge=[{ridge}]", f"closed_form.rank=[{rank}]"]
        alone.append(
            fit_head(
                store,
                recipe=load_recipe("cca", settings),
                out=tmp_path / str(number),
                spec=CPU,
            ).dev.mean_recall
        )
    settings = ["closed_form.ridge=[0.01, 30.0]", "closed_form.rank=[1, 6]"]
    assert fit_head(
        store,
        recipe=load_recipe("cca", settings),
        out=tmp_path / "all",
        spec=CPU,
    ).dev.mean_recall == max(alone)
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    "settings",
    [
        ("init=cca", "image.dim=6", "text.dim=6"),
        (
            "init=cca",
            "image.kind=mlp",
            "text.kind=gated",
            "image.skip=true",
            "text.skip=true",
            "image.dim=6",
            "text.dim=6",
        ),
        ("init=ridge", "image={kind='identity'}", "text={kind='mlp', skip=true, width=16}"),
        ("init=procrustes", "image={kind='identity'}", "text={kind='linear'}"),
    ],
    ids=["linear", "beside a body", "ridge beside a body", "procrustes"],
)
def test_a_fit_can_begin_with_a_closed_form(
    settings: tuple[str, ...],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(
        store,
        recipe=make_recipe(*settings, "optimizer.lr=1e-3"),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert report.untrained.text_to_image[5] > 3 * report.untrained.chance_text_to_image[5]
    assert report.dev.mean_recall > 0.9 * report.untrained.mean_recall
    losses = [line["loss"] for line in read_history(tmp_path / "run")][1:]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("init=cca", "image.dim=11", "text.dim=11"), "cca gives at most 10 dimensions; dim is 11"),
        (
            ("init=cca", "image.kind=identity"),
            "init cca needs both heads on pooled features, linear or with skip",
        ),
        (("init=ridge",), "init ridge needs image.kind identity, and text on pooled features"),
    ],
)
def test_heads_that_cannot_begin_with_a_closed_form_are_refused(
    settings: tuple[str, ...],
    message: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        fit_head(store, recipe=make_recipe(*settings), out=tmp_path / "run", spec=CPU)


@pytest.mark.parametrize(
    "settings",
    [(), ("image.kind=identity", "text.kind=mlp", "text.width=32", "text.dim=12")],
)
def test_a_linear_pair_and_an_mlp_both_learn_the_planted_pairs(
    settings: tuple[str, ...],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(store, recipe=make_recipe(*settings), out=tmp_path / "run", spec=CPU)
    assert report.dev.text_to_image[1] > 5 * report.dev.chance_text_to_image[1]


# --- the same again -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_bit_by_bit(
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    recipe = make_recipe("augmentation.noise=0.1", "image.input_dropout=0.1")
    for name in ("one", "two"):
        torch.rand(7)  # whatever the program drew before does not matter
        fit_head(store, recipe=recipe, out=tmp_path / name, spec=CPU)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    assert weights(tmp_path / "one") != weights(fitted.run)


def timeless(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_history(run)
    ]


@pytest.mark.parametrize(
    "settings",
    [(), ("augmentation.noise=0.3",), ("text.input_dropout=0.3",)],
    ids=["plain", "noise", "dropout"],
)
def test_another_seed_gives_other_weights(
    settings: tuple[str, ...],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    recipe = make_recipe("schedule.epochs=1", *settings)
    for seed in (0, 1):
        fit_head(store, recipe=recipe, out=tmp_path / str(seed), spec=replace(CPU, seed=seed))
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_the_seed_decides_the_batches_too(write_store: Any, tmp_path: Path) -> None:
    """Seen without any weights: two identity heads, so that only the batches can differ."""
    image, text = planted_features()
    store = write_store(tmp_path / "s", image[:, :10].copy(), text, IMAGE_ROWS, SPLITS)
    recipe = make_recipe("image.kind=identity", "text.kind=identity", "schedule.epochs=1")
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        fit_head(store, recipe=recipe, out=tmp_path / str(number), spec=replace(CPU, seed=seed))
        losses.append([line["loss"] for line in read_history(tmp_path / str(number))][1])
    assert losses[0] == losses[1] != losses[2]


def test_the_programs_own_random_numbers_are_left_alone(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fit_head(
        store,
        recipe=make_recipe("schedule.epochs=1", "augmentation.noise=0.1"),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert torch.equal(torch.rand(3), wanted)


# --- which epoch, by which split ------------------------------------------------------------------


def test_the_history_is_one_line_of_json_per_epoch_from_the_untrained_head_on(
    fitted: FitReport,
) -> None:
    raw = (fitted.run / "history.jsonl").read_text(encoding="utf-8").split("\n")
    assert raw.pop() == ""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in raw]
    assert [line["epoch"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines] == [epoch * (N_TRAIN // 32) for epoch in range(7)]
    assert lines[0]["loss"] is None
    assert lines[0]["dev"]["mean_recall"] == fitted.untrained.mean_recall
    assert lines[0]["temperature"] == pytest.approx(0.07)
    for line in lines:
        recalls = [*line["dev"]["image_to_text"].values(), *line["dev"]["text_to_image"].values()]
        assert len(recalls) == 6
        assert line["dev"]["mean_recall"] == pytest.approx(sum(recalls) / 6)
        assert line["seconds"] >= 0
    assert lines == list(read_history(fitted.run))


def test_progress_sees_every_line_of_the_history(store: FeatureStore, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU, progress=seen.append)
    assert seen == list(read_history(tmp_path / "run"))


def test_the_best_epoch_on_dev_is_kept_even_if_later_ones_are_worse(
    shuffled: FeatureStore,
    tmp_path: Path,
) -> None:
    """Where nothing can be learned, dev goes up and down by chance, and the last epoch is not the
    best."""
    report = fit_head(
        shuffled,
        recipe=make_recipe("schedule.epochs=10"),
        out=tmp_path / "run",
        spec=CPU,
    )
    recalls = [line["dev"]["mean_recall"] for line in read_history(tmp_path / "run")][1:]
    assert report.best_epoch == 1 + recalls.index(max(recalls))
    assert recalls[-1] < report.dev.mean_recall == max(recalls)
    embedded = embed_store(load_heads(tmp_path / "run"), shuffled, "dev")
    assert (
        retrieval_report(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )
        == report.dev
    )


def test_the_untrained_head_is_reported_and_never_kept(store: FeatureStore, tmp_path: Path) -> None:
    report = fit_head(
        store,
        recipe=make_recipe("optimizer.lr=1e-30", "schedule.epochs=2"),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert report.dev.mean_recall == report.untrained.mean_recall
    assert report.best_epoch == 1


def test_untrained_heads_are_those_of_epoch_zero(store: FeatureStore, fitted: FitReport) -> None:
    embedded = embed_store(untrained_heads(store, make_recipe(), CPU), store, "dev")
    found = retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    assert found == fitted.untrained


@pytest.mark.parametrize("value", [1e30, -3.0], ids=["huge", "plausible"])
def test_the_split_that_will_be_reported_has_no_influence_at_all(
    value: float,
    fitted: FitReport,
    write_store: Any,
    tmp_path: Path,
) -> None:
    image, text = planted_features()
    image[np.array(SPLITS) == "val"] = value
    text[[SPLITS[row] == "val" for row in IMAGE_ROWS]] = -value
    poisoned = write_store(tmp_path / "s", image, text, IMAGE_ROWS, SPLITS)
    fit_head(poisoned, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    assert weights(tmp_path / "run") == weights(fitted.run)
    assert timeless(tmp_path / "run") == timeless(fitted.run)


def test_the_dev_split_chooses_and_never_trains(
    fitted: FitReport,
    write_store: Any,
    tmp_path: Path,
) -> None:
    image, text = planted_features()
    text[[SPLITS[row] == "dev" for row in IMAGE_ROWS]] = 3.0
    poisoned = write_store(tmp_path / "s", image, text, IMAGE_ROWS, SPLITS)
    fit_head(poisoned, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    lines = timeless(tmp_path / "run")
    usual = timeless(fitted.run)
    assert [line["loss"] for line in lines] == [line["loss"] for line in usual]
    assert [line["dev"] for line in lines] != [line["dev"] for line in usual]


def test_statistics_of_the_head_are_those_of_the_training_images(
    store: FeatureStore,
    fitted: FitReport,
) -> None:
    image, text = planted_features()
    heads = load_heads(fitted.run)
    train = np.array(SPLITS) == "train"
    np.testing.assert_allclose(heads.image.head.mean, image[train].mean(0), atol=1e-5)
    np.testing.assert_allclose(heads.image.head.deviation, image[train].std(0), rtol=1e-4)
    np.testing.assert_allclose(heads.text.head.mean, text[train[IMAGE_ROWS]].mean(0), atol=1e-5)


def test_quarantined_rows_take_no_part(write_store: Any, tmp_path: Path) -> None:
    features = planted_features()
    lone = next(i for i in range(N_TRAIN) if i % 3 == 0 and i > 9)  # its only caption is bad
    bad_texts = (0, IMAGE_ROWS.index(lone))
    bad = {"bad_images": (4, 5, N_TRAIN), "bad_texts": bad_texts}
    store = write_store(tmp_path / "s", *features, IMAGE_ROWS, SPLITS, **bad)
    report = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    assert (
        report.n_train_images == N_TRAIN - 4
    )  # images 4, 5, the lone one, and image 0 with its only caption
    assert report.n_dev_images == N_DEV - 1
    assert np.isfinite([line["loss"] for line in read_history(report.run)][1:]).all()


# --- what a recipe's settings do ------------------------------------------------------------------


def temperatures(run: Path) -> list[float]:
    return [line["temperature"] for line in read_history(run)]


def test_the_temperature_is_learned_and_saved_as_the_scale(fitted: FitReport) -> None:
    learned = temperatures(fitted.run)
    assert len(set(learned)) == len(learned)
    assert load_heads(fitted.run).scale == pytest.approx(1 / learned[fitted.best_epoch], rel=1e-6)


def test_a_fixed_temperature_stays(store: FeatureStore, tmp_path: Path) -> None:
    fit_head(
        store,
        recipe=make_recipe("loss.learnable=false", "loss.temperature=0.2"),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert temperatures(tmp_path / "run") == pytest.approx([0.2] * 7)


def test_the_temperature_never_leaves_its_bounds(store: FeatureStore, tmp_path: Path) -> None:
    bounds = ["loss.temperature=0.07", "loss.min_temperature=0.065", "loss.max_temperature=0.075"]
    fit_head(store, recipe=make_recipe("optimizer.lr=0.5", *bounds), out=tmp_path / "run", spec=CPU)
    found = temperatures(tmp_path / "run")
    assert all(0.065 - 1e-6 <= value <= 0.075 + 1e-6 for value in found)
    assert any(
        value == pytest.approx(bound, abs=1e-6) for value in found for bound in (0.065, 0.075)
    )


def test_the_last_rate_of_each_epoch_follows_the_schedule(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    fit_head(
        store,
        recipe=make_recipe("schedule.warmup=0.5", "schedule.final=0.1"),
        out=tmp_path / "run",
        spec=CPU,
    )
    rates = [line["lr"] / 0.02 for line in read_history(tmp_path / "run")]
    steps = [step - 1 for step in range(5, 31, 5)]  # 5 steps an epoch, 15 of them warm-up
    falling = [0.1 + 0.9 * (1 + np.cos(np.pi * (step - 15) / 15)) / 2 for step in steps[3:]]
    assert rates == pytest.approx([0, 5 / 15, 10 / 15, 1, *falling])


def test_clipping_holds_the_gradient_back(store: FeatureStore, tmp_path: Path) -> None:
    """With an eps far above the clipped gradient, Adam's steps are as small as the gradient is."""
    settings = ["optimizer.eps=1e-3", "schedule.epochs=1", "optimizer.weight_decay=0"]
    losses = []
    for name, clip in (("free", 0.0), ("held", 1e-9)):
        fit_head(
            store,
            recipe=make_recipe(*settings, f"optimizer.clip={clip}"),
            out=tmp_path / name,
            spec=CPU,
        )
        losses.append(json.loads((tmp_path / name / "history.jsonl").read_text().splitlines()[1]))
    untrained = make_recipe(*settings)
    before = untrained_heads(store, untrained, CPU).text.head.state_dict()["body.weight"]
    after = {
        name: load_heads(tmp_path / name).text.head.state_dict()["body.weight"]
        for name in ("free", "held")
    }
    assert (after["held"] - before).abs().max() < 1e-4
    assert (after["free"] - before).abs().max() > 1e-2


def test_noise_is_measured_in_each_features_own_deviation(write_store: Any, tmp_path: Path) -> None:
    """Features a thousand times as large give the same training, noise included."""
    losses = []
    for name, factor in (("small", np.float32(1)), ("large", np.float32(1024))):
        image, text = planted_features()
        scaled = write_store(tmp_path / name, image * factor, text * factor, IMAGE_ROWS, SPLITS)
        fit_head(
            scaled,
            recipe=make_recipe("augmentation.noise=0.5", "schedule.epochs=2"),
            out=tmp_path / f"run-{name}",
            spec=CPU,
        )
        losses.append([line["loss"] for line in read_history(tmp_path / f"run-{name}")][1:])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_noise_makes_training_harder_and_leaves_evaluation_alone(
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    noisy = fit_head(
        store,
        recipe=make_recipe("augmentation.noise=1.0"),
        out=tmp_path / "run",
        spec=CPU,
    )
    first, second = (
        [line["loss"] for line in read_history(run)] for run in (fitted.run, noisy.run)
    )
    assert second[-1] > first[-1] + 0.2
    assert noisy.untrained == fitted.untrained


def test_dropout_is_on_in_training_and_off_on_dev(
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    report = fit_head(
        store,
        recipe=make_recipe("text.input_dropout=0.5"),
        out=tmp_path / "run",
        spec=CPU,
    )
    dropped = list(read_history(tmp_path / "run"))
    plain = list(read_history(fitted.run))
    assert all(a["loss"] > b["loss"] + 0.1 for a, b in zip(dropped[1:], plain[1:], strict=True))
    assert report.untrained == fitted.untrained


@pytest.mark.parametrize(("batch_size", "n_steps"), [(32, 5), (50, 3), (160, 1), (1024, 1)])
def test_an_epoch_has_as_many_steps_as_whole_batches(
    batch_size: int,
    n_steps: int,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    fit_head(
        store,
        recipe=make_recipe(f"schedule.batch_size={batch_size}", "schedule.epochs=2"),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert [line["step"] for line in read_history(tmp_path / "run")] == [0, n_steps, 2 * n_steps]


LEARNS = {
    "adam": ["optimizer.kind=adam", "optimizer.weight_decay=1e-4"],
    "lion": [
        "optimizer.kind=lion",
        "optimizer.lr=0.01",
        "optimizer.betas=[0.9, 0.99]",
        "schedule.epochs=12",
    ],
    "sgd": [
        "optimizer.kind=sgd",
        "optimizer.lr=100.0",
        "optimizer.weight_decay=0",
        "optimizer.clip=0.05",
        "schedule.epochs=30",
    ],
    "average": ["optimizer.ema=0.8", "schedule.decay=constant"],
    "sigmoid": ["loss.kind=sigmoid", "loss.temperature=0.05"],
    "several captions": ["loss.captions=3"],
    "mixup": ["augmentation.mixup=1.0", "schedule.epochs=12"],
    "structure": ["loss.structure=1.0", "loss.structure_warmup=10"],
    "accumulation": ["schedule.accumulate=2", "schedule.epochs=10"],
    "several": [
        "image={kind='ensemble', parts=[{dim=8}, {kind='identity'}]}",
        "text={kind='ensemble', parts=[{}, {kind='mlp', width=16}]}",
    ],
}


@pytest.mark.parametrize("name", LEARNS)
def test_every_way_of_training_learns_the_planted_pairs(
    name: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(store, recipe=make_recipe(*LEARNS[name]), out=tmp_path / "run", spec=CPU)
    assert report.dev.text_to_image[1] > 5 * report.dev.chance_text_to_image[1]


@pytest.mark.parametrize(
    ("settings", "steps", "negatives"),
    [
        (["schedule.accumulate=2"], [0, 2, 4], 31),  # of 5 batches 4 are used
        (["schedule.accumulate=99"], [0, 1, 2], 31),
        (["schedule.steps=7"], [0, 5, 7], 31),
        (["schedule.batch_size=500"], [0, 1, 2], 159),
        (["augmentation.mixup=1"], [0, 5, 10], 15),
        (["schedule.evaluate_every=2"], [0, 10], 31),
    ],
    ids=str,
)
def test_steps_and_effective_negatives_are_told(
    settings: list[str],
    steps: list[int],
    negatives: int,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(
        store,
        recipe=make_recipe("schedule.epochs=2", *settings),
        out=tmp_path / "run",
        spec=CPU,
    )
    assert [line["step"] for line in read_history(tmp_path / "run")] == steps
    assert report.n_negatives == negatives


def test_accumulated_gradients_are_those_of_the_mean_of_the_batches(
    write_store: Any,
    tmp_path: Path,
) -> None:
    """Without anything random but the order, and with a step so small that all batches see the same
    weights."""
    store = write_store(tmp_path / "s", *planted_features(), IMAGE_ROWS, SPLITS)
    settings = [
        "optimizer.kind=sgd",
        "optimizer.betas=[0, 0]",
        "optimizer.lr=1e-6",
        "optimizer.weight_decay=0",
    ]
    once = [*settings, "schedule.epochs=1", "schedule.warmup=0", "schedule.decay=constant"]
    moved = {}
    before = untrained_heads(store, make_recipe(*once), CPU).text.head.state_dict()["body.weight"]
    for accumulate in (1, 5):
        run = tmp_path / str(accumulate)
        fit_head(
            store,
            recipe=make_recipe(*once, f"schedule.accumulate={accumulate}"),
            out=run,
            spec=CPU,
        )
        moved[accumulate] = load_heads(run).text.head.state_dict()["body.weight"] - before
    torch.testing.assert_close(moved[1], 5 * moved[5], rtol=0.05, atol=2e-8)
    assert moved[1].abs().max() > 1e-6


def test_a_fit_that_gets_no_better_stops_early(shuffled: FeatureStore, tmp_path: Path) -> None:
    report = fit_head(
        shuffled,
        recipe=make_recipe("schedule.epochs=40", "schedule.patience=3"),
        out=tmp_path / "run",
        spec=CPU,
    )
    epochs = [line["epoch"] for line in read_history(tmp_path / "run")]
    assert epochs[-1] == report.best_epoch + 3 < 40


def test_an_average_of_the_weights_is_what_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    settings = ["schedule.epochs=1", "optimizer.lr=0.1", "schedule.steps=1"]
    fit_head(store, recipe=make_recipe(*settings), out=tmp_path / "last", spec=CPU)
    fit_head(
        store,
        recipe=make_recipe(*settings, "optimizer.ema=0.75"),
        out=tmp_path / "mean",
        spec=CPU,
    )
    name = "body.weight"
    before = untrained_heads(store, make_recipe(), CPU).text.head.state_dict()[name]
    last, mean = (
        load_heads(tmp_path / run).text.head.state_dict()[name] for run in ("last", "mean")
    )
    torch.testing.assert_close(mean, 0.75 * before + 0.25 * last)


def test_nothing_to_train_is_refused(write_store: Any, tmp_path: Path) -> None:
    image, text = planted_features()
    store = write_store(tmp_path / "s", image[:, :10].copy(), text, IMAGE_ROWS, SPLITS)
    recipe = make_recipe("image.kind=identity", "text.kind=identity", "loss.learnable=false")
    with pytest.raises(
        RecipeError,
        match="nothing would be trained; let a head or the temperature learn",
    ):
        fit_head(store, recipe=recipe, out=tmp_path / "run", spec=CPU)


# --- what is written ------------------------------------------------------------------------------


def test_a_run_says_what_it_was_made_of(store: FeatureStore, fitted: FitReport) -> None:
    assert sorted(contents(fitted.run)) == [
        "README.md",
        "head.json",
        "head.safetensors",
        "history.jsonl",
        "ledger.json",
        "recipe.json",
    ]
    recipe = make_recipe()
    assert (
        Recipe.model_validate_json((fitted.run / "recipe.json").read_text(encoding="utf-8"))
        == recipe
    )
    heads = load_heads(fitted.run)
    training = heads.training
    assert training["recipe"] == recipe.model_dump(mode="json")
    assert training["data"] == store.digest
    assert training["splits"]["dev"] == "dev"
    assert training["best_epoch"] == fitted.best_epoch
    assert (
        training["n_trained_parameters"]
        == fitted.n_trained_parameters
        == 12 * 8 + 8 + 10 * 8 + 8 + 1
    )
    assert (training["n_train_images"], training["n_dev_images"]) == (N_TRAIN, N_DEV)
    assert heads.image.fingerprint.digest == store.array("image").record.encoder.digest
    assert heads.image.encoder["name"] == "pixels"
    assert heads.text.encoder["name"] == "words"


def test_the_features_of_several_encoders_are_chosen_by_name(
    write_store: Any,
    tmp_path: Path,
) -> None:
    image, text = planted_features()
    write_store(tmp_path / "s", image, text, IMAGE_ROWS, SPLITS)
    wide = np.concatenate([image, image], axis=1), np.concatenate([text, text], axis=1)
    both = write_store(tmp_path / "s", *wide, IMAGE_ROWS, SPLITS, names=("pixels-2", "words-2"))
    recipe = make_recipe("schedule.epochs=1")
    with pytest.raises(
        StoreError,
        match="found: pixels, pixels-2; choose one with --image-features",
    ):
        fit_head(both, recipe=recipe, out=tmp_path / "run", spec=CPU)
    spec = replace(CPU, image_features="pixels-2", text_features="words")
    fit_head(both, recipe=recipe, out=tmp_path / "run", spec=spec)
    heads = load_heads(tmp_path / "run")
    assert (heads.image.head.in_dim, heads.text.head.in_dim) == (24, 10)
    assert heads.image.encoder["name"] == "pixels-2"


# --- folders that exist ---------------------------------------------------------------------------


def copy_of(run: Path, to: Path) -> Path:
    to.mkdir()
    for name, data in contents(run).items():
        (to / name).write_bytes(data)
    return to


def test_a_finished_run_is_refused_and_stays_as_it_is(
    store: FeatureStore,
    fitted: FitReport,
) -> None:
    before = contents(fitted.run)
    with pytest.raises(
        RunError,
        match=r"run folder .* exists already; choose another --out, or add --overwrite",
    ):
        fit_head(store, recipe=make_recipe(), out=fitted.run, spec=CPU)
    assert contents(fitted.run) == before


def test_overwrite_replaces_a_finished_run(
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    run = copy_of(fitted.run, tmp_path / "run")
    recipe = make_recipe("schedule.epochs=2")
    fit_head(store, recipe=recipe, out=run, spec=replace(CPU, overwrite=True))
    assert len(list(read_history(run))) == 3
    assert load_heads(run).training["recipe"]["schedule"]["epochs"] == 2


@pytest.mark.parametrize("left", ["folder", "file"])
def test_a_run_that_was_broken_off_is_begun_anew(
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
    left: str,
) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU, progress=stop)
    assert len(list(read_history(tmp_path / "run"))) == 3
    with pytest.raises(RunError, match="not a finished run"):
        load_heads(tmp_path / "run")
    for name in (WEIGHTS, CHECKPOINT):
        half = scratch_of(tmp_path / "run" / name)
        if left == "folder":
            half.mkdir()
        (half / ".tmpSY4uT3" if left == "folder" else half).write_bytes(b"half")
    fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    assert weights(tmp_path / "run") == weights(fitted.run)
    assert timeless(tmp_path / "run") == timeless(fitted.run)
    assert sorted(contents(tmp_path / "run")) == sorted(contents(fitted.run))


def make_foreign(folder: Path) -> None:
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "notes.txt").write_text("mine")
    (folder / "history.jsonl").write_text("{}\n")


def make_index(folder: Path, run: Path) -> None:
    """An index folder has a head as well."""
    save_heads(load_heads(run), folder)
    (folder / "index.json").write_text("{}")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["foreign", "index", "file"])
def test_what_is_no_run_is_never_deleted(
    kind: str,
    overwrite: bool,
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    out = tmp_path / "precious"
    makers: dict[str, Callable[[], object]] = {
        "foreign": lambda: make_foreign(out),
        "index": lambda: make_index(out, fitted.run),
        "file": lambda: out.write_text("mine"),
    }
    makers[kind]()
    before = contents(tmp_path)
    with pytest.raises(RunError, match="precious"):
        fit_head(store, recipe=make_recipe(), out=out, spec=replace(CPU, overwrite=overwrite))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("fault", ["features", "splits", "widths", "device"])
def test_a_fit_that_cannot_begin_leaves_the_run_that_it_would_replace(
    fault: str,
    store: FeatureStore,
    fitted: FitReport,
    tmp_path: Path,
) -> None:
    run = copy_of(fitted.run, tmp_path / "run")
    spec = replace(CPU, overwrite=True)
    changed = {
        "features": replace(spec, image_features="none"),
        "splits": replace(spec, splits=SplitSpec(dev="nowhere")),
        "widths": spec,
        "device": replace(spec, device="abacus"),
    }
    recipe = make_recipe("text.dim=9") if fault == "widths" else make_recipe()
    with pytest.raises((DataError, OptionError)):
        fit_head(store, recipe=recipe, out=run, spec=changed[fault])
    assert contents(run) == contents(fitted.run)


# --- what is refused ------------------------------------------------------------------------------


def test_an_incomplete_store_is_refused_with_how_far_it_is(
    write_store: Any,
    tmp_path: Path,
) -> None:
    half = write_store(
        tmp_path / "s",
        *planted_features(),
        IMAGE_ROWS,
        SPLITS,
        shard_rows=54,
        n_shards=1,
    )
    with pytest.raises(
        IncompleteError,
        match="image/pixels is 25% done; resume with the same apecache extract",
    ):
        fit_head(half, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_no_head(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    recipe = make_recipe("optimizer.lr=3e38", "schedule.warmup=0", "schedule.epochs=20")
    with pytest.raises(
        DataError,
        match=r"not finite at step 2; the last good .* of step 0; lower optimizer\.lr",
    ):
        fit_head(store, recipe=recipe, out=tmp_path / "run", spec=CPU)
    assert not (tmp_path / "run" / "head.json").exists()
    assert [line["epoch"] for line in read_history(tmp_path / "run")] == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["text.dim=9"], "recipe small: the heads end in different widths: image 8, text 9"),
        (["image.kind=identity", "text.kind=identity"], "different widths: image 12, text 10"),
    ],
)
def test_heads_that_do_not_meet_are_refused_by_the_recipes_name(
    settings: list[str],
    message: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        fit_head(store, recipe=make_recipe(*settings), out=tmp_path / "run", spec=CPU)


def test_a_device_that_is_not_there_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"device 'abacus' cannot be used .*; try --device auto"):
        fit_head(
            store,
            recipe=make_recipe(),
            out=tmp_path / "run",
            spec=replace(CPU, device="abacus"),
        )


@pytest.mark.parametrize(("split", "what"), [("train", "training"), ("dev", "dev")])
def test_a_split_that_is_left_with_one_image_is_refused(
    split: str,
    what: str,
    write_store: Any,
    tmp_path: Path,
) -> None:
    bad = tuple(row for row, name in enumerate(SPLITS) if name == split)[1:]
    store = write_store(tmp_path / "s", *planted_features(), IMAGE_ROWS, SPLITS, bad_images=bad)
    with pytest.raises(RecipeError, match=f"only 1 {what} image with a caption"):
        fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)


def test_a_seeded_share_of_train_is_dev_where_none_is_named(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(
        store,
        recipe=make_recipe("schedule.epochs=1"),
        out=tmp_path / "run",
        spec=FitSpec(device="cpu"),
    )
    assert (report.n_train_images, report.n_dev_images) == (N_TRAIN - 16, 16)
    arrays = store.array("image"), store.array("text")
    train, dev = load_splits(store, *arrays, SplitSpec(), torch.device("cpu"))
    assert not {tuple(row) for row in train.image.tolist()} & {
        tuple(row) for row in dev.image.tolist()
    }


# --- encoders stay closed -------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.head_data import FitSpec
from apecache.train.fit_head import fit_head

recipe = load_recipe("projection", ["schedule.epochs=1"])
spec = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")
fit_head(FeatureStore.open(Path(sys.argv[1])), recipe, Path(sys.argv[2]), spec)
print(sorted({"timm", "transformers", "torchvision", "apecache.encoders.load"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_fit_never_imports_an_encoder_library(store: FeatureStore, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(store.path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert (tmp_path / "run" / "head.json").is_file()
