"""Open a run as two modules that embed pixels and token ids, for formats of whole models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.fingerprint import Modality
from apecache.heads.head import Head
from apecache.runs.encoders import TrainedTower
from apecache.runs.load import Run, RunSide, load_run


class ImageModule(nn.Module):
    """Map float32 pixels [n, 3, height, width] to embeddings [n, dim], L2-normalized."""

    def __init__(self, encoder: ImageEncoder, embed: nn.Module, takes_pixels: bool) -> None:
        super().__init__()
        self.encoder = encoder
        # Registered, so that exporters see the weights.
        self.module = encoder.module
        self.embed = embed
        self.takes_pixels = takes_pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed one batch of pixels."""
        inputs = pixels if self.takes_pixels else self.encoder.forward(pixels).float()
        embedded: Tensor = self.embed(inputs)
        return embedded


class TextModule(nn.Module):
    """Map int64 ids and mask, both [n, length], to embeddings [n, dim], L2-normalized."""

    def __init__(
        self,
        encoder: TextEncoder,
        embed: nn.Module,
        takes_ids: bool,
        on_tokens: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.module = encoder.module
        self.embed = embed
        self.takes_ids = takes_ids
        self.on_tokens = on_tokens

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed one batch of token ids."""
        # A tower that trained runs itself, up to its head.
        if self.takes_ids:
            embedded: Tensor = self.embed(ids, mask)
            return embedded
        features = self.encoder.forward(ids, mask).float()
        # Heads on tokens need to know where each text ends.
        if self.on_tokens:
            on_tokens: Tensor = self.embed(features, mask != 0)
            return on_tokens
        pooled: Tensor = self.embed(features)
        return pooled


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Hold a run with both encoders open, on the CPU."""

    run: Run
    image: ImageModule
    text: TextModule

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.run.image.dim

    def head(self, side: Modality) -> Head | None:
        """Return the head on a frozen encoder; None where the tower trained."""
        trained: RunSide = getattr(self.run, side)
        return None if isinstance(trained, TrainedTower) else trained.head

    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed RGB images as float32 [n, dim]."""
        pixels = torch.stack([self.image.encoder.preprocess(image) for image in images])
        with torch.no_grad():
            return self.image(self.image.encoder.move(pixels)).float()  # type: ignore[no-any-return]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as float32 [n, dim]."""
        encoder = self.text.encoder
        ids, mask = encoder.pad(encoder.tokenize(texts).ids)
        with torch.no_grad():
            return self.text(ids, mask).float()  # type: ignore[no-any-return]


def open_whole_model(
    run: Path,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
    device: str = "cpu",
) -> WholeModel:
    """Open a run of either trainer with both of its encoders.

    Args:
        run: folder of the run.
        image: image encoder at its new place, if it has moved.
        text: text encoder at its new place, if it has moved.
        device: of encoders and heads.

    Raises:
        RunError: not a finished run.
        EncoderError: an encoder cannot be loaded.
        MismatchError: it is not the one that the run was trained on.
    """
    # Heads and encoders share one device: exporters trace both in one pass.
    loaded = load_run(run, device=device, image=image, text=text)
    return WholeModel(
        run=loaded,
        image=_image_module(loaded.image, image, device),
        text=_text_module(loaded.text, text, device),
    )


def _image_module(side: RunSide, moved: EncoderSpec | None, device: str) -> ImageModule:
    if isinstance(side, TrainedTower):
        assert isinstance(side.loaded, ImageEncoder)
        return ImageModule(side.loaded, side.side, takes_pixels=True).eval()
    encoder = load_image_encoder(moved or spec_from_json(side.encoder), device)
    side.require_encoder(encoder.fingerprint, f"image encoder {encoder.spec}")
    return ImageModule(encoder, side.head, takes_pixels=False).eval()


def _text_module(side: RunSide, moved: EncoderSpec | None, device: str) -> TextModule:
    if isinstance(side, TrainedTower):
        assert isinstance(side.loaded, TextEncoder)
        return TextModule(side.loaded, side.side, takes_ids=True, on_tokens=False).eval()
    encoder = load_text_encoder(moved or spec_from_json(side.encoder), device)
    side.require_encoder(encoder.fingerprint, f"text encoder {encoder.spec}")
    on_tokens = side.head.spec.cut == "tokens"
    return TextModule(encoder, side.head, takes_ids=False, on_tokens=on_tokens).eval()
