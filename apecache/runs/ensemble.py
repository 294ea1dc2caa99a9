"""Combine heads that were trained one by one into one pair of heads."""

from collections.abc import Sequence
from statistics import fmean

from apecache.arguments import require_type, wrong_type
from apecache.errors import OptionError
from apecache.fingerprint import Json
from apecache.heads.head import EnsembleHead, Head, HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide


def ensemble_heads(runs: Sequence[TrainedHeads]) -> TrainedHeads:
    """Return one pair of heads whose cosines are the mean of the runs' cosines.

    Its scale is the mean of their scales. It has a bias, the mean of theirs, if all have one.

    Raises:
        OptionError: There are fewer than two runs.
        MismatchError: The runs are of different encoders.
    """
    if not isinstance(runs, Sequence):
        raise wrong_type(runs, "a list of TrainedHeads", "runs")
    for number, run in enumerate(runs):
        require_type(run, TrainedHeads, f"runs[{number}]")
    if len(runs) < 2:
        raise OptionError(f"{len(runs)} run given; give at least two to combine")
    for number, run in enumerate(runs[1:], 2):
        runs[0].image.require_encoder(run.image.fingerprint, f"run {number}: its image head")
        runs[0].text.require_encoder(run.text.fingerprint, f"run {number}: its text head")
    image = _combine([run.image for run in runs])
    text = _combine([run.text for run in runs])
    trainings = [dict(run.training) for run in runs]
    first = trainings[0]
    combined: dict[str, Json] = {}
    # A reader takes these for the data of the whole combination, so all runs must agree on them.
    for key in ("data", "splits"):
        if all(training.get(key) == first.get(key) for training in trainings):
            combined[key] = first.get(key)
    combined["combined"] = trainings
    biases = [run.bias for run in runs if run.bias is not None]
    return TrainedHeads(
        image=image,
        text=text,
        scale=fmean(run.scale for run in runs),
        bias=fmean(biases) if len(biases) == len(runs) else None,
        training=combined,
    )


def _combine(sides: Sequence[TrainedSide]) -> TrainedSide:
    """Put the heads of one modality side by side."""
    heads: list[Head] = []
    for side in sides:
        heads.extend(_single(side.head))
    spec = HeadSpec(kind="ensemble", parts=tuple(head.spec for head in heads))
    return TrainedSide(
        head=EnsembleHead(spec, heads).eval(),
        encoder=sides[0].encoder,
        fingerprint=sides[0].fingerprint,
    )


def _single(head: Head) -> list[Head]:
    """Return the single heads of a combination, so that each has the same weight in a new one."""
    if not isinstance(head, EnsembleHead):
        return [head]
    return [single_head for single_head in head.parts if isinstance(single_head, Head)]
