"""Save and load a finished run of the encoder trainer, ready to embed images and texts."""

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
from apecache.device import kept_generators, resolve_device
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import MismatchError, RunError, raise_if_refused
from apecache.fingerprint import Fingerprint, Json, describe_difference, digest_tensors
from apecache.models.dual_encoder import EncoderModel, Side, Teacher, build_model
from apecache.models.shared_encoder import SharedSide
from apecache.recipes.former_keys import with_former_keys, with_new_keys
from apecache.recipes.recipe import parse_recipe
from apecache.runs.heads import TrainedSide
from apecache.storage.replace import HEADER_KEY, replace_tensors, replace_text

WEIGHTS = "encoder.safetensors"
DESCRIPTION = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class TrainedTower:
    """Embed images or texts of one modality whose tower trained.

    The counterpart of `TrainedSide`, which starts from features.
    """

    side: Side | SharedSide
    """Trained tower with its head."""
    loaded: ImageEncoder | TextEncoder
    """Encoder that preprocesses or tokenizes the inputs."""
    encoder: Mapping[str, Json]
    """Spec of the encoder before training, as JSON."""
    fingerprint: Fingerprint
    """Fingerprint of the encoder before training."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.side.dim

    def require_encoder(self, found: Fingerprint, where: str) -> None:
        """Check that `found` is the encoder that training began with.

        Args:
            found: Fingerprint to check.
            where: What the fingerprint belongs to, for the message.

        Raises:
            MismatchError: The fingerprints differ.
        """
        differences = found.difference(self.fingerprint)
        if differences:
            raise MismatchError(
                (
                    f"{where} is not of the encoder that was trained: "
                    f"{describe_difference(differences)}"
                ),
                differences,
            )

    @torch.no_grad()
    def embed(self, inputs: Sequence[Picture] | Sequence[str], batch: int = 64) -> Tensor:
        """Embed pictures or texts in batches, in their order.

        Args:
            inputs: Pictures, in any form that `open_picture` takes, or texts.
            batch: Number of inputs in a batch.

        Returns:
            float32 [n, dim], L2-normalized, on the encoder's device.
        """
        embedded_batches = [
            self._embed(inputs[i : i + batch]) for i in range(0, len(inputs), batch)
        ]
        if not embedded_batches:
            return torch.empty(0, self.side.dim, device=self.loaded.device)
        return torch.cat(embedded_batches)

    def _embed(self, inputs: Sequence[Any]) -> Tensor:
        if isinstance(self.loaded, TextEncoder):
            token_ids = self.loaded.tokenize(inputs).ids
            padded = self.loaded.pad(token_ids)
            return self.side(*padded).float()  # type: ignore[no-any-return]
        images = [open_readable(image, f"inputs[{number}]") for number, image in enumerate(inputs)]
        pixels = torch.stack([self.loaded.preprocess(image) for image in images])
        return self.side(pixels.to(self.loaded.device)).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TrainedEncoders:
    """Hold both sides of a finished run and what is recorded of its training."""

    model: EncoderModel
    """Model with the trained weights, in evaluation mode."""
    image: TrainedSide | TrainedTower
    """Image side. A `TrainedSide`, which takes features, where the tower was frozen."""
    text: TrainedSide | TrainedTower
    """Text side, as `image`."""
    scale: float
    """Scale of the logits: 1 / temperature."""
    training: Mapping[str, Json]
    """Description that the run wrote of itself."""
    digest: str
    """Identity of the encoders, the recipe and the trained weights."""
    bias: float | None = None
    """Added to the logits by the sigmoid loss; None: no bias."""


def load_encoders(
    run: AnyPath,
    device: str = "auto",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> TrainedEncoders:
    """Load what a run trained into the encoders that it names.

    Args:
        run: Folder of the run.
        device: Device of the model.
        image: Image encoder at its new place, if it has moved.
        text: Text encoder at its new place, if it has moved.

    Raises:
        RunError: `run` is not a finished run of the encoder trainer, or it is damaged.
        EncoderError: An encoder cannot be loaded.
        MismatchError: An encoder is no longer the one that was trained.
    """
    run = as_path(run, "run")
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    description = read_description(run)
    torch_device = resolve_device(device)
    recipe = parse_recipe(description["recipe"], str(run / DESCRIPTION))
    live_encoders: list[ImageEncoder | TextEncoder | None] = []
    for side, moved in (("image", image), ("text", text)):
        if description[side]["cached"]:
            live_encoders.append(None)
        else:
            encoder = _load(description[side], moved=moved, run=run, device=str(torch_device))
            live_encoders.append(encoder)
    dims = [description["image"]["dim"], description["text"]["dim"]]
    # Building draws initial weights, which are replaced below: keep the caller's random state.
    with kept_generators():
        teacher = Teacher(dim=description["teacher"]["dim"]) if recipe.distillation else None
        model = build_model(
            recipe,
            encoders=live_encoders,
            dims=dims,
            device=torch_device,
            teacher=teacher,
        )
    tensors, _ = read_tensors(run / WEIGHTS)
    model.load_kept(tensors)
    model.eval().requires_grad_(False)
    image_side = _side(model.image, live_encoders[0], description["image"])
    text_side = _side(model.text, live_encoders[1], description["text"])
    return TrainedEncoders(
        model,
        image=image_side,
        text=text_side,
        scale=model.temperature.scale().item(),
        training=description,
        digest=_digest(description, tensors),
        bias=model.temperature.bias_value(),
    )


def save_encoders(
    run: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Json],
) -> None:
    """Write the weights, then the description, whose presence makes the folder a finished run.

    Args:
        run: Folder of the run.
        tensors: Weights that training can change. Frozen weights come from the encoder that the
            description names.
        description: What the run says of itself.
    """
    # `read_tensors` refuses a file without this header.
    replace_tensors(run / WEIGHTS, tensors, {HEADER_KEY: "{}"})
    replace_text(run / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False))


def read_description(run: Path) -> dict[str, Any]:
    """Read what the run says of itself. Raises RunError as `load_encoders` does."""
    try:
        text = (run / DESCRIPTION).read_text(encoding="utf-8")
        value = with_new_keys(json.loads(text))
        if not {"recipe", "image", "text"} <= value.keys():
            raise ValueError("parts are missing")
    except FileNotFoundError:
        raise RunError(
            f"{run} is not a finished run of fit-encoder: it has no {DESCRIPTION}"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise_if_refused(run / DESCRIPTION)
        raise RunError(f"{run / DESCRIPTION} is damaged ({error}); train again") from None
    return value  # type: ignore[no-any-return]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header that the encoder trainer wrote.

    Raises:
        RunError: The file is missing, damaged, or written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise_if_refused(path)
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); train again"
        ) from None


def _side(
    module: Side | SharedSide,
    encoder: ImageEncoder | TextEncoder | None,
    description: dict[str, Any],
) -> TrainedSide | TrainedTower:
    """Return one side of a loaded run, for features if its tower was frozen."""
    fingerprint = Fingerprint(fields=description["fingerprint"])
    if encoder is None and isinstance(module, Side):
        return TrainedSide(
            head=module.head,
            encoder=description["encoder"],
            fingerprint=fingerprint,
        )
    assert encoder is not None
    return TrainedTower(
        side=module,
        loaded=encoder,
        encoder=description["encoder"],
        fingerprint=fingerprint,
    )


def _digest(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Identify what the run computes: encoders before training, recipe and trained weights."""
    # Generators: one contiguous copy at a time is in memory.
    contiguous = ((name, tensor.contiguous()) for name, tensor in sorted(tensors.items()))
    weights = digest_tensors(
        (name, str(tensor.dtype), tuple(tensor.shape), tensor.numpy().data)
        for name, tensor in contiguous
    )
    identity = {
        "sides": {
            "image": description["image"]["fingerprint"],
            "text": description["text"]["fingerprint"],
        },
        "recipe": with_former_keys(description["recipe"]),
        "weights": weights,
    }
    return Fingerprint(fields=identity).digest


def _load(
    side: dict[str, Any],
    moved: EncoderSpec | None,
    run: Path,
    device: str,
) -> ImageEncoder | TextEncoder:
    """Load the encoder of a side. Raises MismatchError if it is not the one that was trained."""
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
