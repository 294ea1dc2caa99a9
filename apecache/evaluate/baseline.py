"""Measure a ready-made pair of encoders beside a run: the model that could be taken instead.

Its embeddings are the L2-normalized outputs of both encoders, without any head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from apecache.data.images import open_readable
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError, OptionError
from apecache.evaluate.embeddings import Embeddings, LiveSide, OpenImage, embed_store
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.build import build_head
from apecache.heads.head import HeadSpec
from apecache.heads.normalization import normalize
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.store.reader import FeatureStore

CLIP_SCALE = 100.0
"""Factor of CLIP's cosines before a softmax; rankings do not depend on it."""
PAIR_LIBRARIES = ("open_clip", "hf")
"""Libraries whose models have both an image and a text encoder."""


@dataclass(frozen=True, kw_only=True)
class EncoderSide:
    """Embed images or texts by an encoder alone, as a `LiveSide`."""

    loaded: ImageEncoder | TextEncoder

    @property
    def encoder(self) -> Mapping[str, Json]:
        """Spec of the encoder, as JSON."""
        return asdict(self.loaded.spec)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the encoder."""
        return self.loaded.fingerprint

    def require_encoder(self, fingerprint: Fingerprint, where: str) -> None:
        """Accept every store: the encoder runs itself and reads no features."""

    def embed(self, inputs: Sequence[Any], batch: int = 64) -> Tensor:
        """Embed pictures or texts -> float32 [n, dim], L2-normalized."""
        if isinstance(self.loaded, TextEncoder):
            return normalize(self.loaded.encode(inputs, batch), dim=-1)
        embedded = []
        for first in range(0, len(inputs), batch):
            pictures = inputs[first : first + batch]
            pixels = []
            for number, picture in enumerate(pictures, first):
                image = open_readable(picture, f"inputs[{number}]")
                pixels.append(self.loaded.preprocess(image))
            embedded.append(normalize(self.loaded.encode(torch.stack(pixels)), dim=-1))
        return torch.cat(embedded) if embedded else torch.empty(0, self.loaded.dim)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Hold both encoders of a ready-made model."""

    name: str
    image: EncoderSide
    text: EncoderSide

    def heads(self) -> TrainedHeads:
        """Return the model as a run whose heads change nothing, for what takes runs."""
        return TrainedHeads(
            image=_identity(self.image),
            text=_identity(self.text),
            scale=CLIP_SCALE,
        )


def load_baseline(name: str, device: str = "auto") -> Baseline:
    """Load a model with an image and a text encoder in one space.

    Args:
        name: `open_clip:NAME/TAG`, `open_clip:/folder`, or `hf:ID` of a CLIP or SigLIP.
        device: of the encoders.

    Raises:
        OptionError: a library without such models, or encoders of different widths.
        EncoderError: it cannot be loaded.
    """
    try:
        image = load_image_encoder(_spec(name, "image"), device)
        text = load_text_encoder(_spec(name, "text"), device)
    except EncoderError as error:
        raise EncoderError(
            f"--baseline {name}: {error} (expected: a model with an image and a text encoder)"
        ) from error
    if image.dim != text.dim:
        raise OptionError(
            f"--baseline {name}: its images have {image.dim} dimensions and its texts {text.dim}, "
            "so they share no space; give a CLIP or SigLIP"
        )
    return Baseline(name=name, image=EncoderSide(loaded=image), text=EncoderSide(loaded=text))


def embed_baseline(
    baseline: Baseline,
    store: FeatureStore,
    reference: Embeddings,
    open_image: OpenImage | None = None,
) -> Embeddings:
    """Embed the images and captions that a run was measured on.

    Features of the store are taken where it has those of the encoder. Otherwise the images and
    captions are encoded, which takes a while.

    Args:
        baseline: the model.
        store: the store of the split.
        reference: what the run embedded.
        open_image: reads the image of a key; needed where the store has no features of the image
            encoder.

    Raises:
        OptionError: images are needed.
        DataError: an image cannot be read.
    """
    among = torch.zeros(len(store.pairs.keys), dtype=torch.bool)
    among[torch.from_numpy(reference.image_rows)] = True
    # One side may have features in the store while the other one runs.
    sides = _Sides(image=_side(baseline.image, store), text=_side(baseline.text, store))
    return embed_store(sides, store=store, open_image=open_image, among=among.numpy())


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Hold one side from features and another from inputs, as `embed_store` takes them."""

    image: TrainedSide | LiveSide
    text: TrainedSide | LiveSide


def _side(side: EncoderSide, store: FeatureStore) -> TrainedSide | LiveSide:
    modality = side.loaded.spec.modality
    for array in store.arrays(modality):
        if array.record.encoder.digest == side.fingerprint.digest and array.views is None:
            return _identity(side)
    return side


def _identity(side: EncoderSide) -> TrainedSide:
    dim = side.loaded.dim
    head = build_head(HeadSpec(kind="identity", standardize=False), dim, dim)
    return TrainedSide(
        head=head.eval().requires_grad_(False),
        encoder=side.encoder,
        fingerprint=side.fingerprint,
    )


def _spec(name: str, modality: Any) -> EncoderSpec:
    library = name.partition(":")[0]
    if library not in PAIR_LIBRARIES:
        raise OptionError(
            f"--baseline {name}: expected open_clip:NAME/TAG or hf:ID of a model with an image and "
            "a text encoder"
        )
    return parse_encoder(name, modality)
