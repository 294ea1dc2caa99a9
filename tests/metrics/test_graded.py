"""Graded retrieval against its definitions written out, query by query."""

import math

import pytest
import torch
import torch.nn.functional as F

from apecache.metrics.graded import GradedPairs, graded_report
from apecache.metrics.retrieval import retrieval_report


def vectors(n_images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    owner = torch.arange(n_images).repeat_interleave(2)
    image = F.normalize(torch.randn(n_images, 6), dim=1)
    text = F.normalize(image[owner] + 0.8 * torch.randn(len(owner), 6), dim=1)
    return image, text, owner


def no_pairs() -> GradedPairs:
    empty = torch.empty(0, dtype=torch.int64)
    return GradedPairs(texts=empty, images=empty, grades=torch.empty(0))


def written_out(scores: list[float], grades: list[float]) -> dict[str, float]:
    """One query: candidates by falling score."""
    order = sorted(range(len(scores)), key=lambda column: -scores[column])
    ranked = [grades[column] for column in order]
    n_right = sum(grade > 0 for grade in grades)
    average = 0.0
    for rank in range(1, n_right + 1):
        if ranked[rank - 1] > 0:
            average += sum(grade > 0 for grade in ranked[:rank]) / rank
    gain = sum(grade / math.log2(1 + rank) for rank, grade in enumerate(ranked, 1))
    best = sorted(grades, reverse=True)
    best_gain = sum(grade / math.log2(1 + rank) for rank, grade in enumerate(best, 1))
    return {
        "map_at_r": average / n_right,
        "r_precision": sum(grade > 0 for grade in ranked[:n_right]) / n_right,
        "ndcg": gain / best_gain,
    }


def test_figures_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    from apecache.metrics import graded

    monkeypatch.setattr(graded, "GRADED_TILE", 3)
    image, text, owner = vectors(8)
    pairs = GradedPairs(
        texts=torch.tensor([0, 3, 3, 9]),
        images=torch.tensor([4, 1, 6, 0]),
        grades=torch.tensor([1.0, 2.0, 0.5, 3.0]),
    )
    grades = torch.zeros(len(text), len(image))
    grades[torch.arange(len(text)), owner] = 3.0
    grades[pairs.texts, pairs.images] = pairs.grades
    found = graded_report(image, text, owner, pairs)
    for direction, table, scores in (
        (found.text_to_image, grades, text @ image.T),
        (found.image_to_text, grades.T, image @ text.T),
    ):
        queries = [
            written_out(row.tolist(), grade.tolist())
            for row, grade in zip(scores, table, strict=True)
        ]
        for name in ("map_at_r", "r_precision", "ndcg"):
            mean = sum(query[name] for query in queries) / len(queries)
            assert getattr(direction, name) == pytest.approx(100 * mean, abs=1e-6)
        assert direction.n_queries == len(queries)


def test_recall_without_further_pairs_is_that_of_plain_retrieval() -> None:
    image, text, owner = vectors(30)
    plain = retrieval_report(image, text, owner)
    found = graded_report(image, text, owner, no_pairs())
    assert found.image_to_text.recall == pytest.approx(plain.image_to_text)
    assert found.text_to_image.recall == pytest.approx(plain.text_to_image)


def test_a_further_pair_makes_an_answer_right() -> None:
    image = torch.eye(3)
    text = torch.eye(3)[[1, 0, 2]]
    owner = torch.arange(3)
    assert graded_report(image, text, owner, no_pairs()).text_to_image.recall[1] == pytest.approx(
        100 / 3
    )
    pairs = GradedPairs(
        texts=torch.tensor([0, 1]),
        images=torch.tensor([1, 0]),
        grades=torch.ones(2),
    )
    assert graded_report(image, text, owner, pairs).text_to_image.recall[1] == 100


def test_collapsed_embeddings_score_zero() -> None:
    image = F.normalize(torch.ones(4, 2), dim=1)
    report = graded_report(image, image.clone(), torch.arange(4), no_pairs())
    assert report.image_to_text.recall[1] == 0
    assert report.text_to_image.map_at_r == 0
