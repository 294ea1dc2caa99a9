"""Right answers where captions or images are equal, against a reference that looks at every pair by
itself."""

from math import comb
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apecache.metrics import retrieval
from apecache.metrics.csls import csls_report, csls_vectors
from apecache.metrics.protocols import folded_report, measure_languages, retrieval_intervals
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import image_to_text_ranks, retrieval_report, text_to_image_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

KS = (1, 2, 3, 5, 10)


@st.composite
def collections(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, texts, owners, ids of captions and of images. Few directions, so that ties are
    everywhere."""
    dim = draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    image = draw(st.lists(vector, min_size=1, max_size=7))
    extra = draw(st.lists(st.integers(0, len(image) - 1), max_size=8))
    owners = draw(st.permutations([*range(len(image)), *extra]))
    n_texts = len(owners)
    text = draw(st.lists(vector, min_size=n_texts, max_size=n_texts))
    captions = draw(st.lists(st.integers(0, 6), min_size=n_texts, max_size=n_texts))
    content = draw(st.lists(st.integers(0, 9), min_size=len(image), max_size=len(image)))
    return (
        torch.tensor(image).float() / 4,  # products below 1, as of unit vectors: ties are exact
        torch.tensor(text).float() / 4,
        torch.tensor(list(owners)),
        torch.tensor(captions),
        torch.tensor(content),
    )


def right_by_definition(owners: Tensor, captions: Tensor, content: Tensor) -> list[list[bool]]:
    """[n_images][n_texts]: some caption of an equal image equals this one."""

    def is_right(image: int, text: int) -> bool:
        own = [t for t in range(len(owners)) if content[owners[t]] == content[image]]
        return any(captions[t] == captions[text] for t in own)

    return [[is_right(image, text) for text in range(len(owners))] for image in range(len(content))]


def rank_by_definition(scores: list[float], right: list[bool]) -> int:
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    return sum(
        score >= best and not is_right for score, is_right in zip(scores, right, strict=True)
    )


def chance_by_definition(right: list[list[bool]], k: int) -> float:
    chances = []
    for query in right:
        wrong = len(query) - sum(query)
        n = len(query)
        chances.append(1.0 if k >= n else 1 - comb(wrong, k) / comb(n, k))
    return 100 * sum(chances) / len(chances)


@settings(deadline=None, max_examples=150)
@given(collection=collections(), tile=st.integers(1, 9))
def test_ranks_recalls_and_chance_equal_their_definition(collection: Any, tile: int) -> None:
    image, text, owners, captions, content = collection
    relevance = Relevance.of(owners, captions, content)
    right = right_by_definition(owners, captions, content)
    back = [[row[t] for row in right] for t in range(len(text))]
    scores = (image @ text.T).tolist()
    to_text = [rank_by_definition(scores[i], right[i]) for i in range(len(image))]
    to_image = [rank_by_definition([row[t] for row in scores], back[t]) for t in range(len(text))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "TILE", tile)
        assert (
            image_to_text_ranks(
                image,
                text=text,
                image_of_text=owners,
                relevance=relevance,
            ).tolist()
            == to_text
        )
        assert (
            text_to_image_ranks(
                image,
                text=text,
                image_of_text=owners,
                relevance=relevance,
            ).tolist()
            == to_image
        )
        report = retrieval_report(
            image,
            text=text,
            image_of_text=owners,
            ks=KS,
            relevance=relevance,
        )
    for k in KS:
        assert report.image_to_text[k] == pytest.approx(
            100 * np.mean([rank < k for rank in to_text])
        )
        assert report.text_to_image[k] == pytest.approx(
            100 * np.mean([rank < k for rank in to_image])
        )
        assert report.chance_image_to_text[k] == pytest.approx(chance_by_definition(right, k))
        assert report.chance_text_to_image[k] == pytest.approx(chance_by_definition(back, k))


@settings(deadline=None, max_examples=100)
@given(collection=collections())
def test_there_is_a_relevance_only_where_it_differs_from_owning(collection: Any) -> None:
    _, _, owners, captions, content = collection
    plain = [[int(owner) == image for owner in owners] for image in range(len(content))]
    relevance = Relevance.of(owners, captions, content)
    assert (relevance is None) == (right_by_definition(owners, captions, content) == plain)
    assert Relevance.of(owners, None, None) is None


def plain_report(
    image: Tensor,
    text: Tensor,
    owners: Tensor,
) -> tuple[list[int], list[int], dict[int, float]]:
    """Ranks and chance as they were defined before captions were compared."""
    scores = image @ text.T
    own = owners.unsqueeze(0) == torch.arange(len(image)).unsqueeze(1)
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    to_text = ((scores >= best) & ~own).sum(1).tolist()
    scores = text @ image.T
    to_image = ((scores >= scores.gather(1, owners.unsqueeze(1))).sum(1) - 1).tolist()
    counts = torch.bincount(owners).tolist()
    n_texts = len(text)
    n_images = len(image)
    chance = {
        k: 100 * sum(1 - comb(n_texts - count, k) / comb(n_texts, k) for count in counts) / n_images
        for k in (1, 5, 10)
    }
    return to_text, to_image, chance


@pytest.mark.parametrize("seed", range(5))
def test_without_equal_captions_every_figure_is_that_of_owning(seed: int) -> None:
    """To the last bit: nothing else is computed. One tile, so that both make the same products."""
    image, text, owners = noisy(60, 1.0, seed)
    relevance = Relevance.of(owners, torch.arange(len(text)), torch.arange(len(image)))
    report = retrieval_report(image, text, owners, relevance=relevance)
    to_text, to_image, chance = plain_report(image, text, owners)
    assert relevance is None
    assert image_to_text_ranks(image, text, owners).tolist() == to_text
    assert text_to_image_ranks(image, text, owners).tolist() == to_image
    assert report.chance_image_to_text == chance
    assert report.chance_text_to_image == {
        k: 100 * (1 - comb(59, k) / comb(60, k)) for k in (1, 5, 10)
    }


def noisy(n_images: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n_images, 8, generator=chance), dim=-1)
    owners = torch.arange(n_images).repeat_interleave(2)
    text = F.normalize(
        image[owners] + noise * torch.randn(len(owners), 8, generator=chance),
        dim=-1,
    )
    return image, text, owners


def label_set(n_images: int = 60, n_labels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images whose one caption is that of their label, embedded by a head that tells labels apart
    perfectly."""
    labels = torch.arange(n_images) % n_labels
    vectors = torch.eye(n_labels)[labels]
    return vectors, vectors, torch.arange(n_images), labels


def test_a_perfect_head_finds_everything_on_captions_made_of_labels() -> None:
    image, text, owners, labels = label_set()
    assert retrieval_report(image, text, owners).mean_recall == 0
    report = retrieval_report(image, text, owners, relevance=Relevance.of(owners, labels, None))
    assert report.mean_recall == 100
    assert report.chance_image_to_text[1] == report.chance_text_to_image[1] == pytest.approx(25)


def test_equal_captions_may_belong_to_one_image_more_than_they_share() -> None:
    """x and y of the first, y and z of the second: y is right for both, x for the first alone."""
    owners = torch.tensor([0, 0, 1, 1])
    captions = torch.tensor([0, 1, 1, 2])
    relevance = Relevance.of(owners, captions, None)
    assert relevance is not None
    assert relevance.right_texts(torch.arange(2)).tolist() == [
        [True, True, True, False],
        [False, True, True, True],
    ]
    assert relevance.right_images(torch.arange(4)).tolist() == [
        [True, False],
        [True, True],
        [True, True],
        [False, True],
    ]
    assert relevance.n_right_texts().tolist() == [3, 3]
    assert relevance.n_right_images().tolist() == [1, 2, 2, 1]


# --- other ways to read ranks ---------------------------------------------------------------------


def shared_captions() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    image, text, owners = noisy(60, 1.0)
    chance = torch.Generator().manual_seed(3)
    captions = torch.randint(0, 50, (len(text),), generator=chance)
    content = torch.randint(0, 55, (len(image),), generator=chance)
    return image, text, owners, captions, content


def test_folds_and_languages_know_equal_captions_among_their_own_candidates() -> None:
    image, text, owners, captions, content = shared_captions()
    relevance = Relevance.of(owners, captions, content)
    languages = ["de" if row % 3 else "en" for row in range(len(text))]
    masks = {
        language: torch.tensor([other == language for other in languages])
        for language in ("de", "en")
    }
    measured = measure_languages(
        image,
        text=text,
        image_of_text=owners,
        languages=languages,
        relevance=relevance,
    )
    found = {language: measurement.report for language, measurement in measured.items()}
    for language, mask in masks.items():
        kept = sorted(set(owners[mask].tolist()))
        rows = torch.tensor([kept.index(owner) for owner in owners[mask].tolist()])
        within = Relevance.of(rows, captions[mask], content[kept])
        assert found[language] == retrieval_report(image[kept], text[mask], rows, relevance=within)
        assert found[language] != retrieval_report(image[kept], text[mask], rows)
    folds = []
    for first in (0, 30):
        mask = (owners >= first) & (owners < first + 30)
        within = Relevance.of(owners[mask] - first, captions[mask], content[first : first + 30])
        folds.append(
            retrieval_report(
                image[first : first + 30],
                text[mask],
                owners[mask] - first,
                relevance=within,
            )
        )
    mean = folded_report(
        image,
        text=text,
        image_of_text=owners,
        fold_images=30,
        relevance=relevance,
    )
    assert mean.text_to_image[1] == pytest.approx(
        (folds[0].text_to_image[1] + folds[1].text_to_image[1]) / 2
    )
    assert mean.image_to_text[1] == pytest.approx(
        (folds[0].image_to_text[1] + folds[1].image_to_text[1]) / 2
    )
    assert mean != folded_report(image, text=text, image_of_text=owners, fold_images=30)


def test_csls_and_intervals_know_equal_captions() -> None:
    image, text, owners, captions, content = shared_captions()
    relevance = Relevance.of(owners, captions, content)
    corrected = csls_report(image, text, owners, relevance=relevance)
    assert corrected == retrieval_report(*csls_vectors(image, text), owners, relevance=relevance)
    assert corrected.text_to_image[1] > csls_report(image, text, owners).text_to_image[1]
    intervals = retrieval_intervals(image, text, owners, relevance=relevance)
    report = retrieval_report(image, text, owners, relevance=relevance)
    for k in (1, 5, 10):
        low, high = intervals.text_to_image[k]
        assert low <= report.text_to_image[k] <= high
    assert intervals != retrieval_intervals(image, text, owners)
