"""Heads that a run of `fit-head` has found, as the beginning of a fit within the towers."""

import copy
import math
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
from apecache.train.encoder_data import Source

ROUNDING = ("compute_dtype", "compile")
"""Fields of a fingerprint in which encoders differ by rounding alone."""
Differences = list[tuple[str, Json, Json]]


def open_start(run: Path, recipe: Recipe, sources: Sequence[Source]) -> TrainedHeads:
    """The heads of a finished run on the encoders of these sides.

    Raises:
        RunError: no finished run of fit-head. RecipeError: the recipe has no projection heads.
            MismatchError: the run
        is of other encoders.
    """
    if recipe.shared is not None:
        raise RecipeError(
            f"recipe {recipe.name}: a shared encoder has no heads to begin with; leave "
            "--init-from out"
        )
    require_head_run(run, "--init-from")
    start = load_heads(run)
    for source, side in zip(sources, (start.image, start.text), strict=True):
        found = _encoder_differences(source.fingerprint, side.fingerprint)
        if found:
            _refuse(
                run,
                what=f"the {source.side} encoder",
                found=found,
                remedy="give a run on the same encoder and pooling",
            )
    return start


@torch.no_grad()
def begin_from(start: TrainedHeads, model: EncoderModel, run: Path) -> None:
    """Weights of both heads, and the temperature if it learns (a sigmoid loss's bias, which runs do
    not keep, begins as the recipe says). A head that standardised is folded into one that does not,
    where the recipe's does not.

    Towers whose adapters begin as the identity, or that have none, then give on dev what the run
    gave.

    Raises:
        MismatchError: heads of another kind or shape, or one that cannot be folded.
    """
    for name, side, trained in (
        ("image", model.image, start.image),
        ("text", model.text, start.text),
    ):
        assert isinstance(side, Side)
        found = list(_head_differences(side.head, trained.head))
        if found:
            _refuse(
                run,
                what=f"the {name} head",
                found=found,
                remedy="fit heads like the recipe's, or change the recipe's",
            )
        side.head.load_state_dict(
            _as_wanted(trained.head, wanted=side.head, side=name, run=run).state_dict()
        )
    if model.temperature.log_scale.requires_grad:
        model.temperature.log_scale.fill_(math.log(start.scale))
        model.temperature.clamp()


def _encoder_differences(here: Fingerprint, there: Fingerprint) -> Differences:
    return [found for found in here.difference(there) if found[0] not in ROUNDING]


def _head_differences(here: Head, there: Head) -> Iterator[tuple[str, Json, Json]]:
    """Kinds, activations, and shapes of what is learned, part by part."""
    specs = [[head.spec, *head.spec.parts] for head in (here, there)]
    for one, other in zip(*specs, strict=False):
        if one.kind != other.kind:
            yield "kind", one.kind, other.kind
        elif one.kind == "mlp" and one.activation != other.activation:
            yield "activation", one.activation, other.activation
    shapes = [
        {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
        for head in (here, there)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one, other = (found.get(name, MISSING) for found in shapes)
        if one != other:
            yield name, one, other


def _as_wanted(trained: Head, wanted: Head, side: str, run: Path) -> Head:
    kept = wanted.spec.standardise or any(part.standardise for part in wanted.spec.parts)
    try:
        return copy.deepcopy(trained) if kept else folded(trained)
    except ValueError as error:
        raise MismatchError(
            f"{run} cannot begin this fit: its {side} head standardises its features, the "
            "recipe's does not, and "
            f"{error}; fit it again with {side}.standardise=false",
            [(f"{side}.standardise", False, True)],
        ) from None


def _refuse(run: Path, what: str, found: Differences, remedy: str) -> None:
    shown = "; ".join(
        f"{path} is {shorten(here)}, there {shorten(there)}" for path, here, there in found[:3]
    )
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise MismatchError(
        f"{run} cannot begin this fit: {what} differs ({shown}{more}); {remedy}",
        found,
    )
