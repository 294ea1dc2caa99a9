"""Every trap is planted once in a fit within towers and found by name; what is sound is left
alone."""

import json
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from apecache_cli.app import app
from PIL import Image
from safetensors.torch import load_file, save_file
from small_towers import small_bert, small_t5, small_vit
from tiny import extract_tiny, make_shapes
from typer.testing import CliRunner

from apecache.errors import DataError, MismatchError, OptionError, RunError
from apecache.models.dual_encoder import EncoderModel
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.encoders import DESCRIPTION, WEIGHTS
from apecache.runs.ledger import load_ledger
from apecache.store.reader import FeatureStore
from apecache.train import encoder_setup
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.lint.checks import lint_encoder_data
from apecache.train.lint.encoders import lint_encoder_plan, lint_encoder_run
from apecache.train.lint.findings import Finding
from apecache.train.lint.model_checks import lint_encoder_model, lint_groups
from apecache.train.ranks import ALONE
from apecache.train.tower_fit import EncoderFit

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu")
QUIET = {"negatives", "dev-size"}
"""Warnings that small data gives by itself."""


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Any:
    """24 images with two captions each, their store and folder. Both towers are as wide as one
    another."""
    folder = tmp_path_factory.mktemp("lint-encoder")
    table = make_shapes(folder / "shapes", copies=2)
    hf.AutoTokenizer.from_pretrained(tiny_text_encoder).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = hf.BertConfig.from_pretrained(tiny_text_encoder, hidden_size=64)
    hf.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
    extract_tiny(table, store=folder / "store", image=tiny_image_encoder, text=folder / "bert")
    open_image = lambda key: Image.open(table.parent / key).convert("RGB")  # noqa: E731
    return FeatureStore.open(folder / "store"), open_image, table.parent


def recipe_of(name: str, *settings: str) -> Recipe:
    short = [
        "schedule.epochs=1",
        "schedule.batch_size=4",
        "schedule.warmup=0",
        "schedule.warmup_steps=0",
    ]
    if name == "lilt-m":
        # The store of these tests holds mean-pooled texts.
        short.append("towers.text_pooling=default")
    return load_recipe(name, [*short, *settings])


def set_up(data: Any, recipe: Recipe) -> encoder_setup.PreparedFit:
    return encoder_setup.set_up(
        data[0],
        recipe=recipe,
        spec=SPEC,
        open_image=data[1],
        device=torch.device("cpu"),
    )


def found_in(setup: encoder_setup.PreparedFit, spoil: Any = None) -> list[Finding]:
    """`spoil` changes the fit before it is looked at."""
    training = EncoderFit(
        setup.model,
        inputs=setup.inputs,
        recipe=setup.opened.recipe,
        spec=SPEC,
        ranks=ALONE,
    )
    if spoil is not None:
        spoil(training)
    return list(lint_encoder_model(training, setup.train))


def loud(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.check not in QUIET]


SOUND = [
    "lit",
    "clip",
    "lilt-a",
    "lilt-e",
    "lilt-f",
    "lilt-i",
    "lilt-k",
    "lilt-m",
    "freeze/Vcf-Tcf",
    "freeze/Vuf-Tuu",
]
SHARED = [
    "shared.image_blocks=2",
    "shared.text_blocks=1",
    "distillation.teacher=tiny-vit",
    "distillation.bank=20",
]


@pytest.mark.parametrize("name", SOUND)
def test_sound_recipes_give_nothing(name: str, data: Any) -> None:
    # The store's features of texts are pooled by their mean.
    recipe = recipe_of(name, "towers.text_pooling=default")
    assert loud(lint_encoder_plan(recipe, store=data[0], spec=SPEC, open_image=data[1])) == []


def test_a_shared_encoder_and_lora_give_nothing(data: Any) -> None:
    assert (
        loud(
            lint_encoder_plan(
                recipe_of("shared-encoder", *SHARED),
                store=data[0],
                spec=SPEC,
                open_image=data[1],
            )
        )
        == []
    )
    lora = [
        'towers.rules=[{part = "text.adapters"}]',
        "towers.text_adapter.kind=lora",
        "towers.text_adapter.rank=2",
    ]
    assert (
        loud(
            lint_encoder_plan(
                recipe_of("lilt-c", *lora),
                store=data[0],
                spec=SPEC,
                open_image=data[1],
            )
        )
        == []
    )


# --- the model ------------------------------------------------------------------------------------


def test_a_parameter_of_a_tower_that_nothing_uses_is_found(data: Any) -> None:
    setup = set_up(data, recipe_of("lit"))
    model = setup.model
    forgotten = torch.nn.Linear(3, 3)
    model.text.tower.module.forgotten = forgotten  # type: ignore[union-attr]
    model._rates += [(p, 1.0) for p in forgotten.parameters()]
    (found,) = found_in(setup)
    assert (found.check, found.level) == ("gradient", "error")
    assert (
        "text.tower.module.forgotten.bias, text.tower.module.forgotten.weight are without gradient"
        in found.message
    )


def test_a_block_cut_off_from_the_loss_is_found(data: Any) -> None:
    setup = set_up(data, recipe_of("lit"))
    setup.model.text.tower.blocks[1].register_forward_hook(lambda *_: _[2].detach())  # type: ignore[union-attr]
    (found,) = found_in(setup)
    assert found.check == "gradient"
    assert "text.tower.module.embeddings" in found.message


def test_a_gate_that_can_never_open_is_found(data: Any) -> None:
    setup = set_up(data, recipe_of("lit", "text={kind='gated', standardize=false}"))
    with torch.no_grad():
        setup.model.text.head.body.gate.bias.fill_(-100.0)  # type: ignore[union-attr]
    (found,) = found_in(setup)
    assert str(found).startswith("gate: text.head.body.gate is shut")


@pytest.mark.parametrize(
    ("name", "settings", "lost", "check"),
    [
        ("lit", [], "temperature.log_scale", "temperature"),
        ("lit", [], "text.head.body.weight", "optimizer"),
        ("lit", [], "text.tower.module.embeddings.LayerNorm.bias", "optimizer"),
        ("shared-encoder", SHARED, "shared.inner.log_scale", "optimizer"),
    ],
)
def test_what_is_in_no_group_stops_a_fit(
    name: str,
    settings: list[str],
    lost: str,
    check: str,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second loss's scale is what the published shared encoder forgets."""
    rates = EncoderModel.rates

    def forgetful(model: EncoderModel) -> Any:
        return [(p, factor) for p, factor in rates(model) if p is not model.get_parameter(lost)]

    monkeypatch.setattr(EncoderModel, "rates", forgetful)
    with pytest.raises(DataError, match=f"1 check fails: {check}: "):
        fit_encoder(
            data[0],
            recipe=recipe_of(name, *settings),
            out=tmp_path / "run",
            spec=SPEC,
            open_image=data[1],
        )
    assert not (tmp_path / "run").exists()


def test_a_fixed_temperature_needs_no_group(data: Any) -> None:
    setup = set_up(data, recipe_of("lit", "loss.learnable=false"))
    optimizer = EncoderFit(
        setup.model,
        inputs=setup.inputs,
        recipe=setup.opened.recipe,
        spec=SPEC,
        ranks=ALONE,
    ).optimizer
    assert list(lint_groups(setup.model, optimizer, setup.opened.recipe)) == []


@pytest.mark.parametrize("make", [small_vit, small_bert, small_t5])
def test_no_tower_has_parts_that_a_loss_cannot_reach(make: Any) -> None:
    """So that a sound fit of all parts is never refused."""
    tower = make()
    inputs = (torch.randn(3, 3, 16, 16), None)
    if tower.modality == "text":
        inputs = (torch.randint(3, 60, (3, 7)), torch.ones(3, 7, dtype=torch.long))  # type: ignore[assignment]
    (tower(*inputs) * torch.randn(3, tower.output_dim)).sum().backward()
    for part in tower.parts():
        assert tower.parameter(part).grad.abs().max() > 0, part.name


# --- recipe, splits, batches ----------------------------------------------------------------------


def test_selection_on_the_reported_split_is_found(data: Any) -> None:
    found = lint_encoder_plan(recipe_of("lit"), data[0], replace(SPEC, report_split="val"))
    assert [f.check for f in found if f.level == "error"] == ["selection"]


def test_one_file_in_two_splits_is_found(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = data[0]
    rows = {
        split: [int(r) for r in (store.pairs.splits == split).nonzero()[0]]
        for split in ("train", "val")
    }
    array = store.array("image")
    hashes = array.content()
    plain = type(array).content
    hashes[rows["val"][0]] = hashes[rows["train"][0]]
    monkeypatch.setattr(
        type(array),
        "content",
        lambda self: hashes if self.record.modality == "image" else plain(self),
    )
    assert "overlap: 1 image of dev has the content of a training image" in " ".join(
        map(str, lint_encoder_plan(recipe_of("lit"), store, SPEC))
    )


def test_fewer_negatives_than_the_batch_says_is_a_warning(data: Any, tmp_path: Path) -> None:
    recipe = recipe_of("lit", "schedule.accumulate=2")
    fit_encoder(data[0], recipe=recipe, out=tmp_path / "run", spec=SPEC)
    said = "the nominal batch is 8, but each query has 3 negatives (accumulate 2 adds none)"
    for opened in (None, data[0]):
        assert any(said in f.message for f in lint_encoder_run(tmp_path / "run", opened, "test"))
    ledger = load_ledger(tmp_path / "run")
    assert ledger is not None
    assert any(said in warning for warning in ledger.warnings)


def test_captions_of_one_image_as_negatives_are_found(
    data: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of("lit", "loss.captions=2")
    assert loud(lint_encoder_plan(recipe, data[0], SPEC)) == []
    monkeypatch.setattr("apecache.train.batches.groups_of", lambda *_: repeat(None))
    found = lint_encoder_data(
        data[0],
        recipe=recipe,
        splits=SPEC.splits,
        report_split="test",
        train=set_up(data, recipe).train,
    )
    assert ("captions", "error") in [(f.check, f.level) for f in found]


# --- runs, and the command ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lit", "lilt-i", "shared-encoder"])
def run(
    request: pytest.FixtureRequest,
    data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("linted") / "run"
    settings = SHARED if request.param == "shared-encoder" else []
    fit_encoder(
        data[0],
        recipe=recipe_of(request.param, *settings),
        out=out,
        spec=SPEC,
        open_image=data[1],
    )
    return out


def test_a_run_is_looked_at_with_its_store_or_without(run: Path, data: Any) -> None:
    for opened in (None, data[0]):
        assert (
            loud(lint_encoder_run(run, store=opened, report_split="test", open_image=data[1])) == []
        )
        assert "selection" in [
            f.check
            for f in lint_encoder_run(run, store=opened, report_split="val", open_image=data[1])
        ]


def test_trained_weights_are_what_is_looked_at(data: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit_encoder(
        data[0],
        recipe=recipe_of("lit", "text={kind='gated', standardize=false}"),
        out=out,
        spec=SPEC,
    )
    weights = load_file(out / WEIGHTS)
    name = "text.head.body.gate.bias"
    save_file(
        {**weights, name: torch.full_like(weights[name], -100.0)},
        out / WEIGHTS,
        metadata={"apecache": "{}"},
    )
    result = CliRunner().invoke(app, ["lint", str(out), "--store", str(data[0].path), "--json"])
    assert result.exit_code == 3
    assert "1 check fails: gate: text.head.body.gate is shut" in result.stderr
    assert "gate" in [f["check"] for f in json.loads(result.stdout)["findings"]]


def test_the_command_on_recipes(data: Any, images_are_gone: None) -> None:
    arguments = [
        "lint",
        "lilt-d",
        "--store",
        str(data[0].path),
        "--dev-split",
        "val",
        "--set",
        "schedule.batch_size=4",
    ]
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, "needs the images" in refused.output) == (2, True)
    done = CliRunner().invoke(app, [*arguments, "--root", str(data[2])])
    assert done.exit_code == 0, done.output
    assert "dev-size" in done.output


def test_what_cannot_be_looked_at_is_refused(
    data: Any,
    tmp_path: Path,
    write_store: Any,
    images_are_gone: None,
) -> None:
    out = tmp_path / "run"
    fit_encoder(data[0], recipe=recipe_of("lilt-d"), out=out, spec=SPEC, open_image=data[1])
    with pytest.raises(OptionError, match="needs the images"):
        lint_encoder_run(out, data[0], "test")
    about = json.loads((out / DESCRIPTION).read_text())
    (out / DESCRIPTION).write_text(json.dumps({**about, "data": "another"}))
    with pytest.raises(MismatchError, match="give its own store"):
        lint_encoder_run(out, store=data[0], report_split="test", open_image=data[1])
    (out / DESCRIPTION).write_text(json.dumps({**about, "n_dev_images": "many"}))
    with pytest.raises(RunError, match="is damaged"):
        lint_encoder_run(out, store=data[0], report_split="test", open_image=data[1])


def test_the_card_of_a_run_says_what_was_recorded(run: Path) -> None:
    about = json.loads((run / DESCRIPTION).read_text())
    card = (run / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"\n# {about['recipe']['name']}\n" in card  # below the front matter
    assert f"| trained parameters | {about['n_trained_parameters']:,} |" in card
    ledger = load_ledger(run)
    assert ledger is not None
    assert f"| flops | {ledger.flops:,} |" in card
    ran = (
        "not at all: its features were read from the cache"
        if about["image"]["cached"]
        else "from its inputs"
    )
    assert f"| in training it ran | {ran} |" in card
    assert "dev-size: the dev split has 8 images" in card
    assert "image to text R@1" in card
    assert str(run.parent) not in card
