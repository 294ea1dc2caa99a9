"""Embeddings of a store under trained heads: which rows, in which order, and only of the heads' own
encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apecache.errors import DataError, IncompleteError, MismatchError
from apecache.evaluate.embeddings import embed_store, find_features
from apecache.fingerprint import Fingerprint
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.store.reader import FeatureStore

IMAGE = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
TEXT = np.random.default_rng(1).normal(size=(10, 5)).astype(np.float32)
ROWS = [0, 0, 1, 2, 2, 2, 4, 5, 6, 7]  # image 3 has no caption
SPLITS = ["train", "val", "train", "val", "val", "test", "val", "train"]
BAD = {"bad_images": (6,), "bad_texts": (4, 7)}  # image 5 loses its only caption


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("e") / "s",
        IMAGE,
        TEXT,
        ROWS,
        SPLITS,
        **BAD,
        shard_rows=3,
    )
    return made


def heads_for(image: str = "pixels", text: str = "words") -> TrainedHeads:
    torch.manual_seed(0)
    built = build_heads(
        HeadSpec(dim=4),
        text=HeadSpec(kind="mlp", width=8),
        image_dim=6,
        text_dim=5,
    )
    fingerprints = (
        Fingerprint(fields={"modality": modality, "weights": name})
        for modality, name in (("image", image), ("text", text))
    )
    sides = (
        TrainedSide(head=head.eval(), encoder={}, fingerprint=mark)
        for head, mark in zip(built, fingerprints, strict=True)
    )
    return TrainedHeads(*sides, 10.0)


@pytest.mark.parametrize(
    ("split", "images", "texts"),
    [
        (None, [0, 1, 2, 4, 7], [0, 1, 2, 3, 5, 6, 9]),
        ("train", [0, 2, 7], [0, 1, 3, 5, 9]),
        ("val", [1, 4], [2, 6]),
    ],
)
def test_embedded_are_the_usable_images_of_the_split_with_their_usable_captions(
    split: str | None,
    images: list[int],
    texts: list[int],
    store: FeatureStore,
) -> None:
    heads = heads_for()
    found = embed_store(heads, store, split)
    assert found.image_rows.tolist() == images
    assert found.text_rows.tolist() == texts
    assert found.image_rows[found.image_of_text.numpy()].tolist() == [ROWS[row] for row in texts]
    with torch.no_grad():
        torch.testing.assert_close(found.image, heads.image.head(torch.from_numpy(IMAGE[images])))
        torch.testing.assert_close(found.text, heads.text.head(torch.from_numpy(TEXT[texts])))
    torch.testing.assert_close(found.image, F.normalize(found.image, dim=-1))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(store: FeatureStore) -> None:
    message = (
        r"no split 'vall'; found: train \(3 images\), val \(4 images\), test \(1 image\); did "
        r"you mean val\?"
    )
    with pytest.raises(DataError, match=message):
        embed_store(heads_for(), store, "vall")


def test_a_split_in_which_nothing_is_usable_is_refused(store: FeatureStore) -> None:
    with pytest.raises(DataError, match="split 'test' has no image with a caption"):
        embed_store(heads_for(), store, "test")


@pytest.mark.parametrize(("side", "field"), [("image", "image"), ("text", "text")])
def test_a_store_of_another_encoder_is_refused_with_the_differences(
    side: str,
    field: str,
    store: FeatureStore,
) -> None:
    with pytest.raises(
        MismatchError,
        match=rf"{field} features .* is not of the encoder .* weights: ",
    ) as caught:
        embed_store(heads_for(**{side: "another"}), store)
    assert caught.value.exit_code == 4
    assert [(name, expected) for name, _, expected in caught.value.differences] == [
        ("weights", "another")
    ]


def test_features_are_found_by_their_encoder_whatever_they_are_called(
    write_store: Any,
    tmp_path: Path,
) -> None:
    write_store(tmp_path / "s", IMAGE, TEXT, ROWS, SPLITS, names=("a-first", "a-first"))
    both = write_store(tmp_path / "s", -IMAGE, -TEXT, ROWS, SPLITS)
    found = embed_store(heads_for(), both)
    wanted = heads_for().image.embed(torch.from_numpy(-IMAGE[found.image_rows]))
    torch.testing.assert_close(found.image, wanted)


def test_a_store_without_features_of_a_modality_is_refused(
    write_store: Any,
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "s", IMAGE, TEXT, ROWS, SPLITS, modalities=("image",))
    with pytest.raises(DataError, match="has no text features; make them with: apecache extract"):
        find_features(heads_for().text, store, "text")


def test_an_incomplete_store_is_refused(write_store: Any, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", IMAGE, TEXT, ROWS, SPLITS, shard_rows=2, n_shards=1)
    with pytest.raises(IncompleteError, match="25% done"):
        embed_store(heads_for(), store)


def test_half_precision_features_embed_as_their_own_values_do(
    write_store: Any,
    tmp_path: Path,
) -> None:
    store = write_store(
        tmp_path / "s",
        IMAGE.astype(np.float16),
        TEXT.astype(np.float16),
        ROWS,
        SPLITS,
    )
    found = embed_store(heads_for(), store)
    wanted = heads_for().image.embed(torch.from_numpy(IMAGE.astype(np.float16)[found.image_rows]))
    assert found.image.dtype == torch.float32
    torch.testing.assert_close(found.image, wanted)


def test_a_store_tells_equal_captions_and_equal_images(tmp_path: Path, write_store: Any) -> None:
    store = write_store(
        tmp_path / "s",
        IMAGE[:6],
        TEXT[:6],
        list(range(6)),
        ["val"] * 6,
        captions=["a cat", "A  cat", "a dog", "a bird", "a fish", "a mouse"],
        bad_texts=(3,),
        image_content=["1", "2", "3", "4", "5", "3"],
    )
    embedded = embed_store(heads_for(), store, "val")
    assert embedded.image_rows.tolist() == [0, 1, 2, 4, 5]
    assert embedded.relevance is not None
    right = embedded.relevance.right_texts(torch.arange(5)).int().tolist()
    assert right == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 1],
    ]


def test_a_store_whose_captions_and_images_differ_has_no_relevance(store: FeatureStore) -> None:
    assert embed_store(heads_for(), store).relevance is None
