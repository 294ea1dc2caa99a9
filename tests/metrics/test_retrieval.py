"""Recall at K against its definition: several captions per image, ties counted against us, tiles of
any size."""

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apecache.errors import DataError
from apecache.metrics import retrieval
from apecache.metrics.retrieval import RetrievalReport, retrieval_report

Vectors = list[list[int]]


def recalls_by_definition(
    image: Vectors,
    text: Vectors,
    owners: Sequence[int],
    ks: Sequence[int],
) -> tuple[dict[int, float], dict[int, float]]:
    """Sort all candidates of every query, wrong before right where scores are equal, and look into
    the top K."""

    def hits(query: list[int], candidates: Vectors, right: list[bool], k: int) -> bool:
        scores = [
            sum(a * b for a, b in zip(query, candidate, strict=True)) for candidate in candidates
        ]
        order = sorted(range(len(candidates)), key=lambda i: (-scores[i], right[i]))
        return any(right[i] for i in order[:k])

    to_text = {}
    to_image = {}
    for k in ks:
        found = [
            hits(query, text, [owner == row for owner in owners], k)
            for row, query in enumerate(image)
        ]
        to_text[k] = 100 * sum(found) / len(found)
        found = [
            hits(query, image, [row == owner for row in range(len(image))], k)
            for query, owner in zip(text, owners, strict=True)
        ]
        to_image[k] = 100 * sum(found) / len(found)
    return to_text, to_image


@st.composite
def collections(draw: st.DrawFn) -> tuple[Vectors, Vectors, list[int]]:
    """Few directions and small whole numbers, so that ties and duplicates are everywhere and all
    sums are exact."""
    dim = draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    image = draw(st.lists(vector, min_size=1, max_size=7))
    extra = draw(st.lists(st.integers(0, len(image) - 1), max_size=8))
    owners = draw(st.permutations([*range(len(image)), *extra]))
    text = draw(st.lists(vector, min_size=len(owners), max_size=len(owners)))
    return image, text, list(owners)


@settings(deadline=None, max_examples=200)
@given(collection=collections(), tile=st.integers(1, 9))
def test_recalls_equal_their_definition(
    collection: tuple[Vectors, Vectors, list[int]],
    tile: int,
) -> None:
    image, text, owners = collection
    ks = (1, 2, 3, 5, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "TILE", tile)
        report = retrieval_report(
            torch.tensor(image).float(),
            text=torch.tensor(text).float(),
            image_of_text=torch.tensor(owners),
            ks=ks,
        )
    to_text, to_image = recalls_by_definition(image, text=text, owners=owners, ks=ks)
    assert report.image_to_text == pytest.approx(to_text)
    assert report.text_to_image == pytest.approx(to_image)
    assert (report.n_images, report.n_texts) == (len(image), len(text))


def random_unit(n: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("tile", [2, 7, 33, 1000])
def test_tiles_do_not_change_the_report(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_unit(66, 8, 0)
    text = random_unit(150, 8, 1)
    owners = torch.cat(
        [torch.arange(66), torch.randint(66, (84,), generator=torch.Generator().manual_seed(2))]
    )
    whole = retrieval_report(image, text, owners)
    monkeypatch.setattr(retrieval, "TILE", tile)
    assert retrieval_report(image, text, owners) == whole


def test_matching_embeddings_are_all_found() -> None:
    image = random_unit(40, 16, 0)
    owners = torch.arange(40).repeat_interleave(3)
    report = retrieval_report(image, image[owners], owners)
    assert report.mean_recall == report.mean_recall_at_1 == 100


@pytest.mark.parametrize("n_images", [2, 33, 65, 1025, 2049])
def test_embeddings_that_have_collapsed_to_one_point_score_zero(n_images: int) -> None:
    owners = torch.arange(n_images).repeat_interleave(2)
    vector = random_unit(1, 33, 0)
    report = retrieval_report(
        vector.repeat(n_images, 1),
        text=vector.repeat(2 * n_images, 1),
        image_of_text=owners,
        ks=(1,),
    )
    assert report.mean_recall == 0
    assert report.chance_text_to_image[1] > 0


def test_a_twin_of_the_right_candidate_ranks_before_it_also_where_one_row_is_left_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile of one row is a matrix-vector product, which rounds otherwise: there twins would not
    score alike."""
    monkeypatch.setattr(retrieval, "TILE", 129)
    owners = torch.arange(130)
    for seed in range(100):
        twins = random_unit(65, 33, seed).repeat(2, 1)
        queries = F.normalize(
            twins + 0.3 * random_unit(130, 33, seed + 100),
            dim=-1,
        )  # nearest to its own two twins
        assert retrieval_report(queries, twins, owners).image_to_text[1] == 0
        assert retrieval_report(twins, queries, owners).text_to_image[1] == 0


def test_a_second_caption_helps_its_image_and_is_a_query_of_its_own() -> None:
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.1, 1.0]])
    report = retrieval_report(image, text=text, image_of_text=torch.tensor([0, 0, 1, 1]), ks=(1,))
    # image 0 finds its first caption; both captions of image 1 have a wrong one that scores as high
    assert report.image_to_text == {1: 50.0}
    assert report.text_to_image == {1: 75.0}


def test_the_mean_recall_is_that_of_both_ways_and_all_ks() -> None:
    report = RetrievalReport(
        image_to_text={1: 10, 5: 20, 10: 30},
        text_to_image={1: 40, 5: 50, 10: 90},
        n_images=9,
        n_texts=9,
        chance_image_to_text={},
        chance_text_to_image={},
    )
    assert report.mean_recall == 40
    assert report.mean_recall_at_1 == 25


# --- chance ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(captions=st.lists(st.integers(1, 3), min_size=1, max_size=4), k=st.integers(1, 6))
def test_chance_is_the_recall_of_all_orders_averaged(captions: list[int], k: int) -> None:
    """Counted: the share of all sets of K candidates that hold a right one."""
    owners = [row for row, count in enumerate(captions) for _ in range(count)]
    n_images = len(captions)
    n_texts = len(owners)
    report = retrieval_report(
        torch.zeros(n_images, 1),
        text=torch.zeros(n_texts, 1),
        image_of_text=torch.tensor(owners),
        ks=(k,),
    )
    to_text = [share_that_holds([owner == row for owner in owners], k) for row in range(n_images)]
    to_image = share_that_holds([row == 0 for row in range(n_images)], k)
    assert report.chance_image_to_text[k] == pytest.approx(100 * sum(to_text) / n_images)
    assert report.chance_text_to_image[k] == pytest.approx(100 * to_image)


def share_that_holds(right: list[bool], k: int) -> float:
    sets = list(combinations(right, min(k, len(right))))
    return sum(any(chosen) for chosen in sets) / len(sets)


def test_random_embeddings_score_about_chance() -> None:
    owners = torch.arange(40).repeat_interleave(5)
    reports = [
        retrieval_report(random_unit(40, 8, s), random_unit(200, 8, s + 1000), owners)
        for s in range(60)
    ]
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            mean = sum(getattr(report, way)[k] for report in reports) / len(reports)
            assert mean == pytest.approx(getattr(reports[0], f"chance_{way}")[k], abs=3), (way, k)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "text", "owners", "message"),
    [
        (torch.empty(0, 2), torch.empty(0, 2), [], "nothing to rank: 0 images and 0 texts"),
        (torch.ones(2, 2), torch.empty(0, 2), [], "nothing to rank: 2 images and 0 texts"),
        (
            torch.ones(3, 2),
            torch.ones(3, 2),
            [0, 0, 2],
            "an image without a caption cannot be a query",
        ),
        (torch.ones(2, 2), torch.ones(2, 2), [0, 0], "an image without a caption"),
        (torch.tensor([[torch.nan], [1]]), torch.ones(2, 1), [0, 1], "not finite cannot be ranked"),
        (torch.ones(2, 1), torch.tensor([[1], [torch.inf]]), [0, 1], "not finite cannot be ranked"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    image: Tensor,
    text: Tensor,
    owners: list[int],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        retrieval_report(image, text, torch.tensor(owners, dtype=torch.long))
