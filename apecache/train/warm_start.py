"""Begin a fit within the towers with the heads of a run of `fit-head`."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from apecache.errors import MismatchError, RecipeError
from apecache.fingerprint import MISSING, Fingerprint, Json, shorten
from apecache.heads.fold import folded
from apecache.heads.head import Head
from apecache.models.dual_encoder import EncoderModel, Side
from apecache.recipes.recipe import Recipe
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.runs.load import require_head_run
from apecache.train.encoder_data import SideSource

ROUNDING = ("compute_dtype", "compile")
"""Fields of a fingerprint that change an encoder's outputs by rounding alone."""
Differences = list[tuple[str, Json, Json]]
"""Names, each with the value of the fit and that of the run."""


def open_start(run: Path, recipe: Recipe, sources: Sequence[SideSource]) -> TrainedHeads:
    """Load the heads of a finished run on the encoders of these sides.

    Args:
        run: Folder of the run.
        recipe: Recipe of the fit.
        sources: Both sides of the fit, image before text.

    Raises:
        RunError: `run` is not a finished run of fit-head.
        RecipeError: The recipe has no projection heads.
        MismatchError: The run is of other encoders.
    """
    if recipe.shared is not None:
        raise RecipeError(
            f"recipe {recipe.name}: a shared encoder has no heads to begin with; leave "
            "--init-from out"
        )
    require_head_run(run, "--init-from")
    start = load_heads(run)
    for source, side in zip(sources, (start.image, start.text), strict=True):
        differences = _encoder_differences(source.fingerprint, side.fingerprint)
        if differences:
            _refuse(
                run,
                what=f"the {source.side} encoder",
                found=differences,
                remedy="give a run on the same encoder and pooling",
            )
    return start


@torch.no_grad()
def begin_from(start: TrainedHeads, model: EncoderModel, run: Path) -> None:
    """Copy the weights of both heads into a model, and the temperature if it is trainable.

    A head that standardizes is folded into one that does not, if the recipe's head does not. The
    bias of a sigmoid loss, which runs do not keep, begins as the recipe says. If the towers have no
    adapters, or adapters that begin as the identity, the model gives on dev what the run gave.

    Raises:
        MismatchError: The heads are of another kind or shape, or one cannot be folded.
    """
    for name, side, trained in (
        ("image", model.image, start.image),
        ("text", model.text, start.text),
    ):
        assert isinstance(side, Side)
        differences = list(_head_differences(side.head, trained.head))
        if differences:
            _refuse(
                run,
                what=f"the {name} head",
                found=differences,
                remedy="fit heads like the recipe's, or change the recipe's",
            )
        head = _as_wanted(trained.head, wanted_head=side.head, side=name, run=run)
        side.head.load_state_dict(head.state_dict())
    if model.temperature.parameter.requires_grad:
        # Clamped: the run's scale can lie outside the bounds of this recipe.
        model.temperature.set_scale(start.scale)


def _encoder_differences(fit_encoder: Fingerprint, run_encoder: Fingerprint) -> Differences:
    """Return the differences of two encoders, without those of rounding."""
    differences = fit_encoder.difference(run_encoder)
    return [difference for difference in differences if difference[0] not in ROUNDING]


def _head_differences(fit_head: Head, run_head: Head) -> Iterator[tuple[str, Json, Json]]:
    """Yield the differences of two heads in kinds, activations and shapes of tensors."""
    fit_specs = [fit_head.spec, *fit_head.spec.parts]
    run_specs = [run_head.spec, *run_head.spec.parts]
    # Different numbers of parts show in the shapes below.
    for fit_spec, run_spec in zip(fit_specs, run_specs, strict=False):
        if fit_spec.kind != run_spec.kind:
            yield "kind", fit_spec.kind, run_spec.kind
        elif fit_spec.kind == "mlp" and fit_spec.activation != run_spec.activation:
            yield "activation", fit_spec.activation, run_spec.activation
    fit_shapes = _shapes(fit_head)
    run_shapes = _shapes(run_head)
    for name in sorted(fit_shapes.keys() | run_shapes.keys()):
        fit_shape = fit_shapes.get(name, MISSING)
        run_shape = run_shapes.get(name, MISSING)
        if fit_shape != run_shape:
            yield name, fit_shape, run_shape


def _shapes(head: Head) -> dict[str, Json]:
    """Return the shapes of a head's tensors by name."""
    return {name: list(tensor.shape) for name, tensor in head.state_dict().items()}


def _as_wanted(trained: Head, wanted_head: Head, side: str, run: Path) -> Head:
    """Return a trained head in the form of the fit's head, folded if that has no statistics.

    Raises:
        MismatchError: The head cannot be folded.
    """
    keeps_standardization = wanted_head.spec.standardize or any(
        part_spec.standardize for part_spec in wanted_head.spec.parts
    )
    try:
        return copy.deepcopy(trained) if keeps_standardization else folded(trained)
    except ValueError as error:
        raise MismatchError(
            f"{run} cannot begin this fit: its {side} head standardizes its features, the "
            f"recipe's does not, and {error}; fit it again with {side}.standardize=false",
            [(f"{side}.standardize", False, True)],
        ) from None


def _refuse(run: Path, what: str, found: Differences, remedy: str) -> None:
    """Raise a MismatchError that shows the first three differences."""
    shown = "; ".join(
        f"{path} is {shorten(fit_value)}, there {shorten(run_value)}"
        for path, fit_value, run_value in found[:3]
    )
    remainder = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise MismatchError(
        f"{run} cannot begin this fit: {what} differs ({shown}{remainder}); {remedy}",
        found,
    )
