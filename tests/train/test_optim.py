"""The optimizer's groups and the learning-rate schedule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.losses.contrastive import Temperature
from apecache.recipes.schedule import OptimizerSpec, ScheduleSpec
from apecache.runs.checkpoint import restore_optimizer
from apecache.train.model import AlignmentModel
from apecache.train.optim import build_optimizer, learning_rate_factor


def schedule(warmup: float, final: float = 0.0) -> ScheduleSpec:
    return ScheduleSpec(warmup=warmup, final=final)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (55, 0.5),
        (40, 0.75),
        (70, 0.25),
        (99, (1 + math.cos(math.pi * 89 / 90)) / 2),
    ],
)
def test_the_rate_rises_in_equal_steps_and_falls_along_a_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, 100, schedule(0.1)) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "n_steps", "spec", "factor"),
    [
        (0, 100, schedule(0.0), 1.0),
        (50, 100, schedule(0.0), 0.5),
        (50, 100, schedule(0.0, final=0.2), 0.6),
        (0, 3, schedule(0.01), 1.0),
        (0, 4, schedule(1.0), 0.25),
        (3, 4, schedule(1.0), 1.0),
        (0, 1, schedule(0.0), 1.0),
        (0, 1, schedule(1.0), 1.0),
        (99, 100, schedule(0.3, final=1.0), 1.0),
    ],
)
def test_the_ends_of_the_schedule_are_where_the_settings_put_them(
    step: int,
    n_steps: int,
    spec: ScheduleSpec,
    factor: float,
) -> None:
    assert learning_rate_factor(step, n_steps, spec) == pytest.approx(factor, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(n_steps=st.integers(1, 200), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_the_rate_never_jumps_and_stays_between_nothing_and_all(
    n_steps: int,
    warmup: float,
    final: float,
) -> None:
    factors = [
        learning_rate_factor(step, n_steps, schedule(warmup, final)) for step in range(n_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(factor >= final - 1e-12 for factor in factors[top:])


def make_model(learnable: bool = True) -> AlignmentModel:
    heads = build_heads(
        HeadSpec(kind="linear", dim=3),
        text=HeadSpec(kind="mlp", width=4, depth=1, skip=True),
        image_dim=5,
        text_dim=6,
    )
    return AlignmentModel(*heads, Temperature(learnable=learnable))


@pytest.mark.parametrize("learnable", [True, False])
def test_every_trained_parameter_the_temperature_included_is_in_exactly_one_group(
    learnable: bool,
) -> None:
    model = make_model(learnable)
    optimizer = build_optimizer(model.rates(), OptimizerSpec())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert (id(model.temperature.log_scale) in grouped) is learnable


def test_only_matrices_are_decayed() -> None:
    model = make_model()
    spec = OptimizerSpec(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(model.rates(), spec)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)
    assert {parameter.ndim for parameter in model.parameters()} == {0, 1, 2}


def test_lion_moves_by_the_sign_of_its_momentum() -> None:
    spec = OptimizerSpec(kind="lion", lr=0.01, betas=(0.6, 0.9), weight_decay=0.5)
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0, -3.0]]))
    optimizer = build_optimizer([(parameter, 1.0)], spec)
    momentum = torch.zeros(3)
    expected = parameter.detach()[0].clone()
    for gradient in (
        torch.tensor([0.3, -0.2, 0.0]),
        torch.tensor([-0.1, 0.1, 2.0]),
        torch.tensor([-0.9, 0.3, 1.0]),
    ):
        parameter.grad = gradient[None].clone()
        optimizer.step()
        update = (0.6 * momentum + 0.4 * gradient).sign()
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * update
        momentum = 0.9 * momentum + 0.1 * gradient
    torch.testing.assert_close(parameter.detach()[0], expected)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"][0], momentum)


def test_lion_resumes_from_a_checkpoint_that_calls_its_average_momentum() -> None:
    spec = OptimizerSpec(kind="lion", lr=0.01, weight_decay=0.0)
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = build_optimizer([(parameter, 1.0)], spec)
    momentum = torch.tensor([[0.3, -0.2]])
    restore_optimizer(optimizer, {"0/momentum": momentum})
    parameter.grad = torch.zeros(1, 2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([[0.99, 2.01]]))


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (OptimizerSpec(kind="adam"), torch.optim.Adam),
        (OptimizerSpec(kind="sgd"), torch.optim.SGD),
        (OptimizerSpec(), torch.optim.AdamW),
    ],
)
def test_torchs_optimizers_are_fused_and_decay_only_matrices(
    spec: OptimizerSpec,
    kind: type,
) -> None:
    optimizer = build_optimizer(make_model().rates(), spec)
    assert type(optimizer) is kind
    assert all(group["fused"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_warm_up_can_be_told_in_steps_and_the_rate_can_stay() -> None:
    spec = ScheduleSpec(warmup=0.9, warmup_steps=4, decay="constant")
    assert [learning_rate_factor(step, 100, spec) for step in (0, 1, 3, 4, 99)] == [
        0.25,
        0.5,
        1,
        1,
        1,
    ]


def test_the_first_step_is_adams_with_the_settings_given() -> None:
    spec = OptimizerSpec(lr=0.01, betas=(0.7, 0.8), eps=0.5, weight_decay=0.0)
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = build_optimizer([(parameter, 1.0)], spec)
    moments = torch.zeros(2, 2)
    expected = torch.tensor([1.0, 2.0])
    for step, gradient in enumerate((torch.tensor([0.3, -0.2]), torch.tensor([-1.0, 0.1])), 1):
        parameter.grad = gradient[None]
        optimizer.step()
        moments[0] = 0.7 * moments[0] + 0.3 * gradient
        moments[1] = 0.8 * moments[1] + 0.2 * gradient.square()
        first = moments[0] / (1 - 0.7**step)
        second = moments[1] / (1 - 0.8**step)
        expected = expected - 0.01 * first / (second.sqrt() + 0.5)
    torch.testing.assert_close(parameter.detach()[0], expected)
