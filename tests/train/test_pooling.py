"""The pooling that a recipe asks for is the pooling that is read; a store without it is a mismatch
that names the command."""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from PIL import Image
from tiny import extract_tiny, make_shapes
from typer.testing import CliRunner

from apecache.auto.curate import CurateSpec, curate
from apecache.auto.forecast import ForecastSpec, forecast
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import MismatchError, StoreError
from apecache.extraction.run import ExtractSpec, extract
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads, save_heads
from apecache.store.import_features import import_features
from apecache.store.import_spec import FeatureInput, ImportSpec
from apecache.store.reader import FeatureStore
from apecache.sweeps.halving import SweepSpec
from apecache.sweeps.run import sweep
from apecache.sweeps.space import Dimension, Space
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.lint.encoders import lint_encoder_plan
from apecache.train.lint.heads import lint_plan, lint_run
from apecache.train.pooling import cached_array, is_pooled_by, pooling_of

DEV = SplitSpec(dev="val")
SHORT = ["schedule.epochs=1", "schedule.batch_size=8"]
CLS = "tiny-bert-cls"
"""Name of the texts' features that recipes of LilT take."""
TOKENS = "tiny-bert-tokens"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 images, of which a forecast needs 40 for training."""
    return make_shapes(tmp_path_factory.mktemp("pooling") / "shapes", copies=7)


@pytest.fixture(scope="module")
def stores(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[FeatureStore, FeatureStore, Any]:
    """A default store, whose texts are masked means, the same with CLS added, and the images."""
    folder = table.parent.parent
    for name in ("default", "both"):
        extract_tiny(table, store=folder / name, image=tiny_image_encoder, text=tiny_text_encoder)
    cls = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    added = ExtractSpec(text=replace(cls, pooling="cls"), device="cpu", add=True)
    extract(open_pairs(table), folder / "both", added)
    return (
        FeatureStore.open(folder / "default"),
        FeatureStore.open(folder / "both"),
        lambda key: Image.open(table.parent / key).convert("RGB"),
    )


@pytest.fixture(scope="module")
def tokens(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> FeatureStore:
    """A store whose texts are tokens, cut to 8 of the encoder's 16."""
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    spec = ExtractSpec(
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        replace(text, pooling="tokens", max_tokens=8),
        device="cpu",
    )
    extract(open_pairs(table), table.parent.parent / "tokens", spec)
    return FeatureStore.open(table.parent.parent / "tokens")


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A recipe file: LilT's projections on CLS, in one epoch."""
    path = tmp_path / "short.toml"
    path.write_text('name = "short"\nextends = "lilt-c"\n[schedule]\nepochs = 1\nbatch_size = 8\n')
    return str(path)


# --- every way to read features for a recipe ------------------------------------------------------

Entry = Callable[[FeatureStore, str, Path, str | None, Any], object]
"""(store, recipe file, folder, name of the text features, images) -> what was measured."""


def by_fit_head(store: FeatureStore, short: str, out: Path, name: str | None, _: Any) -> object:
    spec = FitSpec(splits=DEV, device="cpu", text_features=name)
    return fit_head(store, recipe=short, out=out, spec=spec).dev


def by_lint(store: FeatureStore, short: str, out: Path, name: str | None, _: Any) -> object:
    spec = FitSpec(splits=DEV, device="cpu", text_features=name)
    return lint_plan(short, store=store, spec=spec)


def by_fit_encoder(
    store: FeatureStore,
    short: str,
    out: Path,
    name: str | None,
    images: Any,
) -> object:
    spec = FitEncoderSpec(splits=DEV, device="cpu", text_features=name)
    recipe = load_recipe("lilt-m", SHORT)
    return fit_encoder(store, recipe=recipe, out=out, spec=spec, open_image=images).dev


def by_lint_encoder(
    store: FeatureStore,
    short: str,
    out: Path,
    name: str | None,
    images: Any,
) -> object:
    spec = FitEncoderSpec(splits=DEV, device="cpu", text_features=name)
    recipe = load_recipe("lilt-m", SHORT)
    return lint_encoder_plan(recipe, store=store, spec=spec, open_image=images)


def by_sweep(store: FeatureStore, short: str, out: Path, name: str | None, _: Any) -> object:
    space = Space({"optimizer.lr": Dimension(choice=(1e-3, 1e-2))}, [short])
    fit = FitSpec(splits=DEV, device="cpu", text_features=name)
    return sweep(store, space=space, out=out, spec=SweepSpec(2, "grid", fit=fit)).trials


def by_forecast(store: FeatureStore, short: str, out: Path, name: str | None, _: Any) -> object:
    spec = ForecastSpec(
        recipe=short,
        text_features=name,
        splits=DEV,
        shares=(0.8, 0.9, 1.0),
        seeds=1,
        device="cpu",
    )
    return forecast(store, out, spec).curve


def by_curate(store: FeatureStore, short: str, out: Path, name: str | None, _: Any) -> object:
    spec = CurateSpec(recipe=short, text_features=name, n_folds=2, device="cpu")
    return curate(store, out, spec).to_json()


ENTRIES = (
    by_fit_head,
    by_lint,
    by_fit_encoder,
    by_lint_encoder,
    by_sweep,
    by_forecast,
    by_curate,
)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_another_pooling_with_the_command(
    entry: Entry,
    stores: Any,
    short: str,
    tmp_path: Path,
) -> None:
    default, both, images = stores
    named = default.array("text").name
    for store, name in ((default, None), (default, named), (both, named)):
        with pytest.raises(MismatchError) as caught:
            entry(store, short, tmp_path / "out", name, images)
        message = str(caught.value)
        assert "towers.text_pooling is cls, but the text features tiny-bert are pooled" in message
        assert f"apecache extract SOURCE --store {store.path} --add --text hf:" in message
        assert message.endswith("--text-cut cls")
        assert caught.value.exit_code == 4
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_finds_what_suits_among_others(
    entry: Entry,
    stores: Any,
    short: str,
    tmp_path: Path,
) -> None:
    _, both, images = stores
    alone = entry(both, short, tmp_path / "alone", None, images)
    named = entry(both, short, tmp_path / "named", CLS, images)
    if entry is by_fit_head:
        assert load_heads(tmp_path / "alone").text.encoder["pooling"] == "cls"
    assert alone == named


@pytest.mark.parametrize(
    ("command", "make_spec"),
    [(forecast, ForecastSpec), (curate, CurateSpec)],
)
def test_a_run_that_read_another_pooling_than_its_recipe_asks_is_refused(
    command: Callable[..., object],
    make_spec: Callable[..., object],
    stores: Any,
    tmp_path: Path,
) -> None:
    default, _, _ = stores
    spec = FitSpec(splits=DEV, device="cpu")
    fit_head(default, load_recipe("projection", SHORT), tmp_path / "run", spec)
    heads = load_heads(tmp_path / "run")
    heads.training["recipe"]["towers"]["text_pooling"] = "cls"
    save_heads(heads, tmp_path / "run")
    with pytest.raises(MismatchError, match="--text-cut cls"):
        command(default, tmp_path / "out", make_spec(run=tmp_path / "run", device="cpu"))
    assert "pooling" in {finding.check for finding in lint_run(tmp_path / "run", default)}


def test_a_forecast_measures_only_the_encoders_that_its_recipe_could_join(
    stores: Any,
    table: Path,
    tiny_image_encoder: Path,
    short: str,
    tmp_path: Path,
) -> None:
    shutil.copytree(stores[1].path, tmp_path / "store")
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    cuts = tuple(replace(image, pooling=pooling) for pooling in ("cls", "mean"))
    extract(open_pairs(table), tmp_path / "store", ExtractSpec(image=cuts, device="cpu", add=True))
    spec = ForecastSpec(
        recipe=short,
        image_features="tiny-vit",
        splits=DEV,
        shares=(0.8, 0.9, 1.0),
        seeds=1,
        device="cpu",
    )
    report = forecast(FeatureStore.open(tmp_path / "store"), tmp_path / "out", spec)
    beside = [gain.change for gain in report.gains if "beside" in gain.change]
    assert beside == ["image features tiny-vit-cls beside"]


# --- sweeps of several poolings -------------------------------------------------------------------


def test_trials_of_a_sweep_read_what_each_of_them_asks_for(
    stores: Any,
    short: str,
    tmp_path: Path,
) -> None:
    _, both, _ = stores
    poolings = ("cls", "mean")
    space = Space({"towers.text_pooling": Dimension(choice=poolings)}, [short])
    spec = SweepSpec(2, "grid", fit=FitSpec(splits=DEV, device="cpu"))
    report = sweep(both, space=space, out=tmp_path / "sweep", spec=spec)
    means = {trial.values["towers.text_pooling"]: trial.mean for trial in report.trials}
    for pooling in poolings:
        recipe = load_recipe(short, [f"towers.text_pooling={pooling}"])
        alone = fit_head(both, recipe=recipe, out=tmp_path / pooling, spec=spec.fit)
        assert means[pooling] == pytest.approx(alone.dev.selection_score, abs=1e-9)
    assert means["cls"] != means["mean"]
    best = load_heads(report.run).text.encoder["pooling"]
    assert best == {"cls": "cls", "mean": "default"}[report.best.values["towers.text_pooling"]]


def test_a_sweep_without_the_features_of_a_trial_claims_no_folder(
    stores: Any,
    short: str,
    tmp_path: Path,
) -> None:
    default, both, _ = stores
    space = Space({"towers.text_pooling": Dimension(choice=("mean", "cls"))}, [short])
    for sampler in ("grid", "random", "tpe"):
        spec = SweepSpec(8, sampler, fit=FitSpec(splits=DEV, device="cpu"))
        with pytest.raises(MismatchError, match="--text-cut cls"):
            sweep(default, space=space, out=tmp_path / "out", spec=spec)
    asks_nothing = Space({"optimizer.lr": Dimension(choice=(1e-3,))}, [short, "projection"])
    with pytest.raises(StoreError, match=r"2 arrays of text features.*--text-features"):
        sweep(
            both,
            space=asks_nothing,
            out=tmp_path / "out",
            spec=SweepSpec(2, "grid", fit=FitSpec(splits=DEV, device="cpu")),
        )
    assert not (tmp_path / "out").exists()


# --- what the message advises ---------------------------------------------------------------------


def run_commands(message: str, table: Path) -> list[str]:
    """Run every command of a message, with the table as its source; return them."""
    commands = [part.split("; ")[0] for part in message.split("with: ")[1:]]
    for command in commands:
        words = shlex.split(command.replace("SOURCE", str(table)))
        result = CliRunner().invoke(app, [*words[1:], "--device", "cpu"])
        assert result.exit_code == 0, result.output
    return commands


def refusal(store: FeatureStore, name: str | None = None) -> str:
    """What the recipe on CLS says about features of texts."""
    with pytest.raises(MismatchError) as caught:
        cached_array(store, recipe=load_recipe("lilt-c"), side="text", name=name)
    return str(caught.value)


def test_joined_features_have_a_valid_command_for_each_part(
    table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "a store"
    extract_tiny(table, store=store, image=tiny_image_encoder, text=tiny_text_encoder)
    other = parse_encoder(f"hf:{other_text_encoder}", "text")
    extract(open_pairs(table), store, ExtractSpec(text=other, device="cpu", add=True))
    message = refusal(FeatureStore.open(store), "other-bert,tiny-bert")
    assert "other-bert are pooled by mean and tiny-bert are pooled by mean" in message
    assert len(run_commands(message, table)) == 2
    opened = FeatureStore.open(store)
    recipe = load_recipe("lilt-c", SHORT)
    names = "other-bert-cls,tiny-bert-cls"
    assert cached_array(opened, recipe=recipe, side="text", name=names).name == names
    half = refusal(opened, "other-bert-cls,tiny-bert")
    assert "features tiny-bert are pooled by mean; add" in half
    assert half.count("apecache extract") == 1
    spec = FitSpec(splits=DEV, device="cpu", text_features=names)
    fit_head(opened, recipe=recipe, out=tmp_path / "run", spec=spec)


def test_the_command_keeps_the_inputs_of_the_encoder(tokens: FeatureStore) -> None:
    words = shlex.split(refusal(tokens).split("with: ")[1])
    assert words[words.index("--max-tokens") + 1] == "8"


def test_imported_features_must_be_imported_as_the_recipe_wants(
    stores: Any,
    tmp_path: Path,
) -> None:
    default, _, _ = stores
    vectors = {}
    for side in ("image", "text"):
        array = default.array(side)
        vectors[side] = FeatureInput(features=array.load(), name=f"my-{side}s")
    spec = ImportSpec(
        **vectors,
        image_rows=default.pairs.image_rows,
        by_row=True,
    )
    import_features(tmp_path / "imported", spec)
    store = FeatureStore.open(tmp_path / "imported")
    message = refusal(store)
    assert "features my-texts were imported without their encoder; import text features" in message
    assert "are pooled by cls, and set towers.text_pooling=default" in message
    assert "apecache extract" not in message
    taken = load_recipe("lilt-c", ["towers.text_pooling=default"])
    assert cached_array(store, recipe=taken, side="text", name=None).name == "my-texts"


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "tokens"])
def test_heads_on_pooled_features_that_find_tokens_get_the_command(
    name: str | None,
    tokens: FeatureStore,
    short: str,
    tmp_path: Path,
) -> None:
    named = None if name is None else tokens.array("text").name
    spec = FitSpec(splits=DEV, device="cpu", text_features=named)
    with pytest.raises(MismatchError) as caught:
        fit_head(tokens, recipe=short, out=tmp_path / "run", spec=spec)
    message = str(caught.value)
    assert " are tokens; add those pooled by cls with: apecache extract SOURCE" in message
    assert message.endswith("--text-cut cls")


def test_pooled_features_are_named_before_tokens_and_inner_layers(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    other = parse_encoder(f"hf:{other_text_encoder}", "text")
    cuts = (replace(other, pooling="tokens"), replace(other, pooling="cls", layer=1))
    images = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    extract(open_pairs(shapes_once), tmp_path / "s", ExtractSpec(images, cuts, device="cpu"))
    inner = refusal(FeatureStore.open(tmp_path / "s"))
    assert "other-bert-cls-layer1 are of an inner layer (cls@1); add" in inner
    mean = ExtractSpec(
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        device="cpu",
        add=True,
    )
    extract(open_pairs(shapes_once), tmp_path / "s", mean)
    # The arrays of other-bert stand before it.
    assert "features tiny-bert are pooled by mean" in refusal(FeatureStore.open(tmp_path / "s"))


def test_heads_on_tokens_pool_themselves(tokens: FeatureStore, tmp_path: Path) -> None:
    settings = [*SHORT, "towers.text_pooling=cls", "text.kind=attention"]
    recipe = load_recipe("lilt-c", settings)
    spec = FitSpec(splits=DEV, device="cpu")
    fit_head(tokens, recipe=recipe, out=tmp_path / "run", spec=spec)
    assert load_heads(tmp_path / "run").text.encoder["pooling"] == "tokens"


# --- the rule itself ------------------------------------------------------------------------------


def test_the_encoders_own_pooling_counts_as_what_it_is(stores: Any) -> None:
    default, both, _ = stores
    assert pooling_of(default.array("text").record) == "mean"
    assert pooling_of(default.array("image").record) == "cls"
    assert is_pooled_by(default.array("image"), "cls")
    recipe = load_recipe("lilt-m")
    found = cached_array(both, recipe=recipe, side="text", name=None)
    assert pooling_of(found.record) == "cls"


@pytest.mark.parametrize("name", ["lilt-m", "freeze/Vuu-Tff", "freeze/Vuf-Tff"])
def test_a_cached_side_of_another_pooling_is_refused_with_the_command(
    name: str,
    stores: Any,
    tmp_path: Path,
) -> None:
    default, _, open_image = stores
    spec = FitEncoderSpec(splits=DEV, device="cpu")
    recipe = load_recipe(name, SHORT)
    with pytest.raises(MismatchError) as caught:
        fit_encoder(default, recipe=recipe, out=tmp_path / "run", spec=spec, open_image=open_image)
    message = str(caught.value)
    assert "towers.text_pooling is cls" in message
    assert "are pooled by mean" in message
    assert "--add --text hf:" in message
    assert message.endswith("--text-cut cls")
    assert caught.value.exit_code == 4
    with pytest.raises(MismatchError, match="--text-cut cls"):
        lint_encoder_plan(recipe, store=default, spec=spec, open_image=open_image)


def test_heads_alone_are_refused_too_and_lint_sees_it(stores: Any, tmp_path: Path) -> None:
    default, both, _ = stores
    recipe = load_recipe("lilt-c", SHORT)
    spec = FitSpec(splits=DEV, device="cpu")
    with pytest.raises(MismatchError, match="--text-cut cls"):
        fit_head(default, recipe=recipe, out=tmp_path / "run", spec=spec)
    with pytest.raises(MismatchError, match="--text-cut cls"):
        lint_plan(recipe, store=default, spec=spec)
    named = FitSpec(splits=DEV, device="cpu", text_features=default.array("text").record.name)
    with pytest.raises(MismatchError, match="--text-cut cls"):
        fit_head(both, recipe=recipe, out=tmp_path / "named", spec=named)
    fit_head(both, recipe=recipe, out=tmp_path / "fits", spec=spec)
    assert load_heads(tmp_path / "fits").text.encoder["pooling"] == "cls"


def test_a_recipe_that_asks_for_nothing_takes_what_there_is(stores: Any, tmp_path: Path) -> None:
    default, _, _ = stores
    spec = FitSpec(splits=DEV, device="cpu")
    fit_head(default, load_recipe("projection", SHORT), tmp_path / "run", spec)
    assert load_heads(tmp_path / "run").text.encoder["pooling"] == "default"
