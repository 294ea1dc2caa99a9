"""Distillation terms against their definitions, and the teacher's bank."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.losses.distillation import TeacherBank, distil_classes, distil_contrastive, distil_mse


def unit(n: int, dim: int, seed: int) -> Tensor:
    x = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("n_bank", [0, 5])
def test_contrastive_distillation_equals_its_definition(n_bank: int) -> None:
    student = unit(4, 3, 0).requires_grad_()
    teacher = unit(4, 3, 1)
    bank = unit(n_bank, 3, 2)
    candidates = torch.cat([teacher, bank])
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        scores = [(14.3 * student[i] @ c).exp() for c in candidates]
        wanted = wanted - (scores[i] / sum(scores)).log() / 4
    found = distil_contrastive(student, teacher=teacher, bank=bank, scale=14.3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, wanted)))


@pytest.mark.parametrize("n_bank", [0, 5])
def test_all_of_a_group_are_right_answers_of_contrastive_distillation(n_bank: int) -> None:
    """Two captions of each of four images; the first and the third image belong together."""
    owners = [0, 0, 1, 1, 2, 2, 3, 3]
    group_of_image = [0, 1, 0, 2]
    student = unit(8, 3, 0).requires_grad_()
    teacher = unit(4, 3, 1)
    bank = unit(n_bank, 3, 2)
    expected = torch.zeros((), dtype=torch.float64)
    for i, owner in enumerate(owners):
        scores = [(14.3 * student[i] @ candidate).exp() for candidate in (*teacher, *bank)]
        right = [j for j in range(4) if group_of_image[j] == group_of_image[owner]]
        wrong = sum(score for j, score in enumerate(scores) if j not in right)
        for j in right:
            expected = expected - (scores[j] / (scores[j] + wrong)).log() / (8 * len(right))
    found = distil_contrastive(
        student,
        teacher=teacher,
        bank=bank,
        scale=14.3,
        own=torch.tensor(owners),
        groups=torch.tensor(group_of_image),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, expected)))


def test_groups_of_one_image_each_change_nothing() -> None:
    student, teacher, bank = (unit(4, 3, seed) for seed in range(3))
    plain = distil_contrastive(student, teacher=teacher, bank=bank, scale=5.0)
    grouped = distil_contrastive(
        student,
        teacher=teacher,
        bank=bank,
        scale=5.0,
        groups=torch.arange(4),
    )
    torch.testing.assert_close(grouped, plain)


def test_the_teacher_is_never_trained() -> None:
    student, teacher, bank = (unit(3, 2, seed).requires_grad_() for seed in range(3))
    loss = distil_contrastive(student, teacher=teacher, bank=bank, scale=5.0) + distil_mse(
        student,
        teacher,
    )
    (loss + distil_classes(student, teacher.softmax(-1))).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert bank.grad is None


def test_mse_and_classes_equal_their_definitions() -> None:
    student = unit(4, 3, 0)
    teacher = unit(4, 3, 1)
    mean = (
        sum(float((a - b) ** 2) for a, b in zip(student.flatten(), teacher.flatten(), strict=True))
        / 12
    )
    assert float(distil_mse(student, teacher)) == pytest.approx(mean)
    p = teacher.softmax(-1)
    q = student.softmax(-1)
    kl = sum(float(p[i, j]) * math.log(p[i, j] / q[i, j]) for i in range(4) for j in range(3)) / 4
    assert float(distil_classes(student, p)) == pytest.approx(kl)
    assert float(distil_classes(student, q)) == pytest.approx(0, abs=1e-12)


def test_the_bank_forgets_the_oldest_first_and_begins_with_random_unit_vectors() -> None:
    bank = TeacherBank(5, 2)
    torch.testing.assert_close(bank.entries.norm(dim=-1), torch.ones(5))
    numbered = torch.arange(12.0).repeat_interleave(2).view(12, 2)
    seen = []
    for part in (numbered[:3], numbered[3:6], numbered[6:7]):
        bank.push(part)
        seen.append(sorted(bank.entries[:, 0].tolist()))
    assert seen[1:] == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    bank.push(numbered)
    assert sorted(bank.entries[:, 0].tolist()) == [7, 8, 9, 10, 11]
    assert set(bank.state_dict()) == {"entries", "position"}
