"""Load a finished run of either trainer, for evaluation, index and report."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.device import resolve_device
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import RunError, require_local
from apecache.fingerprint import Fingerprint, Modality
from apecache.heads.normalization import normalize
from apecache.runs import encoders as trained_encoders
from apecache.runs import heads as checkpoint
from apecache.runs.encoders import TrainedEncoders, TrainedTower, load_encoders
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads
from apecache.store.import_identity import NORMALIZED

Run = TrainedHeads | TrainedEncoders
RunSide = TrainedSide | TrainedTower
Embed = Callable[[Sequence[Any]], Tensor]
"""Embed RGB images or texts as float32 [n, dim], L2-normalized."""
BATCH = 64


def load_run(
    folder: AnyPath,
    device: str = "cpu",
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
) -> Run:
    """Read a run or index folder.

    Args:
        folder: Folder of the run.
        device: Device of the heads and encoders.
        image: Image encoder at its new place, if it has moved. Opened only if its tower trained.
        text: Text encoder, as `image`.

    Raises:
        RunError, EncoderError, MismatchError: As `load_heads` and `load_encoders` do.
    """
    folder = as_path(folder, "folder")
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    if is_encoder_run(folder):
        return load_encoders(folder, device=device, image=image, text=text)
    return load_heads(folder, resolve_device(device))


def recorded_encoder(folder: Path, side: Modality) -> EncoderSpec:
    """Read the spec of the encoder that a run names. The encoder is not opened.

    Raises:
        RunError: There is not a finished run.
    """
    if not is_encoder_run(folder):
        head_side: TrainedSide = getattr(load_heads(folder), side)
        return spec_from_json(head_side.encoder)
    description = trained_encoders.read_description(folder)
    return spec_from_json(description[side]["encoder"])


def recorded_fingerprint(folder: Path, side: Modality) -> Fingerprint:
    """Read the fingerprint of an encoder before training. The encoder is not opened.

    Raises:
        RunError: There is not a finished run.
    """
    if not is_encoder_run(folder):
        head_side: TrainedSide = getattr(load_heads(folder), side)
        return head_side.fingerprint
    description = trained_encoders.read_description(folder)
    return Fingerprint(fields=description[side]["fingerprint"])


def recorded_training(folder: Path) -> Mapping[str, Any]:
    """Read what a run records of its training: recipe, seed, splits, data, dev recalls, counts.

    A combination records none of these at the top level. Encoders are not opened.

    Raises:
        RunError: There is not a finished run.
    """
    if is_encoder_run(folder):
        return trained_encoders.read_description(folder)
    return load_heads(folder).training


def is_encoder_run(folder: Path) -> bool:
    """Check whether a folder holds a finished run of fit-encoder. Raises RunError for a URL."""
    require_local(folder, "run folder")
    return (folder / trained_encoders.DESCRIPTION).is_file()


def require_head_run(folder: Path, what: str) -> None:
    """Refuse a run of fit-encoder.

    Args:
        folder: Folder of the run.
        what: The option or command that takes heads only, for the message.

    Raises:
        RunError: The towers of the run trained.
    """
    if is_encoder_run(folder):
        raise RunError(f"{folder} is a run of fit-encoder; {what} takes runs of fit-head only")


def copy_run(folder: Path, out: Path) -> None:
    """Copy the weights and the description of a finished run into another folder."""
    # The description comes last: its presence makes the copy a finished run.
    module = trained_encoders if is_encoder_run(folder) else checkpoint
    for name in (module.WEIGHTS, module.DESCRIPTION):
        shutil.copyfile(folder / name, out / name)


def image_embedder(side: RunSide, device: str = "auto", moved: EncoderSpec | None = None) -> Embed:
    """Open the encoder of an image side.

    Args:
        side: Image side of a run.
        device: Device of the encoder; a trained tower has its own.
        moved: The encoder at its new place, if it has moved.

    Returns:
        A function from RGB images to their embeddings.

    Raises:
        MismatchError: The encoder is not the one that the run was trained on.
    """
    if isinstance(side, TrainedTower):
        return side.embed
    encoder = load_image_encoder(moved or spec_from_json(side.encoder), device)
    prepare = _prepared_by(side, encoder.fingerprint, f"image encoder {encoder.spec}")

    def embed(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([encoder.preprocess(image) for image in images])
        features = encoder.encode(pixels)
        return side.embed(prepare(features))

    return embed


def text_embedder(side: RunSide, device: str = "auto", moved: EncoderSpec | None = None) -> Embed:
    """Open the encoder of a text side, as `image_embedder` does."""
    if isinstance(side, TrainedTower):
        return side.embed
    encoder = load_text_encoder(moved or spec_from_json(side.encoder), device)
    prepare = _prepared_by(side, encoder.fingerprint, f"text encoder {encoder.spec}")

    def embed(texts: Sequence[str]) -> Tensor:
        embedded_batches = [embed_batch(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        if not embedded_batches:
            return torch.empty(0, side.dim)
        return torch.cat(embedded_batches)

    def embed_batch(texts: Sequence[str]) -> Tensor:
        ids = encoder.tokenize(texts).ids
        features = prepare(encoder.encode_ids(ids))
        # Features of tokens are padded to the longest text: the head needs to know where each ends.
        lengths = torch.tensor([len(row) for row in ids]) if features.ndim == 3 else None
        return side.embed(features, lengths)

    return embed


def _prepared_by(
    side: TrainedSide,
    found_fingerprint: Fingerprint,
    encoder_origin: str,
) -> Callable[[Tensor], Tensor]:
    """Return what is done with live features before the head: nothing, or normalization.

    Imported features may have been normalized by the tool that wrote them; the head learned from
    such ones.

    Raises:
        MismatchError: The encoder is not the one that the head was trained on.
    """
    if NORMALIZED not in side.fingerprint.fields:
        side.require_encoder(found_fingerprint, encoder_origin)
        return lambda features: features
    normalized_fields = {**found_fingerprint.fields, NORMALIZED: True}
    side.require_encoder(Fingerprint(fields=normalized_fields), encoder_origin)
    return normalize
