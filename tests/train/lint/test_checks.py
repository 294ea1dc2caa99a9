"""Every trap is planted once and found by name; what is sound is left alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from recipes import SMALL
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from apecache.errors import DataError, MismatchError, RunError
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import Batch, FeaturePairs, SplitSpec, choose_splits
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.lint.checks import lint_positives, lint_recipe, lint_splits
from apecache.train.lint.findings import Finding, require_sound
from apecache.train.lint.heads import lint_plan, lint_run
from apecache.train.lint.model_checks import lint_model
from apecache.train.model import AlignmentModel
from apecache.train.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ["train"] * 120 + ["dev"] * 110 + ["test"] * 20
IMAGE_ROWS = [image for image in range(len(SPLITS)) for _ in range(2)]
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")
GATED = ["text={kind='gated', dim=8}"]


def features(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    sizes = ((len(SPLITS), 12), (len(IMAGE_ROWS), 10))
    image, text = (rng.normal(size=size).astype(np.float32) for size in sizes)
    return image, text


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("lint") / "s",
        *features(),
        IMAGE_ROWS,
        SPLITS,
    )
    return made


def make_recipe(*settings: str) -> Recipe:
    short = ["schedule.epochs=2", "schedule.batch_size=32"]
    return load_recipe(SMALL, [*short, *settings])


def loaded(store: FeatureStore, recipe: Recipe) -> tuple[FeaturePairs, AlignmentModel]:
    arrays = store.array("image"), store.array("text")
    train, dev = load_splits(store, *arrays, CPU.splits, torch.device("cpu"), recipe)
    return train, initial_model(recipe, train=train, dev=dev, seed=0)[0]


def checks(findings: Any) -> list[tuple[str, str]]:
    return [(finding.check, finding.level) for finding in findings]


ZOO = [
    "projection",
    "gated",
    "sail",
    "fusemix",
    "mixed",
    "sharelock",
    "structure",
    "ridge",
    "csa",
    "ape",
]


@pytest.mark.parametrize("name", ZOO)
def test_sound_recipes_on_sound_data_give_nothing(name: str, store: FeatureStore) -> None:
    recipe = load_recipe(name)
    small = load_recipe(name, ["schedule.batch_size=64"]) if recipe.schedule.epochs else recipe
    found = lint_plan(small, store, CPU)
    assert [finding for finding in found if finding.check != "negatives"] == []


def test_a_body_beside_a_closed_form_gets_its_gradient_with_the_second_step(
    store: FeatureStore,
) -> None:
    recipe = make_recipe(
        "init=cca",
        "text={kind='gated', skip=true, dim=6}",
        "image={kind='linear', dim=6}",
    )
    assert lint_plan(recipe, store, CPU) == []


# --- the model ------------------------------------------------------------------------------------


def test_a_parameter_that_nothing_uses_is_found(store: FeatureStore) -> None:
    recipe = make_recipe()
    train, model = loaded(store, recipe)
    model.image.forgotten = torch.nn.Linear(3, 3)
    (found,) = lint_model(
        model,
        optimizer=build_optimizer(model.rates(), recipe.optimizer),
        recipe=recipe,
        train=train,
    )
    assert (found.check, found.level) == ("gradient", "error")
    assert "image.forgotten.bias, image.forgotten.weight are without gradient" in found.message


def test_a_frozen_parameter_of_a_head_is_found(store: FeatureStore) -> None:
    recipe = make_recipe()
    train, model = loaded(store, recipe)
    model.text.body.weight.requires_grad_(False)  # type: ignore[union-attr]
    (found,) = lint_model(
        model,
        optimizer=build_optimizer(model.rates(), recipe.optimizer),
        recipe=recipe,
        train=train,
    )
    assert str(found).startswith("gradient: text.body.weight is without gradient")


def test_a_temperature_in_no_group_is_found(store: FeatureStore) -> None:
    recipe = make_recipe()
    train, model = loaded(store, recipe)
    heads = [*model.image.parameters(), *model.text.parameters()]
    (found,) = lint_model(
        model,
        optimizer=build_optimizer([(p, 1.0) for p in heads], recipe.optimizer),
        recipe=recipe,
        train=train,
    )
    assert (found.check, found.level) == ("temperature", "error")
    fixed = make_recipe("loss.learnable=false")
    train, model = loaded(store, fixed)
    heads = [*model.image.parameters(), *model.text.parameters()]
    assert (
        list(
            lint_model(
                model,
                optimizer=build_optimizer([(p, 1.0) for p in heads], fixed.optimizer),
                recipe=fixed,
                train=train,
            )
        )
        == []
    )


def test_a_head_in_no_group_is_found(store: FeatureStore) -> None:
    recipe = make_recipe()
    train, model = loaded(store, recipe)
    some = [*model.image.parameters(), *model.temperature.parameters()]
    (found,) = lint_model(
        model,
        optimizer=build_optimizer([(p, 1.0) for p in some], recipe.optimizer),
        recipe=recipe,
        train=train,
    )
    assert str(found).startswith("optimizer: text.body.weight, text.body.bias are in no group")


def test_a_gate_that_can_never_open_is_found(store: FeatureStore) -> None:
    recipe = make_recipe(*GATED)
    train, model = loaded(store, recipe)
    with torch.no_grad():
        model.text.body.gate.bias.fill_(-100.0)  # type: ignore[union-attr]
    (found,) = lint_model(
        model,
        optimizer=build_optimizer(model.rates(), recipe.optimizer),
        recipe=recipe,
        train=train,
    )
    assert str(found).startswith("gate: text.body.gate is shut for every training image or text")


def test_looking_changes_neither_the_model_nor_the_random_numbers(store: FeatureStore) -> None:
    recipe = make_recipe("image={kind='mlp', norm='batch', width=16, dim=8}", "image.dropout=0.2")
    train, model = loaded(store, recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    list(
        lint_model(
            model,
            optimizer=build_optimizer(model.rates(), recipe.optimizer),
            recipe=recipe,
            train=train,
        )
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# --- the splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "reported"),
    [(SplitSpec(dev="test"), "test"), (SplitSpec(dev="dev"), "dev"), (SplitSpec(), "train")],
)
def test_selection_on_the_reported_split_stops_a_fit(
    splits: SplitSpec,
    reported: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    spec = replace(CPU, splits=splits, report_split=reported)
    with pytest.raises(DataError, match="selection: the dev split is"):
        fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=spec)
    assert not (tmp_path / "run").exists()


def test_training_on_the_reported_split_is_found(store: FeatureStore) -> None:
    arrays = store.array("image"), store.array("text")
    found = list(
        lint_splits(
            store,
            arrays=arrays,
            spec=SplitSpec(train="train", dev="dev"),
            report_split="train",
        )
    )
    assert ("selection", "error") in checks(found)


@pytest.mark.parametrize(
    ("place", "level"),
    [(125, "warning"), (235, "error")],
    ids=["in dev", "in test"],
)
def test_one_file_in_two_splits_is_found(
    place: int,
    level: str,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = store.array("image")
    text = store.array("text")
    hashes = {"image": image.content(), "text": text.content()}
    hashes["image"][place] = hashes["image"][3]
    monkeypatch.setattr(type(image), "content", lambda self: hashes[self.record.modality])
    found = list(lint_splits(store, arrays=(image, text), spec=CPU.splits, report_split="test"))
    assert checks(found) == [("overlap", level)]
    assert "1 image of dev has" in found[0].message or "1 image of test has" in found[0].message


def test_a_split_called_dev_does_not_hide_the_drawn_dev_split(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dev is drawn from train here, and the split called dev is neither."""
    spec = SplitSpec(dev_images=12)
    train, drawn_dev = choose_splits(store.pairs, spec)
    image = store.array("image")
    text = store.array("text")
    hashes = {"image": image.content(), "text": text.content()}
    hashes["image"][int(np.flatnonzero(drawn_dev)[0])] = hashes["image"][
        int(np.flatnonzero(train)[0])
    ]
    hashes["image"][125] = hashes["image"][int(np.flatnonzero(train)[1])]
    monkeypatch.setattr(type(image), "content", lambda self: hashes[self.record.modality])
    # The drawn split takes copies together, which would move the planted one.
    monkeypatch.setattr("apecache.train.lint.checks.equal_images", lambda _: None)
    found = [
        finding
        for finding in lint_splits(store, arrays=(image, text), spec=spec, report_split="test")
        if finding.check == "overlap"
    ]
    assert [finding.level for finding in found] == ["warning", "error"]
    assert "1 image of dev has" in found[0].message
    assert "the split 'dev'" in found[1].message


def test_only_dev_images_with_features_count(write_store: Any, tmp_path: Path) -> None:
    image, text = features()
    dev_rows = range(120, 230)
    store: FeatureStore = write_store(
        tmp_path / "s",
        image,
        text,
        IMAGE_ROWS,
        SPLITS,
        bad_images=tuple(dev_rows[:15]),
        # Both captions of one more image.
        bad_texts=(2 * 229, 2 * 229 + 1),
    )
    arrays = store.array("image"), store.array("text")
    (found,) = lint_splits(store, arrays=arrays, spec=CPU.splits, report_split="test")
    assert (found.check, found.level) == ("dev-size", "warning")
    assert found.message.startswith("the dev split has 94 images")


def test_one_caption_in_two_splits_is_only_a_warning(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = store.array("image")
    text = store.array("text")
    hashes = {"image": image.content(), "text": text.content()}
    hashes["text"][2 * 235] = hashes["text"][0]
    monkeypatch.setattr(type(image), "content", lambda self: hashes[self.record.modality])
    assert checks(
        lint_splits(store, arrays=(image, text), spec=CPU.splits, report_split="test")
    ) == [("overlap", "warning")]


def test_rows_that_could_not_be_read_are_no_overlap(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = store.array("image")
    text = store.array("text")
    monkeypatch.setattr(type(image), "content", lambda self: [""] * self.rows)
    assert (
        list(lint_splits(store, arrays=(image, text), spec=CPU.splits, report_split="test")) == []
    )


def test_a_dev_split_that_is_too_small_is_a_warning_in_the_ledger(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    spec = FitSpec(splits=SplitSpec(dev="test"), device="cpu", report_split="dev")
    report = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=spec)
    assert report.ledger.warnings == (
        (
            "dev-size: the dev split has 20 images: a recall of 50 % is known to 11 points; "
            "choose on at least 100"
        ),
    )


# --- the batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "negatives", "why"),
    [
        (("schedule.accumulate=4",), 31, "accumulate 4 adds none"),
        (("augmentation.mixup=1",), 15, "mixup halves them"),
        (
            ("augmentation.mixup=1", "schedule.accumulate=2"),
            15,
            "accumulate 2 adds none, mixup halves them",
        ),
    ],
)
def test_fewer_negatives_than_the_batch_says_is_a_warning(
    settings: Any,
    negatives: int,
    why: str,
) -> None:
    (found,) = lint_recipe(make_recipe(*settings))
    assert (found.check, found.level) == ("negatives", "warning")
    assert f"each query has {negatives} negatives ({why})" in found.message
    assert list(lint_recipe(make_recipe())) == []


def test_captions_of_one_image_as_negatives_are_found(
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("loss.captions=2")
    train, _ = loaded(store, recipe)
    assert list(lint_positives(train, recipe)) == []
    monkeypatch.setattr("apecache.train.batches._group_numbers", lambda *_: None)
    (found,) = lint_positives(train, recipe)
    assert (found.check, found.level) == ("captions", "error")


def test_an_image_under_several_keys_is_found_by_its_features(
    write_store: Any,
    tmp_path: Path,
) -> None:
    image, text = features()
    image[5:8] = image[2]
    store = write_store(tmp_path / "s", image, text, IMAGE_ROWS, SPLITS)
    train, _ = loaded(store, make_recipe())
    (found,) = lint_positives(train, make_recipe())
    assert found.message.startswith("3 training images have the features of another one")
    content = torch.arange(len(train))
    content[5:8] = 2
    assert list(lint_positives(replace(train, content=content), make_recipe())) == []


def test_a_batch_with_two_captions_and_no_groups_is_wrong() -> None:
    from apecache.train.lint.checks import wrong_negatives

    assert wrong_negatives(Batch(image=torch.zeros(2, 3), text=torch.zeros(4, 3)))
    assert not wrong_negatives(Batch(image=torch.zeros(2, 3), text=torch.zeros(2, 3)))


# --- the command ----------------------------------------------------------------------------------


def test_every_error_is_named_at_once() -> None:
    errors = [
        Finding(check="gate", level="error", message="one"),
        Finding(check="x", level="warning", message="no"),
        Finding(check="optimizer", level="error", message="two"),
    ]
    with pytest.raises(DataError, match=r"^2 checks fail: gate: one; optimizer: two$"):
        require_sound(errors)
    require_sound(errors[1:2])


@pytest.fixture(scope="module")
def run(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linted") / "run"
    fit_head(store, recipe=make_recipe(*GATED), out=out, spec=CPU)
    return out


def test_a_run_is_looked_at_with_its_store_or_without(run: Path, store: FeatureStore) -> None:
    for opened in (None, store):
        assert lint_run(run, opened) == []
        assert ("selection", "error") in checks(lint_run(run, opened, "dev"))


def test_a_run_whose_gate_has_shut_ends_with_code_3(run: Path, store: FeatureStore) -> None:
    weights = load_file(run / "head.safetensors")
    shut = {
        **weights,
        "text.body.gate.bias": torch.full_like(weights["text.body.gate.bias"], -100.0),
    }
    save_file(shut, run / "head.safetensors")
    try:
        result = CliRunner().invoke(app, ["lint", str(run), "--store", str(store.path), "--json"])
    finally:
        save_file(weights, run / "head.safetensors")
    assert result.exit_code == 3
    assert "1 check fails: gate: text.body.gate is shut" in result.stderr
    (found,) = json.loads(result.stdout)["findings"]
    assert (found["check"], found["level"]) == ("gate", "error")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["projection"], 0, "no problems found"),
        (["projection", "--set", "schedule.accumulate=2"], 0, "adds none"),
        (["projection", "--store", "STORE", "--dev-split", "test"], 3, "selection"),
        (["projecton"], 3, "did you mean projection"),
    ],
)
def test_the_command_tells_and_ends(
    arguments: list[str],
    code: int,
    told: str,
    store: FeatureStore,
) -> None:
    filled = [str(store.path) if argument == "STORE" else argument for argument in arguments]
    result = CliRunner().invoke(app, ["lint", *filled])
    assert result.exit_code == code, result.output
    assert told in " ".join(result.output.split())


def test_a_run_of_another_store_and_a_folder_without_a_run_are_refused(
    run: Path,
    write_store: Any,
    tmp_path: Path,
) -> None:
    keys = [f"other/{row}" for row in range(len(SPLITS))]
    other = write_store(tmp_path / "s", *features(), IMAGE_ROWS, SPLITS, keys=keys)
    with pytest.raises(MismatchError, match="give its own store"):
        lint_run(run, other)
    with pytest.raises(RunError, match="not a finished run"):
        lint_run(tmp_path, None)
