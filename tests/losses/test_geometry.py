"""The STRUCTURE regularizer against its definition."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from apecache.losses.geometry import Divergence, structure_divergence


def by_definition(before: np.ndarray, after: np.ndarray, temperature: float, kind: str) -> float:  # type: ignore[type-arg]
    def similarities(x):  # type: ignore[no-untyped-def]
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        unit = unit - unit.mean(0)
        e = np.exp(unit @ unit.T / temperature)
        return e / e.sum(1, keepdims=True)

    a = similarities(before)
    o = similarities(after)
    m = (a + o) / 2
    total = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            if kind == "jensen-shannon":
                total += a[i, j] * math.log(a[i, j] / m[i, j]) + o[i, j] * math.log(
                    o[i, j] / m[i, j]
                )
            else:
                total += m[i, j] * math.log(m[i, j] / a[i, j]) + m[i, j] * math.log(
                    m[i, j] / o[i, j]
                )
    return total / (2 * len(a))


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_divergence_equals_its_definition_and_its_gradient_finite_differences(
    kind: Divergence,
    temperature: float,
) -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(6, 4))
    after = rng.normal(size=(6, 3))
    tensors = torch.tensor(before), torch.tensor(after, requires_grad=True)
    found = structure_divergence(*tensors, temperature, kind)
    assert float(found.detach()) == pytest.approx(
        by_definition(before, after=after, temperature=temperature, kind=kind),
        rel=1e-9,
    )
    assert torch.autograd.gradcheck(
        lambda x: structure_divergence(tensors[0], after=x, temperature=temperature, kind=kind),
        tensors[1],
    )


def test_a_rotation_and_a_change_of_length_cost_nothing() -> None:
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert float(structure_divergence(x, 3 * x @ rotation)) == pytest.approx(0, abs=1e-12)


def test_the_jensen_shannon_divergence_never_exceeds_log_2() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 3, generator=generator) for _ in range(2))
    assert 0 < float(structure_divergence(x, y, 0.001)) <= math.log(2) + 1e-6


def test_features_before_the_head_get_no_gradient() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(4, 3, requires_grad=True)
    structure_divergence(x, y).backward()
    assert x.grad is None
    assert y.grad is not None
