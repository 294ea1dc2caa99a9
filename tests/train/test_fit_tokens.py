"""Recipes on tokens and on views, from extraction to evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_shapes

import apecache
from apecache.data.augment import Views
from apecache.encoders.spec import parse_encoder
from apecache.errors import DataError, RecipeError
from apecache.extraction.run import ExtractSpec, extract

TOKEN_RECIPES = ("deep-adapter", "freeze-align", "token-anchors")


@pytest.fixture(scope="module")
def stored(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Path:
    """Pooled features, tokens of the last block, and two views of each image."""
    folder = tmp_path_factory.mktemp("tokens")
    source = apecache.open_pairs(make_shapes(folder / "shapes", copies=3))
    image = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    from dataclasses import replace

    images = (image, replace(image, pooling="tokens", layer=-1))
    texts = (text, replace(text, pooling="tokens"))
    options: dict[str, Any] = {"device": "cpu", "image_batch": 12, "text_batch": 24}
    extract(source, folder / "store", ExtractSpec(images, texts, **options))
    extract(
        source,
        folder / "store",
        ExtractSpec(image, add=True, views=Views(2, scale=(0.6, 1.0)), **options),
    )
    return folder / "store"


def fit(stored: Path, out: Path, recipe: str, image: str, text: str, *settings: str) -> Any:
    spec = apecache.FitSpec(image, text, apecache.SplitSpec(dev="val"), device="cpu")
    loaded = apecache.load_recipe(
        recipe,
        ["schedule.epochs=8", "schedule.batch_size=12", *settings],
    )
    return apecache.fit_head(apecache.FeatureStore.open(stored), loaded, out, spec)


@pytest.mark.parametrize("recipe", TOKEN_RECIPES)
def test_token_recipes_learn_from_a_store_of_tokens_and_are_evaluated_on_it(
    stored: Path,
    tmp_path: Path,
    recipe: str,
) -> None:
    encoders = "tiny-vit-tokens-layer-1", "tiny-bert-tokens"
    report = fit(stored, tmp_path / "run", recipe, *encoders, "schedule.epochs=24")
    losses = [line["loss"] for line in apecache_history(tmp_path / "run")][1:]
    assert losses[-1] < losses[0]
    store = apecache.FeatureStore.open(stored)
    heads = apecache.load_heads(tmp_path / "run")
    found = apecache.embed_store(heads, store, "val")
    again = apecache.retrieval_report(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    )
    assert again.image_to_text == pytest.approx(report.dev.image_to_text)
    assert again.text_to_image == pytest.approx(report.dev.text_to_image)


def test_a_token_recipe_on_pooled_features_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs tokens, but the image features are pooled"):
        fit(stored, tmp_path / "run", "token-anchors", "tiny-vit", "tiny-bert-tokens")


def test_a_pooled_recipe_on_tokens_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match="takes one vector for each image, but tiny-vit-tokens-layer-1 holds tokens",
    ):
        fit(stored, tmp_path / "run", "projection", "tiny-vit-tokens-layer-1", "tiny-bert")


def test_a_head_trained_on_views_is_measured_on_the_images_as_they_are(
    stored: Path,
    tmp_path: Path,
) -> None:
    fit(stored, tmp_path / "run", "projection", "tiny-vit-2views", "tiny-bert")
    store = apecache.FeatureStore.open(stored)
    heads = apecache.load_heads(tmp_path / "run")
    found = apecache.embed_store(heads, store, "val")
    plain = store.array("image", "tiny-vit").load()[found.image_rows]
    import torch

    assert torch.allclose(found.image, heads.image.embed(torch.from_numpy(plain)))


def test_views_alone_cannot_be_measured(stored: Path, tmp_path: Path) -> None:
    import shutil

    from apecache.storage.local_files import LocalFiles
    from apecache.store.maintenance import remove_array

    fit(stored, tmp_path / "run", "projection", "tiny-vit-2views", "tiny-bert")
    copy = Path(shutil.copytree(stored, tmp_path / "store"))
    remove_array(LocalFiles(copy), "image", "tiny-vit")
    with pytest.raises(DataError, match="augmented views of the image"):
        apecache.embed_store(
            apecache.load_heads(tmp_path / "run"),
            apecache.FeatureStore.open(copy),
            "val",
        )


def apecache_history(run: Path) -> list[dict[str, Any]]:
    from apecache.runs.folder import read_history

    lines = list(read_history(run))
    assert np.isfinite([line["loss"] for line in lines[1:]]).all()
    return lines
