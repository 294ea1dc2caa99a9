"""The pooling that a recipe asks for is the pooling that is read; a store without it is a mismatch
that names the command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import extract_tiny, make_shapes

from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import MismatchError
from apecache.extraction.run import ExtractSpec, extract
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.lint.encoders import lint_encoder_plan
from apecache.train.lint.heads import lint_plan
from apecache.train.pooling import cached_array, is_pooled_by, pooling_of

DEV = SplitSpec(dev="val")
SHORT = ["schedule.epochs=1", "schedule.batch_size=8"]


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> tuple[FeatureStore, FeatureStore, Any]:
    """A default store, whose texts are masked means, the same with CLS added, and the images."""
    folder = tmp_path_factory.mktemp("pooling")
    table = make_shapes(folder / "shapes", copies=2)
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
