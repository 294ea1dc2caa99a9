"""Zero-shot classification: class names through prompt templates, images by the run's own
encoder."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apecache.arguments import as_texts, require_type
from apecache.encoders.spec import EncoderSpec
from apecache.evaluate.class_names import ClassNames, match_labels
from apecache.evaluate.labelled import LabelledSpec, labelled_images, wanted_labels
from apecache.evaluate.left_out import LeftOut
from apecache.evaluate.prompts import TEMPLATES, check_template
from apecache.extraction.run import Progress
from apecache.heads.normalization import normalize
from apecache.metrics.retrieval import TIE
from apecache.runs.encoders import TrainedEncoders
from apecache.runs.heads import TrainedHeads
from apecache.runs.load import Embed, Run, text_embedder

N_CONFUSIONS = 10


@dataclass(frozen=True)
class ZeroShotSpec:
    """`images`: what to classify. `text`: a text encoder that has moved, in place of the one that
    the run names. `names`: of the classes; without it the labels are the names."""

    images: LabelledSpec
    templates: tuple[str, ...] = TEMPLATES
    text: EncoderSpec | None = None
    names: ClassNames | None = None


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """Accuracies in per cent; `mean_per_class` is the mean, over classes that have images, of their
    top-1 recall.

    `classes`: all candidates; `counts`: images of each; `empty`: those without any, which make the
    task no easier. `confusions`: class, what it was taken for, and how often; the most frequent
    first. `matched`: how labels were matched with classes. `left_out`: images that were asked for
    and could not be read.
    """

    top1: float
    top5: float
    mean_per_class: float
    n_images: int
    n_classes: int
    chance_top1: float
    chance_top5: float
    templates: tuple[str, ...]
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    empty: tuple[str, ...]
    confusions: tuple[tuple[str, str, int], ...]
    matched: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)


def zero_shot(run: Run, spec: ZeroShotSpec, progress: Progress = lambda *_: None) -> ZeroShotReport:
    """Classify labelled images by their nearest class name.

    Raises:
        ManifestError: no such split, or an image without a label. MismatchError: an encoder that is
            not the run's.
        OptionError: a template without {}, or a label that stands for no class. DataError: no image
            that can be read.
    """
    require_type(run, (TrainedHeads, TrainedEncoders), "run")
    require_type(spec, ZeroShotSpec, "spec")
    require_type(spec.images, LabelledSpec, "images")
    templates = tuple(map(check_template, as_texts(spec.templates, "templates")))
    classes = match_labels(wanted_labels(spec.images), spec.names)
    embed_texts = text_embedder(run.text, spec.images.device, spec.text)
    found = labelled_images(run, spec.images, progress)  # after both encoders were compared
    weights = class_embeddings(embed_texts, classes.names, templates).to(found.embedded.device)
    targets = [classes.place[label] for label in found.labels]
    report = classification_report(
        found.embedded @ weights.T,
        targets=targets,
        classes=classes.names,
        templates=templates,
    )
    return replace(report, matched=classes.matched, left_out=found.left_out)


def class_embeddings(
    embed_texts: Embed,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """float32 [n_classes, dim]: the normalised mean over templates of each class's normalised
    embeddings."""
    texts = [
        template.replace("{}", name.replace("_", " ")) for name in classes for template in templates
    ]
    embedded = embed_texts(texts).view(len(classes), len(templates), -1)
    return normalize(embedded.mean(1), dim=-1)


def classification_report(
    scores: Tensor,
    targets: Sequence[int],
    classes: tuple[str, ...],
    templates: tuple[str, ...] = TEMPLATES,
) -> ZeroShotReport:
    """From scores [n_images, n_classes]; a wrong class that scores as high as the right one ranks
    before it."""
    target = torch.tensor(targets, device=scores.device)
    own = scores.gather(1, target.unsqueeze(1))
    ranks = (scores >= own - TIE).sum(1) - 1
    hit = (ranks < 1).double()
    n_classes = len(classes)
    per_class = torch.zeros(n_classes, dtype=torch.double, device=scores.device).index_add_(
        0,
        target,
        hit,
    )
    counts = torch.bincount(target, minlength=n_classes)
    present = counts > 0
    return ZeroShotReport(
        top1=100 * float(hit.mean()),
        top5=100 * float((ranks < 5).double().mean()),
        mean_per_class=100 * float((per_class[present] / counts[present]).mean()),
        n_images=len(target),
        n_classes=n_classes,
        chance_top1=100 / n_classes,
        chance_top5=100 * min(1.0, 5 / n_classes),
        templates=templates,
        classes=classes,
        counts=tuple(counts.tolist()),
        empty=tuple(
            name for name, count in zip(classes, counts.tolist(), strict=True) if not count
        ),
        confusions=confusions(scores, target, classes),
    )


def confusions(
    scores: Tensor,
    target: Tensor,
    classes: Sequence[str],
) -> tuple[tuple[str, str, int], ...]:
    """The most frequent pairs of a class and of the wrong one that scored highest; of equal ones
    the first."""
    others = scores.scatter(1, target.unsqueeze(1), -torch.inf)
    own = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    wrong = (
        others.amax(1) >= own if len(classes) > 1 else torch.zeros_like(target, dtype=torch.bool)
    )
    pairs = Counter(zip(target[wrong].tolist(), others[wrong].argmax(1).tolist(), strict=True))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:N_CONFUSIONS]
    return tuple((classes[truth], classes[taken], count) for (truth, taken), count in ordered)
