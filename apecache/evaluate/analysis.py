"""Measure what training changed within the towers: the shift of every norm by its depth.

Source: LilT, analysis and figure 4.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apecache.arguments import require_type
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.encoders.tower import Tower, tower_of
from apecache.encoders.tower_parameters import TowerParameter
from apecache.errors import RunError
from apecache.fingerprint import Modality
from apecache.runs.encoders import TrainedEncoders, TrainedTower
from apecache.runs.heads import TrainedHeads
from apecache.runs.load import Run, RunSide
from apecache.storage.replace import replace_text


@dataclass(frozen=True, kw_only=True)
class NormShift:
    """Say how far one norm moved from its pretrained weights."""

    norm: str
    """Name of the norm in its tower."""
    depth: int
    """Depth of its block; -1 for the embeddings, the number of blocks for the final norm."""
    l1_weight: float
    """Sum of absolute differences of the weight."""
    l1_bias: float
    """Sum of absolute differences of the bias; 0 without a bias."""


@dataclass(frozen=True, kw_only=True)
class ShiftReport:
    """Hold the shifts of one tower."""

    side: Modality
    norms: tuple[NormShift, ...]
    """Shallowest first."""
    correlation_weight: float | None
    """Pearson's correlation of the weights' shift with the number of the norm. None with fewer
    than three norms, and where all shifts are equal."""
    correlation_bias: float | None
    """The same of the biases."""


def layernorm_shift(
    run: Run,
    device: str = "auto",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> tuple[ShiftReport, ...]:
    """Report the shifts of each tower that was trained, image before text.

    Args:
        run: a run of fit-encoder.
        device: where the pretrained encoders are loaded.
        image: the image encoder, if it has moved.
        text: the text encoder, if it has moved.

    Raises:
        RunError: no tower of the run was trained, so no norm can have moved.
    """
    require_type(run, (TrainedEncoders, TrainedHeads), "run")
    sides: tuple[tuple[RunSide, EncoderSpec | None], ...] = ((run.image, image), (run.text, text))
    reports = tuple(
        _report(side, moved, device) for side, moved in sides if isinstance(side, TrainedTower)
    )
    if not reports:
        raise RunError(
            "no tower of this run was trained, so no norm can have moved; give a run of fit-encoder"
        )
    return reports


def _report(side: TrainedTower, moved: EncoderSpec | None, device: str) -> ShiftReport:
    assert side.side.tower is not None
    spec = moved or spec_from_json(side.encoder)
    norms = norm_shifts(_original(spec, device), side.side.tower)
    return ShiftReport(
        side=spec.modality,
        norms=norms,
        correlation_weight=correlation([norm.l1_weight for norm in norms]),
        correlation_bias=correlation([norm.l1_bias for norm in norms]),
    )


def _original(spec: EncoderSpec, device: str) -> Tower:
    """Load the tower as it was before training."""
    load = load_image_encoder if spec.modality == "image" else load_text_encoder
    return tower_of(load(spec, device))


def norm_shifts(before: Tower, after: Tower) -> tuple[NormShift, ...]:
    """Measure all norms that both towers have, in the order in which data passes them.

    A shared encoder has fewer norms than the pretrained one.
    """
    names_after = {parameter.name for parameter in after.parts()}
    norm_parameters = []
    for parameter in before.parts():
        if parameter.norm and parameter.name in names_after:
            norm_parameters.append(parameter)
    # The sort is stable: parameters of one depth keep the order of the tower.
    norm_parameters.sort(key=lambda parameter: parameter.depth)
    sums = {}
    depth_of_norm = {}
    for parameter in norm_parameters:
        sums[parameter.name] = _l1(parameter, before, after)
        depth_of_norm[parameter.name.rpartition(".")[0]] = parameter.depth
    shifts = []
    for name, depth in depth_of_norm.items():
        shift = NormShift(
            norm=name,
            depth=depth,
            l1_weight=sums.get(f"{name}.weight", 0.0),
            l1_bias=sums.get(f"{name}.bias", 0.0),
        )
        shifts.append(shift)
    return tuple(shifts)


@torch.no_grad()
def _l1(parameter: TowerParameter, before: Tower, after: Tower) -> float:
    # In float64, on the CPU: the towers may be on different devices.
    value_before: Tensor = before.parameter(parameter).cpu().double()
    value_after: Tensor = after.parameter(parameter).cpu().double()
    return float((value_after - value_before).abs().sum())


def correlation(values: list[float]) -> float | None:
    """Compute Pearson's correlation of values with their positions.

    It is None for fewer than three values, and for values that are all equal.
    """
    # Of equal values the correlation is 0 / 0; of two it is always 1 or -1.
    if len(values) < 3 or np.ptp(values) == 0:
        return None
    positions = np.arange(len(values))
    return float(np.corrcoef(positions, values)[0, 1])


def bar_chart(report: ShiftReport, width: int = 640, bar: int = 14) -> str:
    """Draw an SVG with a bar for each norm, as long as its weights' shift.

    Args:
        report: the shifts of a tower.
        width: of the image, in pixels.
        bar: height of a bar, in pixels.
    """
    largest = max((norm.l1_weight for norm in report.norms), default=0.0) or 1.0
    height = bar * len(report.norms) + 24
    # Room for the long names of norms, in pixels.
    label_width = 260
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" '
        f'font-size="10"><text x="4" y="14">{report.side} tower: L1 shift of the norms\' '
        "weights</text>"
    ]
    for row, norm in enumerate(report.norms):
        top = 24 + bar * row
        length = (width - label_width - 70) * norm.l1_weight / largest
        lines.append(
            f'<text x="{label_width - 6}" y="{top + 10}" text-anchor="end">{norm.norm}</text>'
        )
        lines.append(
            f'<rect x="{label_width}" y="{top + 2}" width="{length:.1f}" height="{bar - 4}" '
            'fill="#3667a6"/>'
        )
        lines.append(
            f'<text x="{label_width + length + 4:.1f}" y="{top + 10}">{norm.l1_weight:.3g}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def write_charts(reports: tuple[ShiftReport, ...], out: Path) -> tuple[Path, ...]:
    """Write `OUT/layernorm-shift-SIDE.svg` of each tower; the folder is created if missing."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for report in reports:
        path = out / f"layernorm-shift-{report.side}.svg"
        replace_text(path, bar_chart(report))
        paths.append(path)
    return tuple(paths)
