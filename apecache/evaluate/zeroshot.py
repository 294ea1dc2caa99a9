"""Classify images without training: by the nearest embedding of a class name in a prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apecache.arguments import as_texts, require_spec, require_type
from apecache.encoders.spec import EncoderSpec
from apecache.evaluate.class_names import ClassNames, match_labels
from apecache.evaluate.labeled import LabeledSpec, labeled_images, wanted_labels
from apecache.evaluate.left_out import LeftOut
from apecache.evaluate.prompts import TEMPLATES, check_template
from apecache.extraction.run import ExtractionProgress
from apecache.heads.normalization import normalize
from apecache.metrics.retrieval import TIE
from apecache.runs.encoders import TrainedEncoders
from apecache.runs.heads import TrainedHeads
from apecache.runs.load import Embed, Run, text_embedder

N_CONFUSIONS = 10
"""Confusions that a report lists."""


@dataclass(frozen=True)
class ZeroShotSpec:
    """Say what is classified, and with which class names and prompts."""

    images: LabeledSpec
    """The images to classify."""
    templates: tuple[str, ...] = TEMPLATES
    text: EncoderSpec | None = None
    """The text encoder, if it has moved."""
    names: ClassNames | None = None
    """The class names. None: the labels are the names."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """Hold accuracies, in per cent."""

    top1: float
    top5: float
    mean_per_class: float
    """The mean of the top-1 recalls of the classes that have images."""
    n_images: int
    n_classes: int
    chance_top1: float
    chance_top5: float
    templates: tuple[str, ...]
    classes: tuple[str, ...]
    """All candidates."""
    counts: tuple[int, ...]
    """Images of each class."""
    empty: tuple[str, ...]
    """Classes without images. They are candidates all the same."""
    confusions: tuple[tuple[str, str, int], ...]
    """Class, predicted class, and number of images; the most frequent first."""
    matched: str = ""
    """How labels were matched with classes."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Counts of images that could not be read."""


def zero_shot(
    run: Run,
    spec: ZeroShotSpec,
    progress: ExtractionProgress = lambda *_: None,
) -> ZeroShotReport:
    """Classify labeled images by their nearest class name.

    Raises:
        ManifestError: no such split, or an image without a label.
        MismatchError: an encoder that is not the run's.
        OptionError: a template without {}, or a label that stands for no class.
        DataError: no image that can be read.
    """
    require_type(run, (TrainedHeads, TrainedEncoders), "run")
    require_spec(spec, ZeroShotSpec, "spec")
    require_type(spec.images, LabeledSpec, "images")
    templates = tuple(map(check_template, as_texts(spec.templates, "templates")))
    classes = match_labels(wanted_labels(spec.images), spec.names)
    embed_texts = text_embedder(run.text, spec.images.device, spec.text)
    # The images come last: a wrong text encoder must fail before hours of encoding.
    labeled = labeled_images(run, spec.images, progress)
    weights = class_embeddings(embed_texts, classes.names, templates).to(labeled.embedded.device)
    targets = [classes.place[label] for label in labeled.labels]
    report = classification_report(
        labeled.embedded @ weights.T,
        targets=targets,
        classes=classes.names,
        templates=templates,
    )
    return replace(report, matched=classes.matched, left_out=labeled.left_out)


def class_embeddings(
    embed_texts: Embed,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Embed each class by all templates -> float32 [n_classes, dim], L2-normalized.

    An embedding is the normalized mean of the class's embeddings under the templates.
    """
    texts = []
    for name in classes:
        # Names of folders have underscores for spaces.
        spoken = name.replace("_", " ")
        texts += [template.replace("{}", spoken) for template in templates]
    embedded = embed_texts(texts).view(len(classes), len(templates), -1)
    return normalize(embedded.mean(1), dim=-1)


def classification_report(
    scores: Tensor,
    targets: Sequence[int],
    classes: tuple[str, ...],
    templates: tuple[str, ...] = TEMPLATES,
) -> ZeroShotReport:
    """Report accuracies of scores; a wrong class that scores as high as the right one wins.

    Args:
        scores: [n_images, n_classes].
        targets: the column of each image's class.
        classes: the names of the columns.
        templates: for the report.
    """
    target = torch.tensor(targets, device=scores.device)
    own_score = scores.gather(1, target.unsqueeze(1))
    # Less 1: the own class is at least as high as itself.
    ranks = (scores >= own_score - TIE).sum(1) - 1
    hit = (ranks < 1).double()
    n_classes = len(classes)
    hits_of_class = torch.zeros(n_classes, dtype=torch.double, device=scores.device)
    hits_of_class.index_add_(0, target, hit)
    n_images_of_class = torch.bincount(target, minlength=n_classes)
    present = n_images_of_class > 0
    recalls = hits_of_class[present] / n_images_of_class[present]
    image_counts = tuple(n_images_of_class.tolist())
    empty = tuple(name for name, count in zip(classes, image_counts, strict=True) if not count)
    return ZeroShotReport(
        top1=100 * float(hit.mean()),
        top5=100 * float((ranks < 5).double().mean()),
        mean_per_class=100 * float(recalls.mean()),
        n_images=len(target),
        n_classes=n_classes,
        chance_top1=100 / n_classes,
        chance_top5=100 * min(1.0, 5 / n_classes),
        templates=templates,
        classes=classes,
        counts=image_counts,
        empty=empty,
        confusions=confusions(scores, target, classes),
    )


def confusions(
    scores: Tensor,
    target: Tensor,
    classes: Sequence[str],
) -> tuple[tuple[str, str, int], ...]:
    """Count the pairs of a class and the wrong class that scored highest.

    Returns:
        The most frequent pairs with their numbers of images; of equally frequent ones the first.
    """
    wrong_scores = scores.scatter(1, target.unsqueeze(1), -torch.inf)
    own_score = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    if len(classes) > 1:
        is_wrong = wrong_scores.amax(1) >= own_score
    else:
        # Without another class no answer is wrong.
        is_wrong = torch.zeros_like(target, dtype=torch.bool)
    wrong_targets = target[is_wrong].tolist()
    predictions = wrong_scores[is_wrong].argmax(1).tolist()
    pairs = Counter(zip(wrong_targets, predictions, strict=True))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:N_CONFUSIONS]
    return tuple(
        (classes[truth], classes[predicted], count) for (truth, predicted), count in ordered
    )
