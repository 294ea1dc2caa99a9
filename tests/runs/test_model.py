"""A run in use: the same embeddings as those of the store, from images and texts alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import apecache
from apecache.encoders.spec import parse_encoder
from apecache.errors import DataError, MismatchError, OptionError, RunError
from apecache.evaluate.embeddings import embed_store
from apecache.heads.head import HeadSpec
from apecache.heads.tokens import TokenHead
from apecache.runs.heads import load_heads, save_heads
from apecache.runs.model import BATCH, ImageTextModel
from apecache.store.reader import FeatureStore


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> ImageTextModel:
    return apecache.load(tiny_run, device="cpu")


def test_embeddings_are_those_of_the_store(
    model: ImageTextModel,
    tiny_store: Path,
    shapes_once: Path,
) -> None:
    store = FeatureStore.open(tiny_store)
    wanted = embed_store(model.run, store)
    keys = [store.pairs.keys[row] for row in wanted.image_rows]
    image = model.encode_image([shapes_once.parent / key for key in keys])
    text = model.encode_text([str(store.pairs.captions[row]) for row in wanted.text_rows])
    for found, expected in ((image, wanted.image), (text, wanted.text)):
        assert found.dtype == np.float32
        assert found.shape == tuple(expected.shape)
        assert np.abs((found * found).sum(1) - 1).max() < 1e-5
        assert (found * expected.numpy()).sum(1).min() > 1 - 1e-5  # features are stored as float16
    assert model.dim == image.shape[1]
    assert model.similarity(image, text) == pytest.approx(model.scale * image @ text.T, abs=1e-4)


def test_paths_strings_and_pictures_are_the_same_images(
    model: ImageTextModel,
    shapes_once: Path,
) -> None:
    path = sorted((shapes_once.parent / "images").iterdir())[0]
    with Image.open(path) as picture:
        found = model.encode_image([path, str(path), picture, picture.convert("RGBA")])
    assert np.abs(found - found[0]).max() < 1e-6


def test_more_than_a_batch_keeps_its_order(model: ImageTextModel) -> None:
    colors = ["red", "green", "blue"]
    texts = [f"a {colors[i % 3]} circle" for i in range(2 * BATCH + 5)]
    found = model.encode_text(texts)
    assert len(found) == len(texts)
    assert np.abs(found - model.encode_text(texts[:3])[np.arange(len(texts)) % 3]).max() < 1e-5


def test_nothing_gives_nothing(model: ImageTextModel) -> None:
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, model.dim)


def test_what_cannot_be_encoded_is_named(model: ImageTextModel, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"image cannot be read: .*x\.png is a web page; expected JPEG"
    ):
        model.encode_image([tmp_path / "x.png"])
    with pytest.raises(DataError, match="text 1: the caption is empty"):
        model.encode_text(["a", " "])
    with pytest.raises(OptionError, match="found a single str; put it in brackets"):
        model.encode_text("a dog")
    with pytest.raises(OptionError, match="put it in brackets"):
        model.encode_image("photo.jpg")
    with pytest.raises(RunError, match="not a finished run"):
        apecache.load(tmp_path)


def test_an_encoder_that_has_changed_is_refused(tiny_run: Path, other_text_encoder: Path) -> None:
    other = apecache.load(
        tiny_run,
        text=parse_encoder(f"hf:{other_text_encoder}", "text"),
        device="cpu",
    )
    with pytest.raises(MismatchError, match="not of the encoder that the head was trained on"):
        other.encode_text(["a circle"])


def test_an_encoder_that_has_moved_is_given(
    tiny_run: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    moved = shutil.copytree(tiny_text_encoder, tmp_path / "moved")
    model = apecache.load(tiny_run, text=parse_encoder(f"hf:{moved}", "text"), device="cpu")
    assert np.array_equal(
        model.encode_text(["a circle"]),
        apecache.load(tiny_run).encode_text(["a circle"]),
    )


def test_heads_on_tokens_see_the_tokens_that_are_there(
    model: ImageTextModel,
    tmp_path: Path,
) -> None:
    """A long and a short text in one batch give what each gives alone."""
    from apecache.encoders.load import load_text_encoder
    from apecache.encoders.spec import spec_from_json
    from apecache.runs.heads import TrainedSide

    side = model.run.text
    spec = replace(spec_from_json(side.encoder), pooling="tokens")
    head = TokenHead(
        HeadSpec(kind="attention", dim=model.dim, n_heads=2),
        side.head.in_dim,
        model.dim,
    )
    tokens = TrainedSide(
        head=head,
        encoder=vars(spec),
        fingerprint=load_text_encoder(spec, "cpu").fingerprint,
    )
    save_heads(replace(model.run, text=tokens), tmp_path / "run")
    assert isinstance(load_heads(tmp_path / "run").text.head, TokenHead)
    loaded = apecache.load(tmp_path / "run", device="cpu")
    texts = ["a circle", "a photo of the red square on the white shape in a drawing"]
    together = loaded.encode_text(texts)
    alone = np.concatenate([loaded.encode_text([text]) for text in texts])
    assert torch.allclose(torch.from_numpy(together), torch.from_numpy(alone), atol=1e-5)
