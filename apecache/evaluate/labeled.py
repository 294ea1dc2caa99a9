"""Embed images or texts with labels; their features are encoded once and stored beside the run."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.data.images import load_image
from apecache.data.pairs import Pair, PairSource
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import BadRowsError, DataError, ManifestError, RowError, counted, nearest
from apecache.evaluate.embeddings import embed_rows, find_features, load_lengths
from apecache.evaluate.left_out import LeftOut
from apecache.extraction.report import accepting
from apecache.extraction.run import ExtractionProgress, ExtractionState, ExtractSpec, extract
from apecache.fingerprint import Modality, digest_strings
from apecache.heads.head import mask_of
from apecache.heads.tokens import masked_mean
from apecache.runs.encoders import TrainedTower
from apecache.runs.load import BATCH, Run
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore

READERS = 4
"""Threads that decode images for a trained tower."""


@dataclass(frozen=True)
class LabeledSpec:
    """Say which images or texts are embedded, and how."""

    labels: PairSource
    """Images with labels, or captions with the label of their pair."""
    caches: AnyPath
    """Folder where the features are stored for the next time."""
    splits: tuple[str, ...] = ()
    """Only these splits. Empty: all."""
    encoder: EncoderSpec | None = None
    """The encoder of the modality, if it has moved."""
    device: str = "auto"
    max_bad: float = 0.01
    """Share of unreadable rows that is accepted."""
    modality: Modality = "image"


@dataclass(frozen=True, kw_only=True)
class LabeledEmbeddings:
    """Hold the embeddings of the n images or texts that could be read."""

    embedded: Tensor
    """[n, out_dim], by the run."""
    labels: list[str]
    """The label of each."""
    splits: list[str]
    """The split of each."""
    left_out: LeftOut
    """Counts of rows that could not be read."""


@dataclass(frozen=True, kw_only=True)
class LabeledFeatures(LabeledEmbeddings):
    """Hold the embeddings, and the features before any training."""

    features: Tensor
    """[n, dim], of the pretrained encoder; of token features their mean."""


def labeled_images(
    run: Run,
    spec: LabeledSpec,
    progress: ExtractionProgress = lambda *_: None,
) -> LabeledEmbeddings:
    """Embed labeled images; every image is encoded once.

    A trained image tower embeds them directly. Otherwise the features of the frozen encoder are
    stored in the cache.

    Raises:
        BadRowsError: more than `max_bad` of the images cannot be read.
        ManifestError, MismatchError, DataError: as `labeled_features`.
    """
    if isinstance(run.image, TrainedTower):
        return _by_tower(run.image, source=_labeled(spec), max_bad=spec.max_bad, progress=progress)
    return labeled_features(run, spec, progress)


def labeled_features(
    run: Run,
    spec: LabeledSpec,
    progress: ExtractionProgress = lambda *_: None,
) -> LabeledFeatures:
    """Embed labeled images or texts, and return their features too.

    With a trained tower they are encoded twice, as the features are those before training.

    Raises:
        ManifestError: no such split, or a row without a label.
        MismatchError: an encoder that is not the run's.
        DataError: no image or text that can be read.
    """
    source = _labeled(spec)
    side = getattr(run, spec.modality)
    named = spec.encoder or spec_from_json(side.encoder)
    load = load_image_encoder if spec.modality == "image" else load_text_encoder
    # Compared before the cache is filled with features of the wrong encoder.
    encoder = load(named, spec.device)
    side.require_encoder(encoder.fingerprint, f"{spec.modality} encoder {named}")
    # The place is in the name, because the same table on another root has other files.
    name = digest_strings([source.digest, source.media.place])[:16]
    extract_spec = ExtractSpec(
        image=named.singles if spec.modality == "image" else None,
        text=named.singles if spec.modality == "text" else None,
        device=spec.device,
        max_bad=spec.max_bad,
    )
    with _cache_folder(as_path(spec.caches, "caches"), name) as path:
        extract(source, path, extract_spec, progress)
        return _embedded(run, spec=spec, source=source, store=FeatureStore.open(path))


@contextmanager
def _cache_folder(caches: Path, name: str) -> Iterator[Path]:
    """Yield the folder of the features in `caches`, or a temporary one if `caches` is read-only.

    Existing features are read in place, also from a read-only file system.
    """
    cache = caches / name
    if cache.exists() or is_writable(caches):
        yield cache
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / name


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written into, or created."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    # `os.access` and not the mode bits: a read-only mount refuses root, too.
    return os.access(existing, os.W_OK | os.X_OK)


def _embedded(
    run: Run,
    spec: LabeledSpec,
    source: PairSource,
    store: FeatureStore,
) -> LabeledFeatures:
    side = getattr(run, spec.modality)
    array = find_features(side, store, spec.modality)
    rows = np.flatnonzero(array.load_ok())
    if not len(rows):
        raise DataError(
            f"{store.source['origin']}: none of its {array.rows} {spec.modality}s could be read"
        )
    owners = rows if spec.modality == "image" else store.pairs.image_rows[rows]
    labels = [str(store.pairs.labels[row]) for row in owners]
    splits = [str(store.pairs.splits[row]) for row in owners]
    embedded = embed_rows(
        side,
        store=store,
        modality=spec.modality,
        rows=rows,
        open_image=lambda key: load_image(key, source.media, source.pixels).image,
    )
    n_unreadable = array.rows - len(rows)
    is_image = spec.modality == "image"
    left_out = LeftOut(
        unreadable_images=n_unreadable if is_image else 0,
        unreadable_texts=0 if is_image else n_unreadable,
    )
    return LabeledFeatures(
        embedded=embedded,
        labels=labels,
        splits=splits,
        left_out=left_out,
        features=_pooled(array, rows),
    )


def _by_tower(
    tower: TrainedTower,
    source: PairSource,
    max_bad: float,
    progress: ExtractionProgress,
) -> LabeledEmbeddings:
    """Embed images with a trained tower, batch by batch; unreadable ones are skipped."""
    embedded_batches = list[Tensor]()
    good = list[Pair]()
    bad = list[RowError]()
    for begin in range(0, len(source), BATCH):
        pairs = source.pairs[begin : begin + BATCH]
        with ThreadPoolExecutor(READERS) as pool:
            images_or_errors = list(pool.map(lambda pair: _read(pair.key, source), pairs))
        images = []
        for pair, image in zip(pairs, images_or_errors, strict=True):
            if isinstance(image, RowError):
                bad.append(image)
            else:
                images.append(image)
                good.append(pair)
        embedded_batches.append(tower.embed(images))
        n_done = begin + len(pairs)
        progress(ExtractionState(modality="image", done=n_done, rows=len(source), n_bad=len(bad)))
    if len(bad) > max_bad * len(source):
        raise BadRowsError(
            f"{len(bad)} of {counted(len(source), 'image')} cannot be read (the first: "
            f"{bad[0]}); mend them, or accept this share with {accepting(len(bad), len(source))}"
        )
    if not good:
        raise DataError(
            f"{source.origin}: none of its {counted(len(source), 'image')} could be read"
        )
    labels = [pair.label for pair in good]
    splits = [pair.split for pair in good]
    return LabeledEmbeddings(
        embedded=torch.cat(embedded_batches),
        labels=labels,
        splits=splits,
        left_out=LeftOut(unreadable_images=len(bad)),
    )


def _read(key: str, source: PairSource) -> Image.Image | RowError:
    # The error is returned: raised in a thread it would end the whole batch.
    try:
        return load_image(key, source.media, source.pixels).image
    except RowError as error:
        return error


def wanted_labels(spec: LabeledSpec) -> list[str]:
    """Return the label of every image or text of the splits, readable or not.

    Raises:
        ManifestError: as `labeled_features`.
    """
    return [pair.label for pair in _labeled(spec)]


def _pooled(array: FeatureArray, rows: NDArray[np.int64]) -> Tensor:
    """Load features [n, dim]; token features are averaged."""
    features = torch.from_numpy(array.load()[rows])
    lengths = load_lengths(array)
    if features.ndim == 2:
        return features
    mask = None if lengths is None else mask_of(lengths[torch.from_numpy(rows)], features)
    return masked_mean(features.float(), mask)


def _labeled(spec: LabeledSpec) -> PairSource:
    """Select the images of the splits, without their captions, or the texts of the splits."""
    require_type(spec.labels, PairSource, "labels")
    source = spec.labels
    source_splits = {pair.split for pair in spec.labels}
    for split in spec.splits:
        if split not in source_splits:
            listed_splits = ", ".join(sorted(name or "(none)" for name in source_splits))
            hint = nearest(split, source_splits)
            raise ManifestError(
                f"{source.origin}: no split {split!r}; found: {listed_splits}{hint}"
            )
    pairs = [pair for pair in source if not spec.splits or pair.split in spec.splits]
    unlabeled = next((pair.key for pair in pairs if not pair.label.strip()), None)
    if unlabeled is not None:
        row_word = "image" if spec.modality == "image" else "row"
        raise ManifestError(f"{source.origin}: {row_word} {unlabeled} has no label")
    if spec.modality == "text":
        return replace(source, pairs=tuple(pairs))
    # Without captions the features are found again whatever the captions are.
    images_alone = tuple(
        Pair(key=pair.key, captions=(), languages=(), split=pair.split, label=pair.label)
        for pair in pairs
    )
    return replace(source, pairs=images_alone)
