"""A trained pair of heads on disk: `head.safetensors` and `head.json`. No pickle.

`head.json` says which heads, for which encoders (spec and fingerprint), trained how; the tensors
must be exactly those that the heads have.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import MismatchError, RunError, nearest
from apecache.fingerprint import (
    Fingerprint,
    Json,
    canonical_json,
    describe_difference,
    digest_tensors,
)
from apecache.heads.build import build_heads
from apecache.heads.head import Head, HeadSpec, embed
from apecache.storage.atomic import replace_tensors, replace_text

FORMAT_VERSION = 1
WEIGHTS = "head.safetensors"
DESCRIPTION = "head.json"


@dataclass(frozen=True, kw_only=True)
class TrainedSide:
    """One modality: its head, and the encoder that it belongs to (`encoder` is the spec as
    JSON)."""

    head: Head
    encoder: Mapping[str, Json]
    fingerprint: Fingerprint

    @property
    def dim(self) -> int:
        return self.head.out_dim

    def require_encoder(self, found: Fingerprint, where: str) -> None:
        """Raises MismatchError unless `found` is the encoder that the head was trained on."""
        if found.digest != self.fingerprint.digest:
            differences = found.difference(self.fingerprint)
            raise MismatchError(
                (
                    f"{where} is not of the encoder that the head was trained on: "
                    f"{describe_difference(differences)}"
                ),
                differences,
            )

    def embed(self, features: Tensor, lengths: Tensor | None = None, batch: int = 8192) -> Tensor:
        """Features of n rows -> float32 [n, out_dim], L2-normalised; see
        `apecache.heads.head.embed`."""
        return embed(self.head, features, lengths, batch)


@dataclass(frozen=True)
class TrainedHeads:
    """Both sides, the scale of the logits (1 / temperature), and what is known about the
    training."""

    image: TrainedSide
    text: TrainedSide
    scale: float
    training: Mapping[str, Json] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of what the heads compute: names the head that an index was made with."""
        fields = {side: _describe(getattr(self, side)) for side in ("image", "text")}
        tensors = (
            (name, tensor.detach().cpu().contiguous()) for name, tensor in _tensors(self).items()
        )
        weights = digest_tensors(
            (n, str(t.dtype), tuple(t.shape), t.numpy().data) for n, t in tensors
        )
        return Fingerprint(fields={"sides": fields, "weights": weights, "scale": self.scale}).digest


def save_heads(heads: TrainedHeads, folder: AnyPath) -> None:
    """Write weights first, then the description, whose presence makes the folder a finished run."""
    require_type(heads, TrainedHeads, "heads")
    folder = as_path(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_tensors(folder / WEIGHTS, _tensors(heads))
    value = {
        "format": FORMAT_VERSION,
        "image": _describe(heads.image),
        "text": _describe(heads.text),
        "scale": heads.scale,
        "training": heads.training,
    }
    replace_text(
        folder / DESCRIPTION,
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False),
    )


def load_heads(folder: AnyPath, device: torch.device | str = "cpu") -> TrainedHeads:
    """Read a run or index folder's heads.

    Raises:
        RunError: no finished run there, a newer format, or files that do not fit each other.
    """
    folder = as_path(folder, "folder")
    path = folder / DESCRIPTION
    if not path.is_file():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = "" if folder.exists() else nearest(folder.name, siblings)
        raise RunError(
            f"{folder} is no finished run: it has no {DESCRIPTION}{hint} (make one with: "
            "apecache fit-head)"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        canonical_json(value)  # refuses NaN and infinities, which Python's JSON lets in
        if value["format"] > FORMAT_VERSION:
            raise RunError(
                f"{path} has format {value['format']}; this apecache reads up to "
                f"{FORMAT_VERSION}: upgrade"
            )
        sides = {side: HeadSpec.model_validate(value[side]["head"]) for side in ("image", "text")}
        if not all(type(value[side]["dim"]) is int and value[side]["dim"] > 0 for side in sides):
            raise ValueError("dim is no width")
        with torch.device("meta"):  # nothing is allocated for widths that the file only claims
            image, text = build_heads(
                sides["image"],
                text=sides["text"],
                image_dim=value["image"]["dim"],
                text_dim=value["text"]["dim"],
            )
        heads = TrainedHeads(
            _side(image, value["image"]),
            text=_side(text, value["text"]),
            scale=float(value["scale"]),
            training=value["training"],
        )
    except (KeyError, TypeError, ValueError, ValidationError, RuntimeError, OverflowError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is damaged: {str(error).splitlines()[0]}; train again") from None
    _load_weights(heads, folder / WEIGHTS)
    for side in (heads.image, heads.text):
        side.head.to(device).eval().requires_grad_(False)
    return heads


def _side(head: Head, value: Mapping[str, Json]) -> TrainedSide:
    return TrainedSide(
        head=head,
        encoder=dict(value["encoder"]),
        fingerprint=Fingerprint(fields=dict(value["fingerprint"])),
    )


def _describe(side: TrainedSide) -> dict[str, Json]:
    return {
        "head": side.head.spec.model_dump(),
        "dim": side.head.in_dim,
        "encoder": dict(side.encoder),
        "fingerprint": dict(side.fingerprint.fields),
    }


def _tensors(heads: TrainedHeads) -> dict[str, Tensor]:
    sides = (("image", heads.image.head), ("text", heads.text.head))
    return {
        f"{side}.{name}": tensor
        for side, head in sides
        for name, tensor in head.state_dict().items()
    }


def _load_weights(heads: TrainedHeads, path: Path) -> None:
    """Raises RunError unless the file holds exactly the heads' tensors, all finite."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}; train again") from None
    wanted = _tensors(heads)
    wrong = sorted(
        name
        for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or _kind(wanted[name]) != _kind(tensors[name])
    )
    wrong = wrong or [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise RunError(
            f"{path} does not hold the heads of {DESCRIPTION}: {', '.join(wrong[:3])}; train again"
        )
    for side, head in (("image", heads.image.head), ("text", heads.text.head)):
        head.load_state_dict(
            {name: tensors[f"{side}.{name}"] for name in head.state_dict()},
            assign=True,
        )


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
