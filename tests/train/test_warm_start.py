"""A fit within towers that begins with the heads of a run of `fit-head`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from PIL import Image
from tiny import make_shapes
from typer.testing import CliRunner

from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import MismatchError, RecipeError, RunError
from apecache.extraction.run import ExtractSpec, extract
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.encoders import WEIGHTS, read_tensors
from apecache.runs.folder import read_history
from apecache.runs.heads import load_heads
from apecache.runs.load import recorded_training
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import FitEncoderReport, fit_encoder
from apecache.train.fit_head import FitReport, fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [
    "schedule.epochs=1",
    "schedule.batch_size=8",
    "schedule.warmup=0",
    "schedule.warmup_steps=0",
]
DEV = SplitSpec(dev="val")
LINEAR = ["image.dim=16", "text.dim=16", "towers.image_pooling=cls", "towers.text_pooling=cls"]
MLP = [
    "image={kind='mlp', dim=16, width=24, standardize=false}",
    "text={kind='mlp', dim=16, width=24, skip=true}",
]


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Any:
    """24 images with two captions each; CLS features and the tokens after all but one block, in
    float32."""
    folder = tmp_path_factory.mktemp("warm-data")
    table = make_shapes(folder / "shapes", copies=2)
    image = replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), pooling="cls")
    text = replace(parse_encoder(f"hf:{tiny_text_encoder}", "text"), pooling="cls")
    specs = [(one, replace(one, pooling="tokens", layer=-2)) for one in (image, text)]
    extract(
        open_pairs(table),
        folder / "store",
        ExtractSpec(*specs, storage_dtype="float32", device="cpu"),
    )
    return FeatureStore.open(folder / "store"), lambda key: Image.open(table.parent / key).convert(
        "RGB"
    )


POOLED = {"image_features": "tiny-vit-cls", "text_features": "tiny-bert-cls"}
TOKENS = {"image_features": "tiny-vit-tokens-layer-2", "text_features": "tiny-bert-tokens-layer-2"}


def head_run(data: Any, out: Path, *settings: str, name: str = "projection") -> FitReport:
    recipe = load_recipe(name, ["schedule.epochs=12", "schedule.batch_size=8", *settings])
    return fit_head(
        data[0],
        recipe=recipe,
        out=out,
        spec=FitSpec(**POOLED, splits=DEV, device="cpu"),
    )


@pytest.fixture(scope="module")
def linear(data: Any, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    """Standardized linear heads."""
    return head_run(data, tmp_path_factory.mktemp("warm") / "linear", "image.dim=16", "text.dim=16")


def fit(
    data: Any,
    recipe: Recipe,
    out: Path,
    start: Path | None,
    **settings: Any,
) -> FitEncoderReport:
    spec = FitEncoderSpec(
        **{**POOLED, "splits": DEV, "device": "cpu", "init_from": start, **settings}
    )
    return fit_encoder(*(data[0], recipe, out, spec), data[1])


@pytest.mark.parametrize(
    ("name", "settings", "features"),
    [
        ("lilt-c", ['towers.rules=[{part = "blocks[-1:]"}]', "augmentation={}"], POOLED),
        ("lilt-c", ['towers.rules=[{part = "blocks[-1:]"}]'], TOKENS),
        ("lilt-l", [], POOLED),
        ("lilt-l", ["image.standardize=true"], POOLED),
        ("lilt-m", [], POOLED),
    ],
    ids=[
        "from the inputs",
        "from tokens",
        "image cached",
        "image cached and standardized",
        "heads frozen",
    ],
)
def test_it_begins_where_the_heads_ended(
    name: str,
    settings: list[str],
    features: Any,
    data: Any,
    linear: FitReport,
    tmp_path: Path,
) -> None:
    cold = fit(
        data,
        recipe=load_recipe(name, [*SHORT, *LINEAR, *settings]),
        out=tmp_path / "cold",
        start=None,
        **features,
    )
    warm = fit(
        data,
        recipe=load_recipe(name, [*SHORT, *LINEAR, *settings]),
        out=tmp_path / "warm",
        start=linear.run,
        **features,
    )
    assert warm.untrained == linear.dev
    assert cold.untrained != linear.dev
    tensors, _ = read_tensors(tmp_path / "warm" / WEIGHTS)
    assert bool(tensors["image.head.mean"].any()) == ("image.standardize=true" in settings)
    assert not tensors["text.head.mean"].any()
    begun = next(iter(read_history(tmp_path / "warm")))
    assert 1 / begun["temperature"] == pytest.approx(load_heads(linear.run).scale)


def test_other_kinds_of_heads_and_a_run_put_together(
    data: Any,
    linear: FitReport,
    tmp_path: Path,
) -> None:
    """The text's mlp with a direct way standardizes in the head run alone."""
    heads = head_run(
        data,
        tmp_path / "heads",
        MLP[0],
        "text={kind='mlp', dim=16, width=24, skip=true}",
    )
    within = ["text.standardize=false", 'towers.rules=[{part = "blocks[-1:]"}]', "augmentation={}"]
    warm = fit(
        data,
        recipe=load_recipe("lilt-c", [*SHORT, *LINEAR[2:], *MLP, *within]),
        out=tmp_path / "run",
        start=heads.run,
    )
    assert warm.untrained == heads.dev


def test_it_is_written_down_and_part_of_what_a_checkpoint_belongs_to(
    data: Any,
    linear: FitReport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("lilt-l", [*SHORT, *LINEAR])
    fit(data, recipe=recipe, out=tmp_path / "run", start=linear.run)
    assert recorded_training(tmp_path / "run")["init_from"] == load_heads(linear.run).digest
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert load_heads(linear.run).digest in card.replace("\\", "")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apecache.train.fit_encoder.save_encoders", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(data, recipe=recipe, out=tmp_path / "broken", start=linear.run, save_seconds=0)
    assert (tmp_path / "broken" / CHECKPOINT).is_file()
    with pytest.raises(
        MismatchError,
        match=r"holds another fit, broken off \(init_from is None, there ",
    ):
        fit(data, recipe=recipe, out=tmp_path / "broken", start=None)
    fit(data, recipe=recipe, out=tmp_path / "broken", start=linear.run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["image.dim=8", "text.dim=8"],
            r"the image head differs \(body.bias is \[8\], there \[16\]; body.weight",
        ),
        ([*LINEAR[:2], "text.kind=mlp"], r"the text head differs \(kind is mlp, there linear"),
        (
            [*LINEAR[:2], "towers.text_pooling=mean"],
            r"the text encoder differs \(inputs.pooling is mean, there cls",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_difference(
    settings: list[str],
    message: str,
    data: Any,
    linear: FitReport,
    tmp_path: Path,
) -> None:
    recipe = load_recipe(
        "lilt-l",
        [*SHORT, "towers.image_pooling=cls", "towers.text_pooling=cls", *settings],
    )
    with pytest.raises(MismatchError, match=message):
        fit(data, recipe=recipe, out=tmp_path / "run", start=linear.run)
    assert not (tmp_path / "run").exists()


def test_other_weights_of_the_encoder_are_refused(
    data: Any,
    linear: FitReport,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    other = replace(parse_encoder(f"hf:{other_text_encoder}", "text"), pooling="cls")
    with pytest.raises(MismatchError, match=r"the text encoder differs \(weights is"):
        fit(
            data,
            recipe=load_recipe("lilt-l", [*SHORT, *LINEAR]),
            out=tmp_path / "run",
            start=linear.run,
            text=other,
            text_features=None,
        )


def test_a_head_that_cannot_take_up_its_standardization_is_refused(
    data: Any,
    tmp_path: Path,
) -> None:
    gated = ["image={kind='gated', dim=16}", "text={kind='gated', dim=16}"]
    heads = head_run(data, tmp_path / "heads", *gated)
    recipe = load_recipe(
        "lilt-l",
        [*SHORT, *LINEAR[2:], *gated, "image.standardize=false", "text.standardize=false"],
    )
    with pytest.raises(
        MismatchError,
        match=r"of kind gated cannot .*fit it again with image.standardize=false",
    ):
        fit(data, recipe=recipe, out=tmp_path / "run", start=heads.run)


def test_only_runs_of_heads_and_recipes_with_heads(
    data: Any,
    linear: FitReport,
    tmp_path: Path,
) -> None:
    recipe = load_recipe("lilt-l", [*SHORT, *LINEAR])
    fit(data, recipe=recipe, out=tmp_path / "towers", start=None)
    with pytest.raises(RunError, match="--init-from takes runs of fit-head only"):
        fit(data, recipe=recipe, out=tmp_path / "run", start=tmp_path / "towers")
    with pytest.raises(RunError, match="not a finished run"):
        fit(data, recipe=recipe, out=tmp_path / "run", start=tmp_path / "nothing")
    shared = ["shared.image_blocks=1", "shared.text_blocks=1", "distillation.teacher=tiny-vit-cls"]
    with pytest.raises(RecipeError, match="no heads to begin with"):
        fit(
            data,
            recipe=load_recipe("shared-encoder", [*SHORT, *shared]),
            out=tmp_path / "run",
            start=linear.run,
        )


def test_the_command(data: Any, linear: FitReport, tmp_path: Path) -> None:
    settings = [word for setting in (*SHORT, *LINEAR) for word in ("--set", setting)]
    arguments = [
        "fit-encoder",
        str(data[0].path),
        "--recipe",
        "lilt-l",
        "--out",
        str(tmp_path / "run"),
        *settings,
    ]
    names = [
        "--image-features",
        "tiny-vit-cls",
        "--text-features",
        "tiny-bert-cls",
        "--dev-split",
        "val",
    ]
    result = CliRunner().invoke(
        app,
        [*arguments, *names, "--init-from", str(linear.run), "--json", "--device", "cpu"],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["untrained"]["text_to_image"] == {
        str(k): v for k, v in linear.dev.text_to_image.items()
    }
