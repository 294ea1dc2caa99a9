"""A finished run of the encoder trainer, ready to embed images and texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.data.images import Picture, open_readable
from apecache.encoders.encoder import ImageEncoder, TextEncoder, parse_device
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import MismatchError, RunError
from apecache.fingerprint import Fingerprint, Json, describe_difference, digest_tensors
from apecache.models.dual_encoder import EncoderModel, Side, Teacher, build_model
from apecache.models.shared_encoder import SharedSide
from apecache.recipes.recipe import parse_recipe
from apecache.runs.heads import TrainedSide
from apecache.storage.atomic import replace_tensors, replace_text

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class TrainedTower:
    """One modality whose tower trained: the counterpart of `TrainedSide`, from images or texts
    instead of features.

    `encoder`, `fingerprint`: of the encoder as it was before training.
    """

    side: Side | SharedSide
    loaded: ImageEncoder | TextEncoder
    encoder: Mapping[str, Json]
    fingerprint: Fingerprint

    @property
    def dim(self) -> int:
        return self.side.dim

    def require_encoder(self, found: Fingerprint, where: str) -> None:
        """Raises MismatchError unless `found` is the encoder that training began with."""
        differences = found.difference(self.fingerprint)
        if differences:
            raise MismatchError(
                (
                    f"{where} is not of the encoder that was trained: "
                    f"{describe_difference(differences)}"
                ),
                differences,
            )

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Picture] | Sequence[str], batch: int = 64) -> Tensor:
        """Pictures, in any form that `open_picture` takes, or texts -> float32 [n, dim],
        L2-normalised, on the encoder's device."""
        parts = [self._embed(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
        return (
            torch.cat(parts) if parts else torch.empty(0, self.side.dim, device=self.loaded.device)
        )

    def _embed(self, inputs: Sequence[Any]) -> Tensor:
        if isinstance(self.loaded, TextEncoder):
            return self.side(*self.loaded.pad(self.loaded.tokenise(inputs).ids)).float()  # type: ignore[no-any-return]
        images = [open_readable(image, f"inputs[{number}]") for number, image in enumerate(inputs)]
        pixels = torch.stack([self.loaded.preprocess(image) for image in images])
        return self.side(pixels.to(self.loaded.device)).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TrainedEncoders:
    """Both sides (a `TrainedSide` where the tower was frozen, so that features serve it), the scale
    of the logits (1 / temperature), what is known about the training, and the identity of all
    that."""

    model: EncoderModel
    image: TrainedSide | TrainedTower
    text: TrainedSide | TrainedTower
    scale: float
    training: Mapping[str, Json]
    digest: str


def load_encoders(
    run: AnyPath,
    device: str = "auto",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> TrainedEncoders:
    """What a run trained, in the encoders that it names; `image`, `text`: these, where they have
    moved.

    Raises:
        RunError: not a finished run of the encoder trainer, or a damaged one. EncoderError: an
            encoder cannot be had.
        MismatchError: an encoder is no longer the one that was trained.
    """
    run = as_path(run, "run")
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    value = read_description(run)
    where = parse_device(device)
    recipe = parse_recipe(value["recipe"], str(run / DESCRIPTION))
    live = [
        None
        if value[side]["cached"]
        else _load(value[side], moved=moved, run=run, device=str(where))
        for side, moved in (("image", image), ("text", text))
    ]
    dims = [value[side]["dim"] for side in ("image", "text")]
    with torch.random.fork_rng(devices=[]):
        teacher = Teacher(dim=value["teacher"]["dim"]) if recipe.distillation else None
        model = build_model(recipe, encoders=live, dims=dims, device=where, teacher=teacher)
    tensors, _ = read_tensors(run / WEIGHTS)
    model.load_kept(tensors)
    model.eval().requires_grad_(False)
    parts = ((model.image, live[0], value["image"]), (model.text, live[1], value["text"]))
    first, second = (_side(module, encoder, about) for module, encoder, about in parts)
    return TrainedEncoders(
        model,
        image=first,
        text=second,
        scale=model.temperature.scale().item(),
        training=value,
        digest=_digest(value, tensors),
    )


def save_encoders(
    run: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Json],
) -> None:
    """Write the weights, then the description, whose presence makes the folder a finished run.

    `tensors`: what training can change; frozen parameters are those of the encoder that the
    description names.
    """
    replace_tensors(run / WEIGHTS, tensors, {"apecache": "{}"})
    replace_text(run / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False))


def read_description(run: Path) -> dict[str, Any]:
    """What the run says of itself. Raises RunError as `load_encoders` does."""
    try:
        value = json.loads((run / DESCRIPTION).read_text(encoding="utf-8"))
        if not {"recipe", "image", "text"} <= value.keys():
            raise ValueError("parts are missing")
    except FileNotFoundError:
        raise RunError(
            f"{run} is no finished run of fit-encoder: it has no {DESCRIPTION}"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{run / DESCRIPTION} is damaged ({error}); train again") from None
    return value  # type: ignore[no-any-return]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the header that the encoder trainer wrote. Raises RunError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["apecache"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); train again"
        ) from None


def _side(
    module: Side | SharedSide,
    encoder: ImageEncoder | TextEncoder | None,
    about: dict[str, Any],
) -> TrainedSide | TrainedTower:
    fingerprint = Fingerprint(fields=about["fingerprint"])
    if encoder is None and isinstance(module, Side):
        return TrainedSide(head=module.head, encoder=about["encoder"], fingerprint=fingerprint)
    assert encoder is not None
    return TrainedTower(
        side=module,
        loaded=encoder,
        encoder=about["encoder"],
        fingerprint=fingerprint,
    )


def _digest(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    arrays = ((name, t.contiguous()) for name, t in sorted(tensors.items()))
    weights = digest_tensors(
        (name, str(t.dtype), tuple(t.shape), t.numpy().data) for name, t in arrays
    )
    fields = {side: value[side]["fingerprint"] for side in ("image", "text")}
    return Fingerprint(
        fields={"sides": fields, "recipe": value["recipe"], "weights": weights}
    ).digest


def _load(
    side: dict[str, Any],
    moved: EncoderSpec | None,
    run: Path,
    device: str,
) -> ImageEncoder | TextEncoder:
    spec = moved or spec_from_json(side["encoder"])
    encoder = (
        load_image_encoder(spec, device)
        if spec.modality == "image"
        else load_text_encoder(spec, device)
    )
    differences = encoder.fingerprint.difference(Fingerprint(fields=side["fingerprint"]))
    if differences:
        raise MismatchError(
            f"{spec} is not what {run} was trained with: {describe_difference(differences)}",
            differences,
        )
    return encoder
