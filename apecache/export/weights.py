"""Export heads as safetensors with a JSON description, so that other programs can rebuild them."""

import json
from pathlib import Path

from apecache.fingerprint import Json
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.storage.replace import replace_tensors, replace_text

SIDES = ("image", "text")


def export_safetensors(heads: TrainedHeads, out: Path) -> list[str]:
    """Write `image.safetensors`, `text.safetensors` and `heads.json`.

    The tensors have the names of the head's state dict.

    Returns:
        The names of the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for side in SIDES:
        name = f"{side}.safetensors"
        replace_tensors(out / name, getattr(heads, side).head.state_dict())
        files.append(name)
    return [*files, write_description(heads, out)]


def write_description(heads: TrainedHeads, out: Path, **more: Json) -> str:
    """Write `heads.json` and return its name.

    A head's output is L2-normalized. Cosines times `scale` are the logits of the training.

    Args:
        heads: the run.
        out: the folder.
        more: entries to add.
    """
    sides = {side: _describe(getattr(heads, side)) for side in SIDES}
    value = {**sides, "scale": heads.scale, "normalized": True, **more}
    # Strict JSON: other programs refuse NaN.
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(out / "heads.json", text)
    return "heads.json"


def _describe(side: TrainedSide) -> dict[str, Json]:
    return {
        "head": side.head.spec.model_dump(mode="json"),
        "input": side.head.spec.cut,
        "in_dim": side.head.in_dim,
        "out_dim": side.head.out_dim,
        "encoder": dict(side.encoder),
        "fingerprint": side.fingerprint.digest,
    }
