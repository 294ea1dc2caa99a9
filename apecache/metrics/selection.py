"""Measure retrieval on a dev split so that it can choose, also where few captions differ.

With captions such as `a photo of a LABEL` nearly every image has a right caption among the first
ten, and recalls say little. mAP@R then ranks models by how many of all right answers come first.
"""

from dataclasses import replace

import torch
from torch import Tensor

from apecache.metrics.graded import GradedPairs, graded_report
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import RetrievalReport, retrieval_report

IMAGES_PER_CAPTION = 3
"""Images for each different caption from which on recall cannot rank: chance alone then has some of
the many right answers among the first ten."""


def dev_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Compute `retrieval_report`, with `map_at_r` where few captions differ.

    The arguments are those of `retrieval_report`.
    """
    report = retrieval_report(image, text, image_of_text, relevance=relevance)
    if relevance is None or not has_few_captions(relevance, len(image)):
        return report
    none = torch.empty(0, dtype=torch.int64)
    pairs = GradedPairs(texts=none, images=none, grades=torch.empty(0))
    graded = graded_report(
        image,
        text=text,
        image_of_text=image_of_text,
        pairs=pairs,
        relevance=relevance,
    )
    both_precisions = (graded.image_to_text.map_at_r, graded.text_to_image.map_at_r)
    return replace(report, map_at_r=sum(both_precisions) / 2)


def has_few_captions(relevance: Relevance, n_images: int) -> bool:
    """Tell whether too few different captions are there for recall to rank models."""
    n_captions = len(relevance.images.first) - 1
    return IMAGES_PER_CAPTION * n_captions <= n_images
