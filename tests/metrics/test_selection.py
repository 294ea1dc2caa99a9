"""Where few captions differ, mAP@R tells models apart that recalls do not."""

import torch
import torch.nn.functional as F

from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.selection import dev_report

N_CLASSES = 4
N_IMAGES = 60


def label_set(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Relevance]:
    """Images near the vector of their class, and one caption each: the name of the class."""
    torch.manual_seed(0)
    labels = torch.arange(N_IMAGES) % N_CLASSES
    classes = F.normalize(torch.randn(N_CLASSES, 16), dim=1)
    image = F.normalize(classes[labels] + noise * torch.randn(N_IMAGES, 16), dim=1)
    owner = torch.arange(N_IMAGES)
    relevance = Relevance.of(owner, labels, None)
    assert relevance is not None
    return image, classes[labels], owner, relevance


def test_a_perfect_head_has_100_and_a_worse_one_less() -> None:
    image, text, owner, relevance = label_set(0.0)
    perfect = dev_report(image, text, owner, relevance)
    assert perfect.image_to_text[1] == perfect.text_to_image[1] == 100
    assert perfect.map_at_r == perfect.selection_score == 100
    worse = dev_report(*label_set(0.5)[:3], label_set(0.5)[3])
    worst = dev_report(*label_set(3.0)[:3], label_set(3.0)[3])
    assert worst.selection_score < worse.selection_score < 100
    # Recalls of both are near their chance of a hit, so they choose by accident.
    assert worst.text_to_image[10] > 50


def test_captions_that_differ_are_chosen_by_recall() -> None:
    image, text, owner, _ = label_set(0.2)
    report = dev_report(image, text, owner)
    assert report.map_at_r is None
    assert report.selection_score == report.mean_recall
    ids = torch.arange(N_IMAGES)
    ids[1] = 0
    few_equal = Relevance.of(owner, ids, None)
    assert dev_report(image, text, owner, few_equal).map_at_r is None
    thirds = Relevance.of(owner, owner // 3, None)
    assert dev_report(image, text, owner, thirds).map_at_r is not None


def test_a_report_is_read_back_with_and_without() -> None:
    import json
    from dataclasses import asdict

    image, text, owner, relevance = label_set(0.2)
    for report in (dev_report(image, text, owner, relevance), dev_report(image, text, owner)):
        again = RetrievalReport.from_json(json.loads(json.dumps(asdict(report))))
        assert again == report
    old = asdict(report)
    del old["map_at_r"]
    assert RetrievalReport.from_json(old) == report
