"""The candidates of the loss benchmark compute what they say, and the benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.losses.contrastive import Groups, grouped_info_nce, info_nce
from apecache.losses.registered import ComputeLoss
from apecache.metrics.csls import csls_vectors
from apecache.train.batches import FeaturePairs
from benchmarks.quality.candidate_losses import (
    MinedNegatives,
    MinedRows,
    caption_pairs,
    centering,
    csls_training,
    gaussian_distance,
    label_smoothing,
    mine_rows,
    negative_free,
)
from benchmarks.quality.losses import guard, mean_of_captions

ROOT = Path(__file__).parents[2]
N = 12
SCALE = torch.tensor(9.0)


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(N, 6, generator=generator), dim=1)
    text = F.normalize(torch.randn(N, 6, generator=generator), dim=1)
    return image, text


def mined_rows(allowed: Tensor) -> MinedRows:
    others = torch.stack([torch.cat((torch.arange(i), torch.arange(i + 1, N))) for i in range(N)])
    return MinedRows(hard_texts=others, hard_images=others, allowed=allowed)


def everyone() -> Tensor:
    return ~torch.eye(N, dtype=torch.bool)


@pytest.mark.parametrize(
    "candidate",
    [
        label_smoothing(0.0),
        csls_training(0.0),
        MinedNegatives(mined_rows(everyone()), 0),
    ],
)
def test_without_strength_it_is_info_nce(
    candidate: ComputeLoss, pairs: tuple[Tensor, Tensor]
) -> None:
    groups = Groups(image=torch.arange(N), text=torch.arange(N))
    gradients = []
    for loss in (candidate, lambda image, text, scale, groups: info_nce(image, text, scale)):
        leaves = [vectors.clone().requires_grad_() for vectors in pairs]
        gradients.append(torch.autograd.grad(loss(*leaves, SCALE, groups), leaves))
    for of_candidate, of_info_nce in zip(*gradients, strict=True):
        assert torch.allclose(of_candidate, of_info_nce, atol=1e-6)
    assert torch.isclose(candidate(*pairs, SCALE, groups), info_nce(*pairs, SCALE))


def test_smoothing_is_that_of_torch(pairs: tuple[Tensor, Tensor]) -> None:
    image, text = pairs
    logits = SCALE * image @ text.T
    targets = torch.arange(N)
    ways = [F.cross_entropy(way, targets, label_smoothing=0.2) for way in (logits, logits.T)]
    assert torch.isclose(
        label_smoothing(0.2)(image, text, SCALE, None),
        torch.stack(ways).mean(),
    )


def test_smoothing_leaves_equal_captions_out(pairs: tuple[Tensor, Tensor]) -> None:
    image, text = pairs
    numbers = torch.tensor([0, 0, *range(1, N - 1)])
    logits = SCALE * image @ text.T
    losses = []
    for way in (logits, logits.T):
        for i in range(N):
            candidates = [j for j in range(N) if j == i or numbers[j] != numbers[i]]
            shares = way[i, candidates].log_softmax(0)
            losses.append(-0.8 * shares[candidates.index(i)] - 0.2 * shares.mean())
    loss = label_smoothing(0.2)(image, text, SCALE, Groups(image=numbers, text=numbers))
    assert torch.isclose(loss, torch.stack(losses).mean())


def test_captions_of_an_image_are_pairs_too(pairs: tuple[Tensor, Tensor]) -> None:
    image, first = pairs
    second = first.flip(1)
    text = torch.stack((first, second), dim=1).flatten(0, 1)
    rows = torch.arange(N)
    groups = Groups(image=rows, text=rows.repeat_interleave(2))
    expected = grouped_info_nce(image, text=text, scale=SCALE, groups=groups)
    expected = expected + 0.5 * info_nce(first, second, SCALE)
    assert torch.isclose(caption_pairs(0.5)(image, text, SCALE, groups), expected)


def test_centering_does_not_see_what_all_images_share(pairs: tuple[Tensor, Tensor]) -> None:
    image, text = pairs
    shifted = image + torch.arange(6)
    centered = centering(1.0)
    assert torch.isclose(centered(shifted, text, SCALE, None), centered(image, text, SCALE, None))
    half = F.normalize(image - image.mean(0) / 2, dim=1)
    other_half = F.normalize(text - text.mean(0) / 2, dim=1)
    expected = info_nce(half, other_half, SCALE)
    assert torch.isclose(centering(0.5)(image, text, SCALE, None), expected)


def test_csls_logits_are_half_the_scores_of_the_search(pairs: tuple[Tensor, Tensor]) -> None:
    image_vectors, text_vectors = csls_vectors(*pairs)
    logits = SCALE * image_vectors @ text_vectors.T / 2
    targets = torch.arange(N)
    ways = [F.cross_entropy(way, targets) for way in (logits, logits.T)]
    assert torch.isclose(csls_training(1.0)(*pairs, SCALE, None), torch.stack(ways).mean())


def test_gaussian_distance_grows_with_collapse() -> None:
    torch.manual_seed(0)
    normal = torch.randn(1000, 8)
    one_direction = normal * torch.tensor([8**0.5] + [0.0] * 7)
    collapsed = torch.ones(1000, 8)
    distances = [float(gaussian_distance(x)) for x in (normal, one_direction, collapsed)]
    assert distances[0] < 2 < 10 * distances[0] < distances[1] < distances[2]


def test_negative_free_joins_pairs_and_keeps_them_apart(pairs: tuple[Tensor, Tensor]) -> None:
    image, text = pairs
    groups = None
    assert torch.isclose(
        negative_free(0.0)(image, text, SCALE, groups),
        (image - text).square().sum(1).mean(),
    )
    collapsed = torch.ones_like(image) / 6**0.5
    apart = negative_free(1.0)(image, image, SCALE, groups)
    assert float(negative_free(1.0)(collapsed, collapsed, SCALE, groups)) > 2 * float(apart)


def test_mined_rows_are_negatives_unless_guarded_or_in_the_batch(
    pairs: tuple[Tensor, Tensor],
) -> None:
    image, text = pairs
    allowed = everyone()
    # Image 0 and image 9 are probably positives of each other.
    allowed[0, 9] = allowed[9, 0] = False
    candidate = MinedNegatives(mined_rows(allowed), N - 1)
    earlier = torch.arange(4, N)
    candidate(image[earlier], text[earlier], SCALE, Groups(image=earlier, text=earlier))
    rows = torch.arange(6)
    # New embeddings: those of rows 4 and 5 in the bank are old.
    new_image = image.flip(1)
    loss = candidate(new_image[rows], text[rows], SCALE, Groups(image=rows, text=rows))
    expected = []
    for i in rows.tolist():
        for query, batch, bank in ((new_image, text, text), (text, new_image, image)):
            known = [j for j in range(6, N) if allowed[i, j]]
            candidates = torch.cat((batch[rows], bank[known]))
            shares = (SCALE * candidates @ query[i]).log_softmax(0)
            expected.append(-shares[i])
    assert torch.isclose(loss, torch.stack(expected).mean())


def test_mining_takes_the_nearest_wrong_rows_that_are_no_probable_positives(
    pairs: tuple[Tensor, Tensor],
) -> None:
    image, text = pairs
    captions = torch.eye(N)
    captions[1] = captions[0]
    mined = mine_rows(image, text, captions, least=0.5, count=3)
    assert not mined.allowed[0, 1]
    assert not mined.allowed.diagonal().any()
    cosines = image @ text.T
    for i in range(N):
        others = [j for j in range(N) if j != i and {i, j} != {0, 1}]
        nearest = sorted(others, key=lambda j, i=i: -float(cosines[i, j]))
        assert mined.hard_texts[i].tolist() == nearest[:3]
        nearest = sorted(others, key=lambda j, i=i: -float(cosines[j, i]))
        assert mined.hard_images[i].tolist() == nearest[:3]


def test_the_guard_is_the_cosine_of_captions_of_one_image() -> None:
    angles = torch.tensor([0.0, 0.4, 0.0, 0.8, 0.3])
    text = torch.stack((angles.cos(), angles.sin()), dim=1)
    # The last image has one caption, which says nothing.
    train = FeaturePairs(image=torch.zeros(3, 1), text=text, first_text=torch.tensor([0, 2, 4, 5]))
    cosines = torch.tensor([0.4, 0.8]).cos()
    captions = mean_of_captions(text, train)
    assert guard(captions, train) == pytest.approx(float(cosines.quantile(0.25)), abs=1e-6)


@pytest.mark.slow
def test_the_benchmark_runs_without_data(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.quality.losses", "--quick", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["ranking"] for row in rows} == {"cosine", "centered", "csls"}
    assert all(row["dev low"] <= row["dev gain"] <= row["dev high"] for row in rows[2:])
