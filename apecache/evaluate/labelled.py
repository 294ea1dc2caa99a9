"""Images with labels and their features by a run's own encoder, encoded once and kept beside the run."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.pairs import Pair, PairSource
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import DataError, ManifestError, nearest
from apecache.evaluate.embeddings import embed_rows, find_features
from apecache.extraction import ExtractSpec, Progress, extract
from apecache.fingerprint import digest_strings
from apecache.recipes.runs import Run
from apecache.store.reader import FeatureStore


@dataclass(frozen=True)
class LabelledSpec:
    """`labels`: images with labels. `caches`: where their features are kept for the next time. `splits`: only images of
    these. `image`: the image encoder, if it has moved."""

    labels: PairSource
    caches: Path
    splits: tuple[str, ...] = ()
    image: EncoderSpec | None = None
    device: str = "auto"
    max_bad: float = 0.01


@dataclass(frozen=True)
class LabelledImages:
    """Images that could be read: `features` [n, dim] as the encoder gives them before any training, `embedded`
    [n, out_dim] by the run, and the label and split of each. `all_labels`: those of the unreadable ones too."""

    features: Tensor
    embedded: Tensor
    labels: list[str]
    splits: list[str]
    all_labels: list[str]


def labelled_images(run: Run, spec: LabelledSpec, progress: Progress = lambda *_: None) -> LabelledImages:
    """Raises:
    ManifestError: no such split, or an image without a label. MismatchError: an encoder that is not the run's.
    DataError: no image that can be read.
    """
    source = _labelled(spec.labels, spec.splits)
    image_spec = spec.image or spec_from_json(run.image.encoder)
    encoder = load_image_encoder(image_spec, spec.device)  # compared before the cache is filled with its features
    run.image.require_encoder(encoder.fingerprint, f"image encoder {image_spec}")
    path = spec.caches / digest_strings([source.digest, source.media.place])[:16]  # another root has other files
    extract(source, path, ExtractSpec(image=image_spec, device=spec.device, max_bad=spec.max_bad), progress)
    store = FeatureStore.open(path)
    array = find_features(run.image, store, "image")
    rows = np.flatnonzero(array.load_ok())
    if not len(rows):
        raise DataError(f"{store.source['origin']}: none of its {array.rows} images could be read")
    labels, splits = ([str(column[row]) for row in rows] for column in (store.pairs.labels, store.pairs.splits))
    embedded = embed_rows(run.image, store, "image", rows, lambda key: load_image(key, source.media).image)
    all_labels = [pair.label for pair in source]
    return LabelledImages(torch.from_numpy(array.load()[rows]), embedded, labels, splits, all_labels)


def _labelled(source: PairSource, splits: tuple[str, ...]) -> PairSource:
    """Images of the splits, without captions."""
    there = {pair.split for pair in source}
    for split in splits:
        if split not in there:
            found = ", ".join(sorted(name or "(none)" for name in there))
            raise ManifestError(f"{source.origin}: no split {split!r}; found: {found}{nearest(split, there)}")
    pairs = [pair for pair in source if not splits or pair.split in splits]
    unlabelled = next((pair.key for pair in pairs if not pair.label.strip()), None)
    if unlabelled is not None:
        raise ManifestError(f"{source.origin}: image {unlabelled} has no label")
    return replace(source, pairs=tuple(Pair(p.key, (), (), p.split, p.label) for p in pairs))
