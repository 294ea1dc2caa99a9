"""Features as tensors and as a torch Dataset of pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Grown

import apecache
from apecache.train.pair_dataset import PairDataset


def test_features_are_a_tensor_in_one_line(tiny_store: Path) -> None:
    array = apecache.FeatureStore.open(tiny_store).array("image")
    stored = array.load()
    assert torch.equal(array.tensor(), torch.from_numpy(stored))
    wide = array.tensor(torch.float32)
    assert wide.dtype == torch.float32
    assert np.array_equal(wide.numpy(), stored.astype(np.float32))


def test_every_caption_comes_with_its_image(tiny_store: Path) -> None:
    store = apecache.FeatureStore.open(tiny_store)
    dataset = PairDataset(store, "train")
    pairs = store.pairs
    assert len(dataset) == 16
    assert set(dataset.keys) == {pairs.keys[row] for row in np.flatnonzero(pairs.splits == "train")}
    image = store.array("image").tensor(torch.float32)
    text = store.array("text").tensor(torch.float32)
    for number, caption in enumerate(dataset.captions):
        (row,) = np.flatnonzero(pairs.captions == caption)
        image_features, text_features = dataset[number]
        assert torch.equal(text_features, text[row])
        assert torch.equal(image_features, image[pairs.image_rows[row]])
        assert dataset.keys[dataset.image_of_text[number]] == pairs.keys[pairs.image_rows[row]]


def test_a_data_loader_takes_it(tiny_store: Path) -> None:
    dataset = PairDataset(apecache.FeatureStore.open(tiny_store))
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    batches = list(loader)
    assert [len(text) for _, text in batches] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat([text for _, text in batches]), dataset.text)


def test_what_could_not_be_encoded_is_left_out(grown: Grown) -> None:
    store = apecache.FeatureStore.open(grown.store)
    dataset = PairDataset(store)
    n_bad = store.array("image").n_quarantined
    assert n_bad > 0
    assert len(dataset) < len(store.pairs.captions)
    assert torch.isfinite(dataset.image).all()
    assert torch.isfinite(dataset.text).all()


def test_an_unknown_split_is_refused_by_name(tiny_store: Path) -> None:
    with pytest.raises(apecache.ApecacheError, match=r"no split 'tarin'.*train"):
        PairDataset(apecache.FeatureStore.open(tiny_store), "tarin")
