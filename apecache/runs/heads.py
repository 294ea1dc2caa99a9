"""Save and load a trained pair of heads: `head.safetensors` and `head.json`, without pickle.

`head.json` names the heads, their encoders (spec and fingerprint) and the training. The tensors
must be exactly those of the heads.
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
from apecache.errors import MismatchError, RecipeError, RunError, nearest_sibling, raise_if_refused
from apecache.fingerprint import (
    Fingerprint,
    Json,
    canonical_json,
    describe_difference,
    digest_tensors,
)
from apecache.heads.build import build_heads
from apecache.heads.head import Head, HeadSpec, embed
from apecache.recipes.former_keys import with_former_keys, with_new_keys
from apecache.storage.replace import replace_tensors, replace_text

FORMAT_VERSION = 1
WEIGHTS = "head.safetensors"
DESCRIPTION = "head.json"


@dataclass(frozen=True, kw_only=True)
class TrainedSide:
    """Hold the head of one modality and name the encoder that it belongs to."""

    head: Head
    """Trained head, which takes features of the encoder."""
    encoder: Mapping[str, Json]
    """Spec of the encoder, as JSON."""
    fingerprint: Fingerprint
    """Fingerprint of the encoder."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.head.out_dim

    def require_encoder(self, found: Fingerprint, where: str) -> None:
        """Check that `found` is the encoder that the head was trained on.

        Args:
            found: Fingerprint to check.
            where: What the fingerprint belongs to, for the message.

        Raises:
            MismatchError: The fingerprints differ.
        """
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
        """Embed features of n rows as float32 [n, out_dim], L2-normalized.

        See `apecache.heads.head.embed`.
        """
        return embed(self.head, features, lengths, batch)


@dataclass(frozen=True)
class TrainedHeads:
    """Hold the heads of both sides and what is recorded of their training."""

    image: TrainedSide
    text: TrainedSide
    scale: float
    """Scale of the logits: 1 / temperature."""
    training: Mapping[str, Json] = field(default_factory=dict)
    """Recipe, seed, splits, data and dev recalls of the training."""
    bias: float | None = None
    """Added to the logits by the sigmoid loss; None: no bias."""

    @property
    def digest(self) -> str:
        """Identify what the heads compute. An index records the digest of its heads."""
        descriptions = {side: _describe(getattr(self, side)) for side in ("image", "text")}
        # Generators: one copy on the CPU at a time is in memory.
        on_cpu = (
            (name, tensor.detach().cpu().contiguous()) for name, tensor in _tensors(self).items()
        )
        weights = digest_tensors(
            (name, str(tensor.dtype), tuple(tensor.shape), tensor.numpy().data)
            for name, tensor in on_cpu
        )
        identity = {"sides": descriptions, "weights": weights, "scale": self.scale}
        identity |= _bias_entry(self)
        return Fingerprint(fields=with_former_keys(identity)).digest


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
        **_bias_entry(heads),
        "training": heads.training,
    }
    replace_text(
        folder / DESCRIPTION,
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False),
    )


def load_heads(folder: AnyPath, device: torch.device | str = "cpu") -> TrainedHeads:
    """Read the heads of a run or index folder.

    Raises:
        RunError: The folder holds no finished run, a newer format, or files that do not fit each
            other.
    """
    folder = as_path(folder, "folder")
    path = folder / DESCRIPTION
    if not path.is_file():
        raise_if_refused(path)
        raise RunError(
            f"{folder} is not a finished run: it has no {DESCRIPTION}{nearest_sibling(folder)} "
            "(make one with: apecache fit-head)"
        )
    try:
        value = with_new_keys(json.loads(path.read_text(encoding="utf-8")))
        canonical_json(value)  # refuses NaN and infinities, which Python's JSON lets in
        if value["format"] > FORMAT_VERSION:
            raise RunError(
                f"{path} has format {value['format']}; this apecache reads up to "
                f"{FORMAT_VERSION}: upgrade"
            )
        sides = {side: HeadSpec.model_validate(value[side]["head"]) for side in ("image", "text")}
        if not all(type(value[side]["dim"]) is int and value[side]["dim"] > 0 for side in sides):
            raise ValueError("dim is not a width")
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
            bias=None if value.get("bias") is None else float(value["bias"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError, RuntimeError, OverflowError) as error:
        # A newer format and a head that is not registered are no damage. They are ValueErrors too.
        if isinstance(error, RunError | RecipeError):
            raise
        raise RunError(f"{path} is damaged: {str(error).splitlines()[0]}; train again") from None
    _load_weights(heads, folder / WEIGHTS)
    for side in (heads.image, heads.text):
        side.head.to(device).eval().requires_grad_(False)
    return heads


def _bias_entry(heads: TrainedHeads) -> dict[str, Json]:
    """Return the bias for the description. Heads without one keep the digest that they had."""
    return {} if heads.bias is None else {"bias": heads.bias}


def _side(head: Head, value: Mapping[str, Json]) -> TrainedSide:
    """Read what `_describe` returned."""
    return TrainedSide(
        head=head,
        encoder=dict(value["encoder"]),
        fingerprint=Fingerprint(fields=dict(value["fingerprint"])),
    )


def _describe(side: TrainedSide) -> dict[str, Json]:
    """Return the description of one side, as JSON."""
    return {
        "head": side.head.spec.model_dump(),
        "dim": side.head.in_dim,
        "encoder": dict(side.encoder),
        "fingerprint": dict(side.fingerprint.fields),
    }


def _tensors(heads: TrainedHeads) -> dict[str, Tensor]:
    """Return the tensors of both heads by `side.name`."""
    tensors: dict[str, Tensor] = {}
    for side, head in (("image", heads.image.head), ("text", heads.text.head)):
        for name, tensor in head.state_dict().items():
            tensors[f"{side}.{name}"] = tensor
    return tensors


def _load_weights(heads: TrainedHeads, path: Path) -> None:
    """Load the weights of the heads.

    Raises:
        RunError: The file does not hold exactly the heads' tensors, all finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise_if_refused(path)
        raise RunError(f"{path} cannot be read: {error}; train again") from None
    expected = _tensors(heads)
    wrong_names: list[str] = []
    for name in sorted(expected.keys() | tensors.keys()):
        in_both = name in expected and name in tensors
        if not in_both or _kind(expected[name]) != _kind(tensors[name]):
            wrong_names.append(name)
    if not wrong_names:
        wrong_names = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong_names:
        raise RunError(
            f"{path} does not hold the heads of {DESCRIPTION}: {', '.join(wrong_names[:3])}; "
            "train again"
        )
    for side, head in (("image", heads.image.head), ("text", heads.text.head)):
        head_tensors = {name: tensors[f"{side}.{name}"] for name in head.state_dict()}
        # The heads were built on the meta device, so there is no memory to copy into.
        head.load_state_dict(head_tensors, assign=True)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return what a stored tensor and a head's tensor must share."""
    return tensor.shape, tensor.dtype
