"""Zero-shot classification: class names through prompt templates, images by the run's own encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.encoders.spec import EncoderSpec
from apecache.errors import OptionError
from apecache.evaluate.labelled import LabelledSpec, labelled_images
from apecache.evaluate.prompts import TEMPLATES
from apecache.extraction import Progress
from apecache.recipes.runs import Embed, Run, text_embedder


@dataclass(frozen=True)
class ZeroShotSpec:
    """`images`: what to classify. `text`: a text encoder that has moved, in place of the one that the run names."""

    images: LabelledSpec
    templates: tuple[str, ...] = TEMPLATES
    text: EncoderSpec | None = None


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


def zero_shot(run: Run, spec: ZeroShotSpec, progress: Progress = lambda *_: None) -> ZeroShotReport:
    """Classify labelled images by their nearest class name.

    Raises:
        ManifestError: no such split, or an image without a label. MismatchError: an encoder that is not the run's.
        OptionError: a template without {}. DataError: no image that can be read.
    """
    _require_templates(spec.templates)
    embed_texts = text_embedder(run.text, spec.images.device, spec.text)
    found = labelled_images(run, spec.images, progress)  # after both encoders were compared
    classes = tuple(sorted(set(found.all_labels)))
    weights = class_embeddings(embed_texts, classes, spec.templates).to(found.embedded.device)
    return classification_report(
        found.embedded @ weights.T, [classes.index(label) for label in found.labels], classes, spec.templates
    )


def class_embeddings(embed_texts: Embed, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """float32 [n_classes, dim]: the normalised mean over templates of each class's normalised embeddings."""
    texts = [template.replace("{}", name.replace("_", " ")) for name in classes for template in templates]
    embedded = embed_texts(texts).view(len(classes), len(templates), -1)
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


def _require_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if "{}" not in template:
            raise OptionError(f"template {template!r} has no {{}} for the class name")
