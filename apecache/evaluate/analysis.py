"""What training changed within the towers: the shift of every norm by its depth (LilT, analysis and
figure 4)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.encoders.tower import Part, Tower, tower_of
from apecache.errors import RunError
from apecache.fingerprint import Modality
from apecache.runs.encoders import TrainedTower
from apecache.runs.load import Run, RunSide


@dataclass(frozen=True, kw_only=True)
class NormShift:
    """`l1_weight`, `l1_bias`: sums of absolute differences from the pretrained weights (bias 0
    where there is none). `depth`: of its block; -1 for the embeddings, the number of blocks for the
    final norm."""

    norm: str
    depth: int
    l1_weight: float
    l1_bias: float


@dataclass(frozen=True, kw_only=True)
class ShiftReport:
    """One tower, shallowest norm first. `correlation_…`: Pearson's, of the shift with the number of
    the norm; None where fewer than three norms or no shift would give no number."""

    side: Modality
    norms: tuple[NormShift, ...]
    correlation_weight: float | None
    correlation_bias: float | None


def layernorm_shift(
    run: Run,
    device: str = "auto",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> tuple[ShiftReport, ...]:
    """Of each tower that was trained, image before text. `image`, `text`: encoders that have moved.

    Raises:
        RunError: no tower of the run was trained, so no norm can have moved.
    """
    sides: tuple[tuple[RunSide, EncoderSpec | None], ...] = ((run.image, image), (run.text, text))
    found = tuple(
        _report(side, moved, device) for side, moved in sides if isinstance(side, TrainedTower)
    )
    if not found:
        raise RunError(
            "no tower of this run was trained, so no norm can have moved; give a run of fit-encoder"
        )
    return found


def _report(side: TrainedTower, moved: EncoderSpec | None, device: str) -> ShiftReport:
    assert side.side.tower is not None
    spec = moved or spec_from_json(side.encoder)
    norms = norm_shifts(_original(spec, device), side.side.tower)
    weights, biases = ([getattr(norm, kind) for norm in norms] for kind in ("l1_weight", "l1_bias"))
    return ShiftReport(
        side=spec.modality,
        norms=norms,
        correlation_weight=correlation(weights),
        correlation_bias=correlation(biases),
    )


def _original(spec: EncoderSpec, device: str) -> Tower:
    load = load_image_encoder if spec.modality == "image" else load_text_encoder
    return tower_of(load(spec, device))


def norm_shifts(before: Tower, after: Tower) -> tuple[NormShift, ...]:
    """Of all norms that both have (a shared encoder has fewer), in the order of the data."""
    there = {part.name for part in after.parts()}
    parts = [part for part in before.parts() if part.norm and part.name in there]
    order = {part.name: (part.depth, place) for place, part in enumerate(parts)}
    sums = {
        part.name: _l1(part, before, after)
        for part in sorted(parts, key=lambda part: order[part.name])
    }
    names = dict.fromkeys(name.rpartition(".")[0] for name in sums)
    depths = {part.name.rpartition(".")[0]: part.depth for part in parts}
    return tuple(
        NormShift(
            norm=name,
            depth=depths[name],
            l1_weight=sums.get(f"{name}.weight", 0.0),
            l1_bias=sums.get(f"{name}.bias", 0.0),
        )
        for name in names
    )


@torch.no_grad()
def _l1(part: Part, before: Tower, after: Tower) -> float:
    pair: tuple[Tensor, Tensor] = (
        before.parameter(part).cpu().double(),
        after.parameter(part).cpu().double(),
    )
    return float((pair[1] - pair[0]).abs().sum())


def correlation(values: list[float]) -> float | None:
    """Pearson's, of values with their places."""
    if len(values) < 3 or np.ptp(values) == 0:
        return None
    return float(np.corrcoef(np.arange(len(values)), values)[0, 1])


def bar_chart(report: ShiftReport, width: int = 640, bar: int = 14) -> str:
    """SVG: a bar for each norm, as long as its weights' shift."""
    largest = max((norm.l1_weight for norm in report.norms), default=0.0) or 1.0
    height = bar * len(report.norms) + 24
    left = 260
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" '
        f'font-size="10"><text x="4" y="14">{report.side} tower: L1 shift of the norms\' '
        "weights</text>"
    ]
    for row, norm in enumerate(report.norms):
        top = 24 + bar * row
        length = (width - left - 70) * norm.l1_weight / largest
        lines.append(f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{norm.norm}</text>')
        lines.append(
            f'<rect x="{left}" y="{top + 2}" width="{length:.1f}" height="{bar - 4}" '
            'fill="#3667a6"/>'
        )
        lines.append(
            f'<text x="{left + length + 4:.1f}" y="{top + 10}">{norm.l1_weight:.3g}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def write_charts(reports: tuple[ShiftReport, ...], out: Path) -> tuple[Path, ...]:
    """`OUT/layernorm-shift-SIDE.svg` of each tower; the folder is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for report in reports:
        paths.append(out / f"layernorm-shift-{report.side}.svg")
        paths[-1].write_text(bar_chart(report), encoding="utf-8")
    return tuple(paths)
