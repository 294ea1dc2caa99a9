"""Stores of made-up features, some of whose captions belong to other images."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apecache.store.reader import FeatureStore

N_IMAGES = 320
N_CAPTIONS = 3
SPLITS = ["train"] * 260 + ["val"] * 60


class Planted(NamedTuple):
    store: FeatureStore
    wrong: NDArray[np.bool_]
    """bool [n_texts], captions of other images."""


def write_planted(write_store: Any, folder: Any, share_wrong: float, encoders: int = 1) -> Planted:
    """Images and captions are linear views of hidden numbers. Two images of val equal images of
    train. A second encoder is a noisier one."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(N_IMAGES, 10))
    hidden[300:302] = hidden[0:2]
    owners = np.repeat(np.arange(N_IMAGES), N_CAPTIONS)
    described = owners.copy()
    wrong = np.zeros(len(owners), dtype=bool)
    is_train = owners < 260
    wrong[rng.choice(np.flatnonzero(is_train), round(share_wrong * is_train.sum()), False)] = True
    # A derangement: each wrong caption describes the image of another wrong one.
    described[wrong] = np.roll(described[wrong], 1)
    to_text = rng.normal(size=(10, 16))
    text = (hidden[described] + 0.3 * rng.normal(size=(len(owners), 10))) @ to_text
    for number in range(encoders):
        noise = 0.3 + number
        image = (hidden + noise * rng.normal(size=hidden.shape)) @ rng.normal(size=(10, 24))
        image[300:302] = image[0:2]
        store = write_store(
            folder,
            image.astype(np.float32),
            text.astype(np.float32),
            owners.tolist(),
            SPLITS,
            names=(f"eye{number}", "words"),
            modalities=("image", "text") if number == 0 else ("image",),
        )
    return Planted(store, wrong)
