"""Heads that were trained one by one, put side by side as one."""

from collections.abc import Sequence
from statistics import fmean

from apecache.arguments import require_type, wrong_type
from apecache.errors import OptionError
from apecache.heads.head import Head, HeadSpec, SeveralHeads
from apecache.runs.heads import TrainedHeads, TrainedSide


def combine_heads(runs: Sequence[TrainedHeads]) -> TrainedHeads:
    """One pair of heads whose cosines are the mean of the runs' cosines; its scale is the mean of
    theirs.

    Raises:
        OptionError: fewer than two runs. MismatchError: they are of different encoders.
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
    sides = (_combine([run.image for run in runs]), _combine([run.text for run in runs]))
    training = [dict(run.training) for run in runs]
    first = training[0]
    shared = {
        key: first.get(key)
        for key in ("data", "splits")
        if all(t.get(key) == first.get(key) for t in training)
    }
    return TrainedHeads(*sides, fmean(run.scale for run in runs), {**shared, "combined": training})


def _combine(sides: Sequence[TrainedSide]) -> TrainedSide:
    heads = [head for side in sides for head in _single(side.head)]
    spec = HeadSpec(kind="several", parts=tuple(head.spec for head in heads))
    return TrainedSide(
        head=SeveralHeads(spec, heads).eval(),
        encoder=sides[0].encoder,
        fingerprint=sides[0].fingerprint,
    )


def _single(head: Head) -> list[Head]:
    """A combination of combinations is one of single heads, each of the same weight."""
    if not isinstance(head, SeveralHeads):
        return [head]
    return [part for part in head.parts if isinstance(part, Head)]
