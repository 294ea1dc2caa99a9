"""A finished run of the encoder trainer, ready to embed images and texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apecache.encoders.encoder import ImageEncoder, TextEncoder, parse_device
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import spec_from_json
from apecache.errors import MismatchError, RunError
from apecache.fingerprint import Fingerprint, describe_difference
from apecache.recipes.recipe import parse_recipe
from apecache.train.encoder_model import EncoderModel, build_model
from apecache.train.encoder_run import DESCRIPTION, WEIGHTS, read_tensors


@dataclass(frozen=True)
class TrainedEncoders:
    """Embeddings are float32 [n, dim], L2-normalised, on the encoders' device."""

    model: EncoderModel
    image: ImageEncoder
    text: TextEncoder

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images, all at once."""
        pixels = torch.stack([self.image.preprocess(image) for image in images])
        pooled = self.image.encode(pixels) if self.model.image.tower is None else pixels
        return self.model.image(pooled.to(self.image.device)).float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """All at once."""
        ids = self.text.tokenise(texts).ids
        if self.model.text.tower is None:
            return self.model.text(self.text.encode_ids(ids).to(self.text.device)).float()  # type: ignore[no-any-return]
        batch, mask = self.text.pad(ids)
        return self.model.text(batch, mask).float()  # type: ignore[no-any-return]


def load_encoders(run: Path, device: str = "auto") -> TrainedEncoders:
    """The encoders that the run names, with what it trained in them.

    Raises:
        RunError: not a finished run of the encoder trainer, or a damaged one. EncoderError: an encoder cannot be had.
        MismatchError: an encoder is no longer the one that was trained.
    """
    value = _read(run)
    where = parse_device(device)
    recipe = parse_recipe(value["recipe"], str(run / DESCRIPTION))
    encoders: list[Any] = [_load(value[side], side, run, str(where)) for side in ("image", "text")]
    live = [
        None if value[side]["cached"] else encoder for side, encoder in zip(("image", "text"), encoders, strict=True)
    ]
    dims = [value[side]["dim"] for side in ("image", "text")]
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe, live, dims, where)
    tensors, _ = read_tensors(run / WEIGHTS)
    model.load_kept(tensors)
    model.eval().requires_grad_(False)
    return TrainedEncoders(model, encoders[0], encoders[1])


def _read(run: Path) -> dict[str, Any]:
    try:
        value = json.loads((run / DESCRIPTION).read_text(encoding="utf-8"))
        if not {"recipe", "image", "text"} <= value.keys():
            raise ValueError("parts are missing")
    except FileNotFoundError:
        raise RunError(f"{run} is no finished run of fit-encoder: it has no {DESCRIPTION}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{run / DESCRIPTION} is damaged ({error}); train again") from None
    return value  # type: ignore[no-any-return]


def _load(side: dict[str, Any], name: str, run: Path, device: str) -> ImageEncoder | TextEncoder:
    spec = spec_from_json(side["encoder"])
    encoder = load_image_encoder(spec, device) if name == "image" else load_text_encoder(spec, device)
    differences = encoder.fingerprint.difference(Fingerprint(side["fingerprint"]))
    if differences:
        raise MismatchError(
            f"{spec} is not what {run} was trained with: {describe_difference(differences)}", differences
        )
    return encoder
