"""Temperatures and updates of recipes against the formulas of their publications."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from small_heads import small_pairs, small_recipe
from torch import Tensor

from apecache.losses.contrastive import Temperature, info_nce, temperature_in
from apecache.losses.registry import build_temperature
from apecache.recipes.recipe import load_recipe
from apecache.train.batches import Batch
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import draw_epoch, take_step, take_steps
from apecache.train.model import AlignmentModel, build_model
from apecache.train.optim import build_optimizer

# --- temperatures ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What multiplies the cosines."""

    start: float
    least: float = 2.0
    most: float = 100.0
    learnt: str = "log_scale"
    """The parameter that is learnt; empty: none, the scale stays."""
    bias: float | None = None
    decay: float = 0.0


SCALES = {
    "ape": Scale(start=1 / 0.07),
    "deep-adapter": Scale(start=1 / 0.07, most=1000, learnt="temperature", decay=0.02),
    "freeze-align": Scale(start=1 / 0.07),
    "fusemix": Scale(start=1 / 0.07, most=1000, learnt="temperature"),
    "lilt-projection": Scale(start=1 / 0.07, most=1000, learnt="temperature", decay=0.02),
    "sail": Scale(start=20, bias=-10),
    "sharelock": Scale(start=14.28, learnt=""),
    "structure": Scale(start=20, learnt=""),
    "token-anchors": Scale(start=1 / 0.07),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_scale_starts_and_is_bounded_as_written_down(name: str) -> None:
    scale = SCALES[name]
    training = started(name)
    temperature = training.model.temperature
    assert float(temperature.scale().detach()) == pytest.approx(scale.start, rel=1e-3)
    assert temperature.bias_value() == scale.bias
    decays = decay_by_id(training)
    scalars = (
        [temperature.parameter] if temperature.bias is None else list(temperature.parameters())
    )
    if not scale.learnt:
        assert not any(id(parameter) in decays for parameter in scalars)
        return
    assert temperature.parameter_name == scale.learnt
    assert [decays[id(parameter)] for parameter in scalars] == [scale.decay] * len(scalars)
    for value in (-99.0, 99.0):
        with torch.no_grad():
            temperature.parameter.fill_(value)
        temperature.clamp()
        is_most = (value > 0) == (scale.learnt == "log_scale")
        expected = scale.most if is_most else scale.least
        assert float(temperature.scale().detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SCALES)
def test_steps_move_the_scale_only_where_it_is_learnt(name: str) -> None:
    training = started(name)
    before = [parameter.detach().clone() for parameter in training.model.temperature.parameters()]
    pairs = small_pairs(training.recipe)
    plan = StepCount.of(training.recipe, pairs)
    for _ in range(3):
        take_steps(training, drawn=draw_epoch(training, pairs, plan), plan=plan)
        training.in_epoch = 0
    assert training.step == 3 * plan.per_epoch
    for parameter, value in zip(training.model.temperature.parameters(), before, strict=True):
        assert torch.equal(parameter, value) == (not SCALES[name].learnt)
        assert (parameter.grad is None) == (not SCALES[name].learnt)


def started(name: str, *settings: str) -> HeadFit:
    recipe = small_recipe(name, *settings)
    return HeadFit(build_model(recipe, small_pairs(recipe), seed=0), recipe, seed=0)


def decay_by_id(training: HeadFit) -> dict[int, float]:
    assert training.optimizer is not None
    return {
        id(parameter): group["weight_decay"]
        for group in training.optimizer.param_groups
        for parameter in group["params"]
    }


# --- updates --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The settings of an optimizer."""

    kind: str
    lr: float
    decay: float
    betas: tuple[float, float]
    eps: float = 1e-6
    clip: float = 0.0


RULES = {
    "ape": Rule(kind="adamw", lr=1e-3, decay=0.1, betas=(0.9, 0.98)),
    "deep-adapter": Rule(kind="adamw", lr=1e-4, decay=0.02, betas=(0.9, 0.999), eps=1e-8),
    "freeze-align": Rule(kind="adamw", lr=5e-4, decay=0.1, betas=(0.9, 0.98)),
    "fusemix": Rule(kind="adamw", lr=1e-3, decay=0.1, betas=(0.9, 0.999), eps=1e-8),
    "lilt-projection": Rule(kind="adamw", lr=1e-4, decay=0.02, betas=(0.9, 0.999), eps=1e-8),
    "sail": Rule(kind="lion", lr=1e-4, decay=1e-2, betas=(0.9, 0.99)),
    "sharelock": Rule(kind="adam", lr=1e-3, decay=1e-4, betas=(0.9, 0.999), eps=1e-8, clip=1.0),
    "structure": Rule(kind="adamw", lr=2e-3, decay=1.0, betas=(0.9, 0.98)),
    "token-anchors": Rule(kind="adamw", lr=1e-3, decay=0.1, betas=(0.9, 0.98)),
}


@pytest.mark.parametrize("name", RULES)
def test_optimizers_have_the_named_settings(name: str) -> None:
    spec = load_recipe(name).optimizer
    rule = RULES[name]
    assert (spec.kind, spec.lr, spec.weight_decay) == (rule.kind, rule.lr, rule.decay)
    assert (spec.betas, spec.clip) == (rule.betas, rule.clip)
    # Lion has no such term.
    assert rule.kind == "lion" or spec.eps == rule.eps


@dataclass(kw_only=True)
class Update:
    """A parameter and its moments under a rule, in double precision."""

    value: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.value)
        self.second = torch.zeros_like(self.value)

    def take(self, gradient: Tensor, rule: Rule, step: int, lr: float, decay: float) -> None:
        """Move by the formula of Lion, of AdamW, or of Adam, whose decay is part of the gradient.

        Args:
            step: From 1.
        """
        fast, slow = rule.betas
        if rule.kind == "lion":
            direction = (fast * self.first + (1 - fast) * gradient).sign()
            self.value = self.value * (1 - lr * decay) - lr * direction
            self.first = slow * self.first + (1 - slow) * gradient
            return
        if rule.kind == "adam":
            gradient = gradient + decay * self.value
        else:
            self.value = self.value * (1 - lr * decay)
        self.first = fast * self.first + (1 - fast) * gradient
        self.second = slow * self.second + (1 - slow) * gradient.square()
        deviation = (self.second / (1 - slow**step)).sqrt()
        self.value = self.value - lr * self.first / (1 - fast**step) / (deviation + rule.eps)


@pytest.mark.parametrize("name", ["ape", "lilt-projection", "sail", "sharelock"])
def test_three_steps_move_every_parameter_as_the_formulas_say(name: str) -> None:
    """At a rate and a decay that are large enough to be seen in single precision."""
    lr = 0.05
    decay = 0.5
    constant = ("warmup=0", "warmup_steps=0", "decay=constant")
    training = started(
        name,
        f"optimizer.lr={lr}",
        f"optimizer.weight_decay={decay}",
        *(f"schedule.{setting}" for setting in constant),
    )
    rule = RULES[name]
    pairs = small_pairs(training.recipe)
    plan = StepCount.of(training.recipe, pairs)
    model = training.model.train()
    updates = {
        key: Update(value=p.detach().double())
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    norms = []
    for step in range(1, 4):
        (batch,) = draw_epoch(training, pairs, plan)
        expected_gradients = gradients_of(copy.deepcopy(model), batch)
        norm = math.sqrt(sum(float(g.square().sum()) for g in expected_gradients.values()))
        norms.append(norm)
        shrink = min(1.0, rule.clip / norm) if rule.clip else 1.0
        take_step(training, iter([batch]), plan)
        for key, parameter in model.named_parameters():
            if key not in updates:
                continue
            # The very gradient of the step: Adam and Lion magnify rounding errors of one near 0.
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            assert_same(key, gradient, shrink * expected_gradients[key])
            is_decayed = parameter.ndim >= 2 or (name == "lilt-projection" and parameter.ndim == 0)
            update = updates[key]
            update.take(gradient, rule, step=step, lr=lr, decay=decay if is_decayed else 0.0)
            if parameter is model.temperature.parameter:
                update.value = update.value.clamp(*model.temperature.bounds)
            assert_same(key, parameter.detach().double(), update.value)
    assert not rule.clip or max(norms) > rule.clip


def assert_same(key: str, own: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        own,
        expected,
        rtol=1e-4,
        atol=1e-5,
        msg=lambda text: f"{key}: {text}",
    )


def gradients_of(model: AlignmentModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(batch).backward()
    return {key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}


# --- the temperature itself -----------------------------------------------------------------------


def embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(64, 32, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(image + 0.3 * torch.randn(64, 32, generator=generator), dim=-1)
    return image, text


@pytest.mark.parametrize("name", ["lilt-c", "lilt-projection", "fusemix"])
def test_the_temperature_itself_is_learnt_as_published(name: str) -> None:
    """T is an AdamW parameter; the loss is the mean of two cross-entropies of cosines over T."""
    recipe = load_recipe(name)
    image, text = embeddings()
    temperature = build_temperature(recipe.loss)
    optimizer = build_optimizer([(temperature.parameter, 1.0)], recipe.optimizer)
    reference = torch.tensor(0.07, requires_grad=True)
    decay = recipe.optimizer.weight_decay if name != "fusemix" else 0.0
    rule = torch.optim.AdamW(
        [reference],
        lr=recipe.optimizer.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=decay,
    )
    for _ in range(100):
        logits = image @ text.T / reference
        targets = torch.arange(64)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        rule.zero_grad()
        loss.backward()
        optimizer.zero_grad()
        own_loss = info_nce(image, text, temperature.scale())
        own_loss.backward()
        assert float(own_loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert reference.grad is not None
        assert temperature.parameter.grad is not None
        torch.testing.assert_close(temperature.parameter.grad, reference.grad, rtol=1e-4, atol=1e-6)
        rule.step()
        optimizer.step()
        temperature.clamp()
        with torch.no_grad():
            reference.clamp_(0.001, 0.5)
    learnt = temperature_in({"temperature.temperature": temperature.parameter})
    assert learnt == pytest.approx(float(reference.detach()), rel=1e-4)
    # A hundred steps of 1e-4 or 1e-3 take T far; the logarithm would have moved by as much only.
    assert learnt < 0.062


def test_both_parameters_have_one_scale_and_the_slope_of_autograd() -> None:
    for parameter in ("log_scale", "temperature"):
        temperature = Temperature(0.05, parameter=parameter)
        scale = temperature.scale()
        assert float(scale.detach()) == pytest.approx(20, rel=1e-6)
        (gradient,) = torch.autograd.grad(scale, temperature.parameter)
        assert float(temperature.scale_slope().detach()) == pytest.approx(float(gradient), rel=1e-6)
        temperature.set_scale(1e6)
        assert float(temperature.scale().detach()) == pytest.approx(100, rel=1e-5)
        assert temperature_in({f"temperature.{parameter}": temperature.parameter}) == pytest.approx(
            0.01, rel=1e-5
        )
