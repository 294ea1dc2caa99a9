"""Zero-shot classification: class names through prompt templates, images by the run's own encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.data.pairs import Pair, PairSource
from apecache.encoders.encoder import TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import DataError, ManifestError, OptionError, nearest
from apecache.evaluate.embeddings import find_features
from apecache.extraction import ExtractSpec, Progress, extract
from apecache.fingerprint import digest_strings
from apecache.heads.checkpoint import TrainedHeads
from apecache.store.reader import FeatureStore

TEMPLATES = ("a photo of {}",)
"""LilT's single prompt."""


@dataclass(frozen=True)
class ZeroShotSpec:
    """`labels`: images with labels. `caches`: where the images' features are kept for the next time.

    `image`, `text`: encoders that have moved, in place of those that the run names.
    """

    labels: PairSource
    caches: Path
    split: str | None = None
    templates: tuple[str, ...] = TEMPLATES
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"
    max_bad: float = 0.01


@dataclass(frozen=True)
class ZeroShotReport:
    """Accuracies in per cent; `mean_per_class` is the mean over classes of their top-1 recall."""

    top1: float
    top5: float
    mean_per_class: float
    n_images: int
    n_classes: int
    chance_top1: float
    chance_top5: float
    templates: tuple[str, ...]
    classes: tuple[str, ...]


def zero_shot(heads: TrainedHeads, spec: ZeroShotSpec, progress: Progress = lambda *_: None) -> ZeroShotReport:
    """Classify labelled images by their nearest class name.

    Raises:
        ManifestError: no such split, or an image without a label. MismatchError: an encoder that is not the run's.
        OptionError: a template without {}. DataError: no image that can be read.
    """
    _require_templates(spec.templates)
    source = _labelled(spec.labels, spec.split)
    image_spec = spec.image or spec_from_json(heads.image.encoder)
    image_encoder = load_image_encoder(image_spec, spec.device)  # compared before the cache is filled with its features
    heads.image.require_encoder(image_encoder.fingerprint, f"image encoder {image_spec}")
    text_encoder = load_text_encoder(spec.text or spec_from_json(heads.text.encoder), spec.device)
    heads.text.require_encoder(text_encoder.fingerprint, f"text encoder {text_encoder.spec}")
    store = spec.caches / digest_strings([source.digest, source.media.place])[:16]  # another root has other files
    options = ExtractSpec(image=image_spec, device=spec.device, max_bad=spec.max_bad)
    extract(source, store, options, progress)
    images, labels = _embed_images(heads, FeatureStore.open(store))
    classes = tuple(sorted({pair.label for pair in source}))
    weights = class_embeddings(heads, text_encoder, classes, spec.templates).to(images.device)
    return classification_report(
        images @ weights.T, [classes.index(label) for label in labels], classes, spec.templates
    )


def class_embeddings(
    heads: TrainedHeads, encoder: TextEncoder, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """float32 [n_classes, dim]: the normalised mean over templates of each class's normalised embeddings."""
    texts = [template.replace("{}", name.replace("_", " ")) for name in classes for template in templates]
    embedded = heads.text.embed(encoder.encode(texts)).view(len(classes), len(templates), -1)
    return F.normalize(embedded.mean(1), dim=-1)


def classification_report(
    scores: Tensor, targets: Sequence[int], classes: tuple[str, ...], templates: tuple[str, ...] = TEMPLATES
) -> ZeroShotReport:
    """From scores [n_images, n_classes]; a wrong class that scores as high as the right one ranks before it."""
    target = torch.tensor(targets, device=scores.device)
    own = scores.gather(1, target.unsqueeze(1))
    ranks = (scores >= own).sum(1) - 1
    hit = (ranks < 1).double()
    n_classes = len(classes)
    per_class = torch.zeros(n_classes, dtype=torch.double, device=scores.device).index_add_(0, target, hit)
    counts = torch.bincount(target, minlength=n_classes)
    present = counts > 0
    return ZeroShotReport(
        100 * float(hit.mean()),
        100 * float((ranks < 5).double().mean()),
        100 * float((per_class[present] / counts[present]).mean()),
        len(target),
        n_classes,
        100 / n_classes,
        100 * min(1.0, 5 / n_classes),
        templates,
        classes,
    )


def _labelled(source: PairSource, split: str | None) -> PairSource:
    """Images of the split, without captions."""
    splits = {pair.split for pair in source}
    if split is not None and split not in splits:
        found = ", ".join(sorted(name or "(none)" for name in splits))
        raise ManifestError(f"{source.origin}: no split {split!r}; found: {found}{nearest(split, splits)}")
    pairs = [pair for pair in source if split in (None, pair.split)]
    unlabelled = next((pair.key for pair in pairs if not pair.label.strip()), None)
    if unlabelled is not None:
        raise ManifestError(f"{source.origin}: image {unlabelled} has no label")
    return replace(source, pairs=tuple(Pair(p.key, (), (), p.split, p.label) for p in pairs))


def _embed_images(heads: TrainedHeads, store: FeatureStore) -> tuple[Tensor, list[str]]:
    """Embeddings and labels of the images that could be read."""
    array = find_features(heads.image, store, "image")
    rows = np.flatnonzero(array.load_ok())
    if not len(rows):
        raise DataError(f"{store.source['origin']}: none of its {array.rows} images could be read")
    return heads.image.embed(torch.from_numpy(array.load()[rows])), [str(store.pairs.labels[row]) for row in rows]


def _require_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if "{}" not in template:
            raise OptionError(f"template {template!r} has no {{}} for the class name")
