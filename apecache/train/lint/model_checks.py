"""Check the model and the optimizer of a fit before it begins.

Models are checked on real features: two steps of the recipe's own optimizer, on a copy of the
model and a few images.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apecache.heads.pooled import GatedUnit
from apecache.recipes.recipe import Recipe
from apecache.train.batches import Batch, FeaturePairs, batches
from apecache.train.fit import Fit, HeadFit, Trainable, seeded
from apecache.train.lint.findings import Finding
from apecache.train.model import AlignmentModel

PROBE_IMAGES = 256
"""Images in a batch that heads are checked on."""
PROBE_PAIRS = 16
"""Images in a batch that towers are checked on, which are slower."""


def lint_model(
    model: AlignmentModel,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    train: FeaturePairs,
) -> Iterator[Finding]:
    """Check that everything that should learn can."""
    yield from lint_groups(model, optimizer, recipe)
    # A copy: the probe takes steps.
    probe = HeadFit(copy.deepcopy(model), recipe, 0)
    tested = [name for name, _ in model.named_parameters()]
    silent, shut = _probe(probe, train=train, n_images=PROBE_IMAGES, tested=tested)
    yield from _found_by_probe(silent, shut)


def lint_groups(
    model: Trainable,
    optimizer: torch.optim.Optimizer | None,
    recipe: Recipe,
) -> Iterator[Finding]:
    """Check that the optimizer holds everything that should learn. None holds nothing."""
    held: set[int] = set()
    if optimizer:
        for group in optimizer.param_groups:
            held.update(id(parameter) for parameter in group["params"])
    if recipe.loss.learnable and id(model.temperature.parameter) not in held:
        text = "the temperature is learnable, but in no group of the optimizer"
        yield Finding(
            check="temperature",
            level="error",
            message=f"{text}; give the optimizer every parameter of the model",
        )
    missing_names: list[str] = []
    for name, parameter in model.named_parameters():
        is_missing = parameter.requires_grad and id(parameter) not in held
        if is_missing and not name.startswith("temperature."):
            missing_names.append(name)
    if missing_names:
        yield Finding(
            check="optimizer",
            level="error",
            message=f"{_some(missing_names)} in no group of the optimizer; give it every parameter",
        )


def lint_encoder_model(training: Fit[Any], train: FeaturePairs) -> Iterator[Finding]:
    """Check that everything that should learn in a fit within towers can.

    The model is not copied, since towers are large. Afterwards it has other weights.
    """
    yield from lint_groups(training.model, training.optimizer, training.recipe)
    tested = [name for name, p in training.model.named_parameters() if p.requires_grad]
    if training.optimizer is not None:
        silent, shut = _probe(training, train=train, n_images=PROBE_PAIRS, tested=tested)
        yield from _found_by_probe(silent, shut)


def _found_by_probe(silent: Sequence[str], shut: Sequence[str]) -> Iterator[Finding]:
    """Report parameters without gradient and gates that never open."""
    if shut:
        yield Finding(
            check="gate",
            level="error",
            message=f"{_some(shut)} shut for every training image or text; "
            "begin with other weights",
        )
    # Nothing around a shut gate, nor in the tower before it, has a gradient: the gate explains it.
    explained: list[str] = []
    for gate in shut:
        side = gate.split(".")[0]
        explained += [gate.rpartition(".")[0], f"{side}.tower."]
    untrained = [name for name in silent if not name.startswith(tuple(explained))]
    if untrained:
        yield Finding(
            check="gradient",
            level="error",
            message=f"{_some(untrained)} without gradient in the first two steps; freeze or use it",
        )


def _some(names: Sequence[str], max_shown: int = 4) -> str:
    """List the first names, with the verb of a sentence."""
    suffix = f" and {len(names) - max_shown} more" if len(names) > max_shown else ""
    verb = "are" if len(names) > 1 else "is"
    return f"{', '.join(names[:max_shown])}{suffix} {verb}"


def _probe(
    fit: Fit[Any],
    train: FeaturePairs,
    n_images: int,
    tested: Sequence[str],
) -> tuple[list[str], list[str]]:
    """Take two steps, and look for parameters without gradient and gates that never open.

    Args:
        fit: Fit whose model is changed.
        train: Training pairs.
        n_images: Most images in a batch.
        tested: Names of the parameters that should learn.

    Returns:
        Tested parameters without gradient, and gates that never open.
    """
    assert fit.optimizer is not None
    model = fit.model
    recipe = fit.recipe
    parameters = dict(model.named_parameters())
    silent = {name for name in tested if not name.startswith("temperature.")}
    shut = set[str]()
    generator = torch.Generator().manual_seed(0)
    size = min(n_images, recipe.schedule.batch_size)
    with seeded(0, fit.device):
        captions = recipe.loss.captions
        # Two steps: a body beside a closed form begins with a last layer of zeros, behind which
        # gradients come with the second step only.
        probe_batches: list[Batch] = []
        for _ in range(2):
            batch = next(batches(train, batch_size=size, generator=generator, captions=captions))
            probe_batches.append(batch)
        model.train()
        for fit.step, batch in enumerate(probe_batches):
            outputs = _gate_outputs(model)
            fit.optimizer.zero_grad(set_to_none=True)
            fit.add_gradients(batch, 1)
            silent -= {name for name in silent if _has_gradient(parameters[name])}
            shut_now = {name for name, values in outputs.items() if not _opens(values)}
            shut = shut_now if fit.step == 0 else shut & shut_now
            fit.optimizer.step()
    return sorted(silent), sorted(shut)


def _opens(gate_values: Sequence[Tensor]) -> bool:
    """Check whether a gate is open for some input: above zero before its activation."""
    return any(bool((values > 0).any()) for values in gate_values)


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Check whether a gradient is not all zero."""
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def _gate_outputs(model: nn.Module) -> dict[str, list[Tensor]]:
    """Record what the gates give from now on, by name, before their activation.

    The lists fill when the model runs.
    """
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedUnit):
            gate_values = outputs.setdefault(f"{name}.gate", [])
            # A default argument binds the list of this gate, not that of the last one.
            module.gate.register_forward_hook(
                lambda _, __, out, gate_values=gate_values: gate_values.append(out.detach())
            )
    return outputs
