"""An open_clip folder, and the triple of every run, embed as `apecache.load` does."""

from pathlib import Path

import pytest
import torch

import apecache
from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.export.check import compare_exported, probe_images
from apecache.export.open_clip import open_open_clip, write_open_clip
from apecache.export.open_clip_triple import open_clip_triple
from apecache.export.whole_model import open_whole_model
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder


def test_a_folder_of_its_own_classes(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    model = open_whole_model(tiny_run)
    out = tmp_path / "out"
    write_open_clip(model, out, out)
    compare_exported(open_open_clip(out), model)


def test_the_triple_embeds_as_the_run(tiny_run: Path) -> None:
    model, preprocess, tokenizer = open_clip_triple(tiny_run)
    original = apecache.load(tiny_run, device="cpu")
    images = probe_images()
    texts = ["a red circle", "the photo of a blue square on white"]
    pixels = torch.stack([preprocess(image) for image in images])
    image, text, scale = model(pixels, tokenizer(texts))
    assert abs(image.numpy() - original.encode_image(images)).max() < 1e-5
    assert abs(text.numpy() - original.encode_text(texts)).max() < 1e-5
    assert scale.item() == pytest.approx(original.scale, rel=1e-5)
    assert tokenizer("a").shape == (1, 16)


def test_the_triple_opens_a_run_whose_towers_trained(
    tiny_store: Path,
    shapes_once: Path,
    tmp_path: Path,
) -> None:
    media = FolderMedia(root=shapes_once.parent)
    recipe = load_recipe("lilt-d", ["schedule.epochs=1", "schedule.batch_size=4"])
    fit_encoder(
        FeatureStore.open(tiny_store),
        recipe=recipe,
        out=tmp_path / "run",
        spec=FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu"),
        open_image=lambda key: load_image(key, media).image,
    )
    model, preprocess, tokenizer = open_clip_triple(tmp_path / "run")
    original = apecache.load(tmp_path / "run", device="cpu")
    images = probe_images()
    pixels = torch.stack([preprocess(image) for image in images])
    found = model.encode_image(pixels).numpy()
    assert abs(found - original.encode_image(images)).max() < 1e-5
    texts = ["a red circle", "the photo of a blue square"]
    found = model.encode_text(tokenizer(texts)).numpy()
    assert abs(found - original.encode_text(texts)).max() < 1e-5
