"""Images or texts with labels and their features by a run's own encoder, encoded once and kept
beside the run."""

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
from apecache.errors import BadRowsError, DataError, ManifestError, RowError, nearest
from apecache.evaluate.embeddings import embed_rows, find_features, load_lengths
from apecache.evaluate.left_out import LeftOut
from apecache.extraction.run import ExtractSpec, Progress, Standing, extract
from apecache.fingerprint import Modality, digest_strings
from apecache.heads.head import mask_of
from apecache.heads.tokens import masked_mean
from apecache.runs.encoders import TrainedTower
from apecache.runs.load import BATCH, Run
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore

READERS = 4


@dataclass(frozen=True)
class LabelledSpec:
    """`labels`: images with labels, or captions whose label is that of their pair. `caches`: where
    their features are kept for the next time. `splits`: only what is in these. `encoder`: that of
    the modality, if it has moved."""

    labels: PairSource
    caches: AnyPath
    splits: tuple[str, ...] = ()
    encoder: EncoderSpec | None = None
    device: str = "auto"
    max_bad: float = 0.01
    modality: Modality = "image"


@dataclass(frozen=True, kw_only=True)
class LabelledEmbeddings:
    """What could be read: `embedded` [n, out_dim] by the run, and the label and split of each.
    `left_out`: how many could not."""

    embedded: Tensor
    labels: list[str]
    splits: list[str]
    left_out: LeftOut


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures(LabelledEmbeddings):
    """And `features` [n, dim] of the same, as the encoder gives them before any training (of tokens
    their mean)."""

    features: Tensor


def labelled_images(
    run: Run,
    spec: LabelledSpec,
    progress: Progress = lambda *_: None,
) -> LabelledEmbeddings:
    """Every image is encoded once: by an image tower that was trained, or else into the cache of
    the frozen encoder.

    Raises:
        BadRowsError: more than `max_bad` of the images cannot be read. Else as `labelled_features`.
    """
    if isinstance(run.image, TrainedTower):
        return _by_tower(run.image, source=_labelled(spec), max_bad=spec.max_bad, progress=progress)
    return labelled_features(run, spec, progress)


def labelled_features(
    run: Run,
    spec: LabelledSpec,
    progress: Progress = lambda *_: None,
) -> LabelledFeatures:
    """Of images, or of texts. By a tower that was trained they are encoded twice, for the features
    before it.

    Raises:
        ManifestError: no such split, or a row without a label. MismatchError: an encoder that is
            not the run's.
        DataError: no image or text that can be read.
    """
    source = _labelled(spec)
    side = getattr(run, spec.modality)
    named = spec.encoder or spec_from_json(side.encoder)
    load = load_image_encoder if spec.modality == "image" else load_text_encoder
    encoder = load(named, spec.device)  # compared before the cache is filled with its features
    side.require_encoder(encoder.fingerprint, f"{spec.modality} encoder {named}")
    name = digest_strings([source.digest, source.media.place])[:16]  # another root has other files
    with _cache_folder(as_path(spec.caches, "caches"), name) as path:
        image, text = (named, None) if spec.modality == "image" else (None, named)
        extract(
            source,
            path,
            ExtractSpec(image, text, device=spec.device, max_bad=spec.max_bad),
            progress,
        )
        return _embedded(run, spec=spec, source=source, store=FeatureStore.open(path))


@contextmanager
def _cache_folder(caches: Path, name: str) -> Iterator[Path]:
    """The features' folder in `caches`, or a temporary one where nothing can be written beside the
    run.

    Features that are there already are read in place, also from a read-only file system.
    """
    kept = caches / name
    if kept.exists() or is_writable(caches):
        yield kept
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / name


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written into, or made. A read-only mount refuses root, too."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _embedded(
    run: Run,
    spec: LabelledSpec,
    source: PairSource,
    store: FeatureStore,
) -> LabelledFeatures:
    side = getattr(run, spec.modality)
    array = find_features(side, store, spec.modality)
    rows = np.flatnonzero(array.load_ok())
    if not len(rows):
        raise DataError(
            f"{store.source['origin']}: none of its {array.rows} {spec.modality}s could be read"
        )
    owners = rows if spec.modality == "image" else store.pairs.image_rows[rows]
    labels, splits = (
        [str(column[row]) for row in owners] for column in (store.pairs.labels, store.pairs.splits)
    )
    embedded = embed_rows(
        side,
        store=store,
        modality=spec.modality,
        rows=rows,
        open_image=lambda key: load_image(key, source.media).image,
    )
    n_unreadable = array.rows - len(rows)
    counted = {
        "unreadable_images" if spec.modality == "image" else "unreadable_texts": n_unreadable
    }
    return LabelledFeatures(
        embedded=embedded,
        labels=labels,
        splits=splits,
        left_out=LeftOut(**counted),
        features=_pooled(array, rows),
    )


def _by_tower(
    tower: TrainedTower,
    source: PairSource,
    max_bad: float,
    progress: Progress,
) -> LabelledEmbeddings:
    parts = list[Tensor]()
    good = list[Pair]()
    bad = list[RowError]()
    for begin in range(0, len(source), BATCH):
        pairs = source.pairs[begin : begin + BATCH]
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(lambda pair: _read(pair.key, source), pairs))
        images = [image for image in read if not isinstance(image, RowError)]
        bad += [error for error in read if isinstance(error, RowError)]
        good += [
            pair for pair, image in zip(pairs, read, strict=True) if not isinstance(image, RowError)
        ]
        parts.append(tower.embed(images))
        progress(
            Standing(modality="image", done=begin + len(pairs), rows=len(source), n_bad=len(bad))
        )
    if len(bad) > max_bad * len(source):
        raise BadRowsError(
            f"{len(bad)} of {len(source)} images cannot be read (the first: {bad[0]}); mend them, "
            "or accept with "
            "--max-bad"
        )
    if not good:
        raise DataError(f"{source.origin}: none of its {len(source)} images could be read")
    labels = [pair.label for pair in good]
    splits = [pair.split for pair in good]
    return LabelledEmbeddings(
        embedded=torch.cat(parts),
        labels=labels,
        splits=splits,
        left_out=LeftOut(unreadable_images=len(bad)),
    )


def _read(key: str, source: PairSource) -> Image.Image | RowError:
    try:
        return load_image(key, source.media).image
    except RowError as error:
        return error


def wanted_labels(spec: LabelledSpec) -> list[str]:
    """Of every image or text that is asked for, readable or not. Raises ManifestError as
    `labelled_features` does."""
    return [pair.label for pair in _labelled(spec)]


def _pooled(array: FeatureArray, rows: NDArray[np.int64]) -> Tensor:
    features = torch.from_numpy(array.load()[rows])
    lengths = load_lengths(array)
    if features.ndim == 2:
        return features
    mask = None if lengths is None else mask_of(lengths[torch.from_numpy(rows)], features)
    return masked_mean(features.float(), mask)


def _labelled(spec: LabelledSpec) -> PairSource:
    """All images of the splits, their captions put aside, or texts of the splits."""
    require_type(spec.labels, PairSource, "labels")
    source = spec.labels
    there = {pair.split for pair in spec.labels}
    for split in spec.splits:
        if split not in there:
            found = ", ".join(sorted(name or "(none)" for name in there))
            raise ManifestError(
                f"{source.origin}: no split {split!r}; found: {found}{nearest(split, there)}"
            )
    pairs = [pair for pair in source if not spec.splits or pair.split in spec.splits]
    unlabelled = next((pair.key for pair in pairs if not pair.label.strip()), None)
    if unlabelled is not None:
        what = "image" if spec.modality == "image" else "row"
        raise ManifestError(f"{source.origin}: {what} {unlabelled} has no label")
    if spec.modality == "text":
        return replace(source, pairs=tuple(pairs))
    return replace(
        source,
        pairs=tuple(
            Pair(key=p.key, captions=(), languages=(), split=p.split, label=p.label) for p in pairs
        ),
    )
