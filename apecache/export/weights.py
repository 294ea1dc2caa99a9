"""Heads as plain safetensors with a JSON beside them: what another program needs to build them
again."""

import json
from pathlib import Path

from apecache.fingerprint import Json
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.storage.atomic import replace_tensors

SIDES = ("image", "text")


def export_safetensors(heads: TrainedHeads, out: Path) -> list[str]:
    """`image.safetensors`, `text.safetensors`: each head's own tensors by their own names;
    `heads.json`: what they are. Returns the names of the files."""
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        replace_tensors(out / f"{side}.safetensors", getattr(heads, side).head.state_dict())
    return [*(f"{side}.safetensors" for side in SIDES), write_description(heads, out)]


def write_description(heads: TrainedHeads, out: Path, **more: Json) -> str:
    """`heads.json`. A head's output is L2-normalised; cosines times `scale` are the logits of the
    training."""
    sides = {side: _describe(getattr(heads, side)) for side in SIDES}
    value = {**sides, "scale": heads.scale, "normalised": True, **more}
    (out / "heads.json").write_text(
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False),
        encoding="utf-8",
    )
    return "heads.json"


def _describe(side: TrainedSide) -> dict[str, Json]:
    widths = {"in_dim": side.head.in_dim, "out_dim": side.head.out_dim}
    encoder = {"encoder": dict(side.encoder), "fingerprint": side.fingerprint.digest}
    return {
        "head": side.head.spec.model_dump(mode="json"),
        "input": side.head.spec.cut,
        **widths,
        **encoder,
    }
