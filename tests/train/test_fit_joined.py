"""Heads on the features of several encoders: trained, saved, evaluated, and used without a store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import SMALL
from tiny import extract_tiny

import apecache
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder, spec_from_json
from apecache.errors import EncoderError, MismatchError, OptionError
from apecache.evaluate.embeddings import embed_store
from apecache.export.weights import export_safetensors
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ["train"] * 160 + ["dev"] * 32 + ["val"] * 40


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Two image encoders that each see another half of what captions say."""
    rng = np.random.default_rng(0)
    n_images = len(SPLITS)
    hidden = rng.normal(size=(n_images, 8))
    views = []
    for columns in (slice(0, 4), slice(4, 8)):
        view = hidden[:, columns] @ rng.normal(size=(4, 9))
        views.append((view + 0.05 * rng.normal(size=view.shape)).astype(np.float32))
    text = (hidden @ rng.normal(size=(8, 10))).astype(np.float32)
    folder = tmp_path_factory.mktemp("halves") / "s"
    for name, view in zip("ab", views, strict=True):
        made = write_store(
            folder,
            view,
            text,
            list(range(n_images)),
            SPLITS,
            names=(name, "words"),
            modalities=("image", "text") if name == "a" else ("image",),
        )
    return made  # type: ignore[no-any-return]


def fit(store: FeatureStore, out: Path, features: str, *settings: str) -> float:
    """Mean R@1 on val."""
    spec = FitSpec(image_features=features, splits=SplitSpec(dev="dev"), device="cpu")
    recipe = load_recipe(SMALL, ["schedule.epochs=20", *settings])
    fit_head(store, recipe=recipe, out=out, spec=spec)
    embedded = embed_store(load_heads(out), store, "val")
    report = retrieval_report(embedded.image, embedded.text, embedded.image_of_text)
    return report.mean_recall_at_1


@pytest.mark.parametrize("join", ["concat", "gate", "mix"])
def test_two_encoders_find_what_neither_finds_alone(
    store: FeatureStore,
    tmp_path: Path,
    join: str,
) -> None:
    alone = max(fit(store, tmp_path / name, name) for name in "ab")
    together = fit(store, tmp_path / "both", "a,b", f"image.join={join}")
    assert together > alone + 10
    heads = load_heads(tmp_path / "both")
    assert heads.image.head.spec.widths == (() if join == "concat" else (9, 9))
    assert spec_from_json(heads.image.encoder).singles[1].name == "b"


def test_a_store_without_one_of_the_encoders_is_refused(
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
) -> None:
    fit(store, tmp_path / "both", "a,b")
    features = np.zeros((4, 9), np.float32)
    other = write_store(
        tmp_path / "s",
        features,
        np.zeros((4, 10), np.float32),
        list(range(4)),
        ["val"] * 4,
        names=("a", "words"),
    )
    with pytest.raises(MismatchError, match="not of the encoder"):
        embed_store(load_heads(tmp_path / "both"), other, "val")


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    other_text_encoder: Path,
    shapes_once: Path,
) -> tuple[FeatureStore, Path]:
    """Real encoders: one tower at two cuts for images, two towers for texts; and a run on all."""
    folder = tmp_path_factory.mktemp("both")
    table = shapes_once
    extract_tiny(table, folder / "s", tiny_image_encoder, tiny_text_encoder)
    image = replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), pooling="mean", layer=1)
    text = parse_encoder(f"hf:{other_text_encoder}", "text")
    extract(open_pairs(table), folder / "s", ExtractSpec(image, text, add=True, device="cpu"))
    store = FeatureStore.open(folder / "s")
    names = {
        side: ",".join(array.name for array in store.arrays(side)) for side in ("image", "text")
    }
    recipe = load_recipe(SMALL, ["schedule.epochs=2", "schedule.batch_size=4", "image.join=gate"])
    spec = FitSpec(names["image"], names["text"], splits=SplitSpec(dev="val"), device="cpu")
    fit_head(store, recipe=recipe, out=folder / "run", spec=spec)
    return store, folder / "run"


def test_a_loaded_run_gives_the_embeddings_of_the_store(
    both: tuple[FeatureStore, Path],
    shapes_once: Path,
) -> None:
    store, run = both
    model = apecache.load(run, device="cpu")
    wanted = embed_store(model.run, store)
    keys = [store.pairs.keys[row] for row in wanted.image_rows]
    image = model.encode_image([shapes_once.parent / key for key in keys])
    text = model.encode_text([str(store.pairs.captions[row]) for row in wanted.text_rows])
    for found, expected in ((image, wanted.image), (text, wanted.text)):
        assert (found * expected.numpy()).sum(1).min() > 1 - 1e-5


def test_encoders_that_moved_are_named_in_their_order(
    both: tuple[FeatureStore, Path],
    tiny_text_encoder: Path,
    other_text_encoder: Path,
) -> None:
    recorded = spec_from_json(load_heads(both[1]).text.encoder)
    order = [single.name for single in recorded.singles]
    moved = recorded.with_name(",".join(f"hf:{name}" for name in order))
    assert moved == recorded
    assert {str(tiny_text_encoder), str(other_text_encoder)} == set(order)
    with pytest.raises(OptionError, match="joins 2 text encoders; found 1"):
        recorded.with_name(f"hf:{tiny_text_encoder}")


def test_a_damaged_description_is_refused(both: tuple[FeatureStore, Path]) -> None:
    recorded = spec_from_json(load_heads(both[1]).text.encoder)
    for name in ("", "[]", "{}", "[1]"):
        with pytest.raises(EncoderError, match="joined encoders"):
            _ = replace(recorded, name=name).singles


def test_card_and_export_name_every_encoder(
    both: tuple[FeatureStore, Path], tmp_path: Path
) -> None:
    _, run = both
    card = (run / "README.md").read_text()
    assert "tiny\\-vit" in card
    assert "other\\-bert" in card
    assert "joined" not in card
    files = export_safetensors(load_heads(run), tmp_path)
    assert "image.safetensors" in files
    assert torch.isfinite(load_heads(run).image.head.mean).all()


def test_a_tower_trains_against_the_cached_features_of_two_encoders(
    both: tuple[FeatureStore, Path],
    shapes_once: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    store, _ = both
    names = ",".join(array.name for array in store.arrays("image"))
    head = ["image.kind=linear", "image.dim=8", "text.dim=8", "image.join=gate"]
    recipe = load_recipe("lit", ["schedule.epochs=1", "schedule.batch_size=4", *head])
    spec = FitEncoderSpec(
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        image_features=names,
        splits=SplitSpec(dev="val"),
        device="cpu",
    )
    fit_encoder(store, recipe=recipe, out=tmp_path / "run", spec=spec)
    model = apecache.load(tmp_path / "run", device="cpu")
    wanted = embed_store(model.run, store)
    keys = [store.pairs.keys[row] for row in wanted.image_rows]
    image = model.encode_image([shapes_once.parent / key for key in keys])
    assert (image * wanted.image.numpy()).sum(1).min() > 1 - 1e-5
