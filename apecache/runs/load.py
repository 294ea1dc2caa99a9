"""A finished run of either trainer: what evaluation, index and report take, without asking which it
is."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.encoders.encoder import parse_device
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import RunError, require_local
from apecache.fingerprint import Fingerprint, Modality
from apecache.runs import encoders as trained_encoders
from apecache.runs import heads as checkpoint
from apecache.runs.encoders import TrainedEncoders, TrainedTower, load_encoders
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads

Run = TrainedHeads | TrainedEncoders
RunSide = TrainedSide | TrainedTower
Embed = Callable[[Sequence[Any]], Tensor]
"""RGB images, or texts -> float32 [n, dim], L2-normalised."""
BATCH = 64


def load_run(
    folder: AnyPath,
    device: str = "cpu",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> Run:
    """Read a run or index folder. `image`, `text`: encoders that have moved; opened only where
    their towers trained.

    Raises:
        RunError, EncoderError, MismatchError: as `load_heads` and `load_encoders` do.
    """
    folder = as_path(folder, "folder")
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    if is_encoder_run(folder):
        return load_encoders(folder, device=device, image=image, text=text)
    return load_heads(folder, parse_device(device))


def recorded_encoder(folder: Path, side: Modality) -> EncoderSpec:
    """The encoder that a run names, which is not opened. Raises RunError if there is no run."""
    if not is_encoder_run(folder):
        return spec_from_json(getattr(load_heads(folder), side).encoder)
    return spec_from_json(trained_encoders.read_description(folder)[side]["encoder"])


def recorded_fingerprint(folder: Path, side: Modality) -> Fingerprint:
    """Read the fingerprint of an encoder as it was before training; the encoder is not opened.

    Raises:
        RunError: there is no finished run.
    """
    if not is_encoder_run(folder):
        fingerprint: Fingerprint = getattr(load_heads(folder), side).fingerprint
        return fingerprint
    return Fingerprint(fields=trained_encoders.read_description(folder)[side]["fingerprint"])


def recorded_training(folder: Path) -> Mapping[str, Any]:
    """What a run says of its own training: recipe, seed, splits, data, dev, counts; a combination
    says nothing. Encoders are not opened. Raises RunError if there is no finished run."""
    if is_encoder_run(folder):
        return trained_encoders.read_description(folder)
    return load_heads(folder).training


def is_encoder_run(folder: Path) -> bool:
    """Whether towers trained: a finished run of fit-encoder. Raises RunError for a URL."""
    require_local(folder, "run folder")
    return (folder / trained_encoders.DESCRIPTION).is_file()


def require_head_run(folder: Path, what: str) -> None:
    """Raises RunError for a run whose towers trained; `what` cannot serve one."""
    if is_encoder_run(folder):
        raise RunError(f"{folder} is a run of fit-encoder; {what} takes runs of fit-head only")


def copy_run(folder: Path, out: Path) -> None:
    """Weights and description of a finished run into another folder, in that order."""
    module = trained_encoders if is_encoder_run(folder) else checkpoint
    for name in (module.WEIGHTS, module.DESCRIPTION):
        shutil.copyfile(folder / name, out / name)


def image_embedder(side: RunSide, device: str = "auto", moved: EncoderSpec | None = None) -> Embed:
    """Opens the side's encoder, or `moved`. Raises MismatchError if it is not the one that the run
    was trained on."""
    if isinstance(side, TrainedTower):
        return side.embed
    encoder = load_image_encoder(moved or spec_from_json(side.encoder), device)
    side.require_encoder(encoder.fingerprint, f"image encoder {encoder.spec}")

    def embed(images: Sequence[Image.Image]) -> Tensor:
        return side.embed(
            encoder.encode(torch.stack([encoder.preprocess(image) for image in images]))
        )

    return embed


def text_embedder(side: RunSide, device: str = "auto", moved: EncoderSpec | None = None) -> Embed:
    """As `image_embedder`."""
    if isinstance(side, TrainedTower):
        return side.embed
    encoder = load_text_encoder(moved or spec_from_json(side.encoder), device)
    side.require_encoder(encoder.fingerprint, f"text encoder {encoder.spec}")

    def embed(texts: Sequence[str]) -> Tensor:
        parts = [embed_batch(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return torch.cat(parts) if parts else torch.empty(0, side.dim)

    def embed_batch(texts: Sequence[str]) -> Tensor:
        ids = encoder.tokenise(texts).ids
        features = encoder.encode_ids(ids)
        lengths = torch.tensor([len(row) for row in ids]) if features.ndim == 3 else None
        return side.embed(features, lengths)

    return embed
