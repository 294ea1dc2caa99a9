"""Fits within small towers, as fit-encoder makes them, and what a test sees of their steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from formulas import AdamW
from PIL import Image
from small_towers import sentences, small_bert, small_vit
from torch import Tensor

from apecache.device import CPU
from apecache.encoders.tower import Tower
from apecache.models.dual_encoder import EncoderModel, Teacher, build_around
from apecache.recipes.recipe import Recipe
from apecache.train.batches import Batch
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit import StepCount, cloned_tensors
from apecache.train.live import CachedInputs, ImageInputs, Inputs, reading
from apecache.train.loop import set_rates, take_step
from apecache.train.ranks import ALONE
from apecache.train.tower_fit import EncoderFit

N_ROWS = 6
"""Images of a fit, each with one caption."""


def batch_of(*rows: int) -> Batch:
    return Batch(image=torch.tensor(rows), text=torch.tensor(rows))


@dataclass(frozen=True)
class Captions:
    """Token ids of given captions."""

    ids: Tensor
    mask: Tensor

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.ids[list(rows)], self.mask[list(rows)]

    def lengths(self, rows: Sequence[int]) -> None:
        return None


def noise_image(key: str) -> Image.Image:
    pixels = np.random.default_rng(int(key)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> Tensor:
    """[3, 16, 16] with deviation 1 or so."""
    resized = np.asarray(image.resize((16, 16)), dtype=np.float32)
    return torch.from_numpy((resized / 255 - 0.5) * 4).permute(2, 0, 1)


def small_fit(
    recipe: Recipe, cached: Tensor | None = None, teacher: Tensor | None = None
) -> "SmallFit":
    """A fit of `small_vit` and `small_bert`, with perturbed weights.

    Args:
        cached: pooled features of the images, in the place of the image tower.
        teacher: features of a shared encoder's teacher.
    """
    vit = small_vit() if cached is None else None
    torch.manual_seed(0)
    model = build_around(
        [vit, small_bert()],
        recipe=recipe,
        dims=(16, 16),
        device=CPU,
        teacher=None if teacher is None else Teacher(dim=teacher.shape[1], features=teacher),
    )
    disturb(model)
    image: Inputs = ImageInputs(
        keys=[str(row) for row in range(N_ROWS)],
        open_image=noise_image,
        preprocess=pixels_of,
        device=CPU,
        workers=1,
    )
    if cached is not None:
        image = CachedInputs(features=cached, device=CPU)
    text = Captions(*sentences(N_ROWS))
    fit = EncoderFit(
        model,
        inputs=(image, text),
        recipe=recipe,
        spec=FitEncoderSpec(device="cpu"),
        ranks=ALONE,
    )
    return SmallFit(fit, text, vit)


def disturb(model: EncoderModel) -> None:
    """Move weights by normal noise: at the start gradients of attention are next to nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.2 * torch.randn_like(parameter)


class SmallFit:
    """A fit, and the pixels that its image tower was given."""

    def __init__(self, fit: EncoderFit, captions: Captions, vit: Tower | None) -> None:
        self.fit = fit
        self.captions = captions
        self.pixels = torch.empty(0)
        if vit is not None:
            vit.module.patch_embed.register_forward_pre_hook(self._keep)

    def _keep(self, _module: object, inputs: tuple[Tensor, ...]) -> None:
        self.pixels = inputs[0]

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters, of which a formula gives gradients."""
        return {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self.fit.model.named_parameters()
        }

    def trained(self) -> set[str]:
        return {name for name, p in self.fit.model.named_parameters() if p.requires_grad}

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """The loss of a batch as a step computes it, and the gradients by name."""
        self.fit.model.train()
        self.fit.model.zero_grad()
        with reading((*self.fit.inputs, *self.fit.seen)):
            loss = float(self.fit.add_gradients(batch, 1))
        named = self.fit.model.named_parameters()
        return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}

    def rates(self, plan: StepCount) -> list[float]:
        """The rates that the optimizer's groups have in each step, all groups the same."""
        assert self.fit.optimizer is not None
        found = []
        for step in range(plan.n_steps):
            self.fit.step = step
            set_rates(self.fit, plan)
            rates = {group["lr"] for group in self.fit.optimizer.param_groups}
            assert len(rates) == 1
            found += rates
        self.fit.step = 0
        return found

    def decays(self) -> dict[str, float]:
        """The weight decay of what trains, each parameter in exactly one group."""
        assert self.fit.optimizer is not None
        names = {id(p): name for name, p in self.fit.model.named_parameters()}
        grouped = [
            (names[id(parameter)], group["weight_decay"])
            for group in self.fit.optimizer.param_groups
            for parameter in group["params"]
        ]
        assert sorted(name for name, _ in grouped) == sorted(self.trained())
        return dict(grouped)


def assert_gradients(
    small: SmallFit, batch: Batch, formula: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """Loss and gradients of a step are those of a formula, for what trains and for nothing else."""
    weights = small.weights()
    loss, gradients = small.gradients(batch)
    expected = formula(weights)
    torch.testing.assert_close(loss, float(expected.detach()), rtol=1e-5, atol=1e-6)
    by_formula = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    assert gradients.keys() == small.trained()
    for (name, weight), gradient in zip(weights.items(), by_formula, strict=True):
        if name not in gradients:
            continue
        expected_gradient = torch.zeros_like(weight) if gradient is None else gradient
        torch.testing.assert_close(
            gradients[name],
            expected_gradient,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_steps(
    small: SmallFit,
    plan: StepCount,
    rule: AdamW,
    decays: dict[str, float],
    first_step: int,
) -> None:
    """Two steps move every parameter as AdamW says, by gradients that are not clipped."""
    model = small.fit.model
    assert small.fit.optimizer is not None
    for group in small.fit.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == (rule.betas, rule.eps)
    start = small.weights()
    small.fit.step = first_step
    taken: dict[str, list[Tensor]] = {name: [] for name in small.trained()}
    for batch in (batch_of(2, 0, 1), batch_of(5, 3, 4)):
        before = cloned_tensors(model.kept_state())
        _, gradients = small.gradients(batch)
        # Computing the gradients has filled a teacher's bank, which the real step fills again.
        model.load_kept(before)
        # Gradients that clipping to 1 would change.
        assert sum(float(gradient.square().sum()) for gradient in gradients.values()) > 1
        with reading((*small.fit.inputs, *small.fit.seen)):
            take_step(small.fit, iter([batch]), plan)
        small.fit.step += 1
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient)
            taken[name].append(gradient)
    for name, parameter in model.named_parameters():
        before_steps = start[name].detach().double()
        move = parameter.detach().double() - before_steps
        expected = torch.zeros_like(move)
        if name in taken:
            expected = (
                rule.moved(before_steps, taken[name], decays[name], first_step) - before_steps
            )
        # Weights of about 0.3 are rounded to 3e-8, twice.
        torch.testing.assert_close(
            move,
            expected,
            rtol=1e-3,
            atol=2e-7 if name in taken else 0.0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
