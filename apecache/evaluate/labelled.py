"""Images with labels and their features by a run's own encoder, encoded once and kept beside the run."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.pairs import Pair, PairSource
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import BadRowsError, DataError, ManifestError, RowError, nearest
from apecache.evaluate.embeddings import embed_rows, find_features
from apecache.extraction import ExtractSpec, Progress, Standing, extract
from apecache.fingerprint import digest_strings
from apecache.recipes.runs import BATCH, Run
from apecache.recipes.trained_encoders import TrainedTower
from apecache.store.reader import FeatureStore

READERS = 4


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
    """Images that could be read: `embedded` [n, out_dim] by the run, and the label and split of each. `all_labels`:
    those of the unreadable ones too."""

    embedded: Tensor
    labels: list[str]
    splits: list[str]
    all_labels: list[str]


@dataclass(frozen=True)
class LabelledFeatures(LabelledImages):
    """And `features` [n, dim] of the same images, as the encoder gives them before any training."""

    features: Tensor


def labelled_images(run: Run, spec: LabelledSpec, progress: Progress = lambda *_: None) -> LabelledImages:
    """Every image is encoded once: by an image tower that was trained, or else into the cache of the frozen encoder.

    Raises:
        ManifestError: no such split, or an image without a label. MismatchError: an encoder that is not the run's.
        DataError: no image that can be read. BadRowsError: more than `max_bad` of them cannot be.
    """
    if isinstance(run.image, TrainedTower):
        return _by_tower(run.image, _labelled(spec.labels, spec.splits), spec.max_bad, progress)
    return labelled_features(run, spec, progress)


def labelled_features(run: Run, spec: LabelledSpec, progress: Progress = lambda *_: None) -> LabelledFeatures:
    """Also where the image tower was trained, whose images are then encoded twice. Raises as `labelled_images` does."""
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
    embedded = embed_rows(run.image, store, "image", rows, lambda key: load_image(key, source.media).image)
    return LabelledFeatures(embedded, *_columns(source, rows.tolist()), torch.from_numpy(array.load()[rows]))


def _by_tower(tower: TrainedTower, source: PairSource, max_bad: float, progress: Progress) -> LabelledImages:
    parts, rows, bad = list[Tensor](), list[int](), list[RowError]()
    for begin in range(0, len(source), BATCH):
        pairs = source.pairs[begin : begin + BATCH]
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(lambda pair: _read(pair.key, source), pairs))
        images = [image for image in read if not isinstance(image, RowError)]
        bad += [error for error in read if isinstance(error, RowError)]
        rows += [begin + i for i, image in enumerate(read) if not isinstance(image, RowError)]
        parts.append(tower.embed(images))
        progress(Standing("image", begin + len(pairs), len(source), len(bad)))
    if len(bad) > max_bad * len(source):
        raise BadRowsError(
            f"{len(bad)} of {len(source)} images cannot be read (the first: {bad[0]}); mend them, or accept with "
            "--max-bad"
        )
    if not rows:
        raise DataError(f"{source.origin}: none of its {len(source)} images could be read")
    return LabelledImages(torch.cat(parts), *_columns(source, rows))


def _read(key: str, source: PairSource) -> Image.Image | RowError:
    try:
        return load_image(key, source.media).image
    except RowError as error:
        return error


def _columns(source: PairSource, rows: list[int]) -> tuple[list[str], list[str], list[str]]:
    """(labels, splits) of these rows, and all labels."""
    pairs = [source.pairs[row] for row in rows]
    return [pair.label for pair in pairs], [pair.split for pair in pairs], [pair.label for pair in source]


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
