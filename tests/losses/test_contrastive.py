"""The contrastive loss against its definition, and the temperature's bounds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from apecache.losses.contrastive import Temperature, info_nce


def info_nce_by_definition(
    image: NDArray[np.float64],
    text: NDArray[np.float64],
    scale: float,
) -> float:
    """Mean over both directions and all pairs of -log(exp(right) / sum(exp(all)))."""
    n = len(image)
    total = 0.0
    for i in range(n):
        to_text = [scale * sum(image[i] * text[j]) for j in range(n)]
        to_image = [scale * sum(image[j] * text[i]) for j in range(n)]
        for logits in (to_text, to_image):
            highest = max(logits)
            total += (
                highest + math.log(sum(math.exp(value - highest) for value in logits)) - logits[i]
            )
    return total / (2 * n)


def unit_rows(n: int, dim: int, seed: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 7),
    dim=st.integers(1, 6),
    scale=st.floats(0.5, 100),
    seed=st.integers(0, 2**31),
)
def test_info_nce_equals_its_definition_term_by_term(
    n: int,
    dim: int,
    scale: float,
    seed: int,
) -> None:
    image = unit_rows(n, dim, seed)
    text = unit_rows(n, dim, seed + 1)
    wanted = info_nce_by_definition(image, text, scale)
    assert float(info_nce(torch.tensor(image), torch.tensor(text), scale)) == pytest.approx(
        wanted,
        rel=1e-9,
        abs=1e-12,
    )
    single = float(info_nce(torch.tensor(image).float(), torch.tensor(text).float(), scale))
    assert single == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_gradients_equal_finite_differences_of_the_definition(scale: float) -> None:
    values = {"image": unit_rows(4, 3, 0), "text": unit_rows(4, 3, 1), "scale": np.array(scale)}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    info_nce(**tensors).backward()
    step = 1e-5
    for name, value in values.items():
        wanted = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = {key: array.copy() for key, array in values.items()}
                moved[name][index] += sign * step
                ends.append(
                    info_nce_by_definition(moved["image"], moved["text"], float(moved["scale"]))
                )
            wanted[index] = (ends[0] - ends[1]) / (2 * step)
        gradient = tensors[name].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-6, atol=1e-8, err_msg=name)


def test_embeddings_that_have_collapsed_cost_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 5), dim=-1)
    assert float(info_nce(same, same, 20.0)) == pytest.approx(math.log(8), rel=1e-6)


def test_pairs_that_are_far_apart_from_all_others_cost_nothing() -> None:
    assert float(info_nce(torch.eye(6), torch.eye(6), 100.0)) == pytest.approx(0, abs=1e-6)


def test_a_swapped_pair_costs_more_than_a_matching_one() -> None:
    image = torch.eye(2)
    assert info_nce(image, image.flip(0), 10.0) > 9 + info_nce(image, image, 10.0)


@pytest.mark.parametrize("initial", [0.01, 0.07, 0.5])
def test_the_temperature_divides_the_logits(initial: float) -> None:
    assert float(Temperature(initial).scale().detach()) == pytest.approx(1 / initial, rel=1e-6)


@pytest.mark.parametrize(
    ("log_scale", "expected"),
    [(99.0, 0.001), (-99.0, 0.5), (math.inf, 0.001), (-math.log(0.2), 0.2)],
    ids=["far too cold", "far too hot", "infinite", "within the bounds"],
)
def test_clamping_brings_the_temperature_into_its_bounds(log_scale: float, expected: float) -> None:
    temperature = Temperature(0.07, low=0.001, high=0.5)
    with torch.no_grad():
        temperature.log_scale.fill_(log_scale)
    temperature.clamp()
    assert 1 / float(temperature.scale().detach()) == pytest.approx(expected, rel=1e-5)


def test_clamping_leaves_the_parameter_in_place_for_the_optimizer() -> None:
    temperature = Temperature()
    before = temperature.log_scale
    temperature.clamp()
    assert temperature.log_scale is before
    assert before.requires_grad


@pytest.mark.parametrize("learnable", [True, False])
def test_only_a_learnable_temperature_gets_a_gradient(learnable: bool) -> None:
    temperature = Temperature(learnable=learnable)
    image = F.normalize(
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        dim=-1,
    ).requires_grad_()
    info_nce(image, torch.eye(4, 3), temperature.scale()).backward()
    assert (temperature.log_scale.grad is not None) is learnable
