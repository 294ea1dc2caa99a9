"""Use several encoders of one modality as one, whose features stand side by side.

`apecache.encoders.spec.join_specs` names them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder, Tokens
from apecache.encoders.spec import join_fingerprints, join_specs
from apecache.errors import EncoderError

SEPARATOR = -1
"""Stands between the token ids of two encoders. No tokenizer has it."""


def require_vectors(encoders: Sequence[ImageEncoder] | Sequence[TextEncoder]) -> None:
    """Refuse encoders that give tokens. Raises EncoderError."""
    for encoder in encoders:
        if len(encoder.row_shape) > 1:
            raise EncoderError(
                f"encoder {encoder.spec}: tokens cannot be joined; take a pooled cut"
            )


def join_image_encoders(encoders: Sequence[ImageEncoder]) -> ImageEncoder:
    """Return one encoder that runs several and puts their features side by side.

    Its preprocessing gives the flat pixels of all of them, float32 [n_values]: encoders differ in
    resolution.
    """
    require_vectors(encoders)
    input_sizes = [torch.Size(encoder.input_shape).numel() for encoder in encoders]

    def preprocess(image: Image.Image) -> Tensor:
        return torch.cat([encoder.preprocess(image).flatten() for encoder in encoders])

    def forward(pixels: Tensor) -> Tensor:
        features = []
        blocks = pixels.split(input_sizes, dim=1)
        for encoder, block in zip(encoders, blocks, strict=True):
            inputs = encoder.move(block.unflatten(1, encoder.input_shape))
            features.append(encoder.forward(inputs).float())
        return torch.cat(features, dim=1)

    return ImageEncoder(
        spec=join_specs([encoder.spec for encoder in encoders]),
        module=nn.ModuleList([encoder.module for encoder in encoders]),
        preprocess=preprocess,
        forward=forward,
        input_shape=(1, 1, sum(input_sizes)),
        row_shape=(sum(encoder.dim for encoder in encoders),),
        fingerprint=join_fingerprints([encoder.fingerprint for encoder in encoders]),
        device=encoders[0].device,
    )


@dataclass(frozen=True, kw_only=True)
class JoinedTextEncoder(TextEncoder):
    """Run several text encoders, and put their features side by side.

    The ids of a text are those of all tokenizers, with `SEPARATOR` between them.
    """

    encoders: tuple[TextEncoder, ...]
    """The encoders, in order."""

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Encode one batch; see `TextEncoder.encode_ids`."""
        ids_of_texts = [_split_ids(row) for row in ids]
        features = []
        for number, encoder in enumerate(self.encoders):
            features.append(encoder.encode_ids([row[number] for row in ids_of_texts]))
        return torch.cat(features, dim=1)


def join_text_encoders(encoders: Sequence[TextEncoder]) -> JoinedTextEncoder:
    """Return one encoder that runs several and puts their features side by side."""
    require_vectors(encoders)
    first = encoders[0]
    return JoinedTextEncoder(
        spec=join_specs([encoder.spec for encoder in encoders]),
        module=nn.ModuleList([encoder.module for encoder in encoders]),
        tokenize=_joined_tokenizer([encoder.tokenize for encoder in encoders]),
        forward=first.forward,
        pad_id=first.pad_id,
        max_tokens=max(encoder.max_tokens for encoder in encoders),
        row_shape=(sum(encoder.dim for encoder in encoders),),
        fingerprint=join_fingerprints([encoder.fingerprint for encoder in encoders]),
        device=first.device,
        encoders=tuple(encoders),
    )


def _joined_tokenizer(
    tokenizers: Sequence[Callable[[Sequence[str]], Tokens]],
) -> Callable[[Sequence[str]], Tokens]:
    def tokenize(texts: Sequence[str]) -> Tokens:
        tokens = [tokenizer(texts) for tokenizer in tokenizers]
        rows: list[list[int]] = []
        for number in range(len(texts)):
            row = list(tokens[0].ids[number])
            for other_tokens in tokens[1:]:
                row += [SEPARATOR, *other_tokens.ids[number]]
            rows.append(row)
        return Tokens(ids=rows, n_truncated=max(of_encoder.n_truncated for of_encoder in tokens))

    return tokenize


def _split_ids(row: Sequence[int]) -> list[list[int]]:
    """Split the ids of a text at the separators: one list for each encoder."""
    encoder_ids: list[list[int]] = [[]]
    for token in row:
        if token == SEPARATOR:
            encoder_ids.append([])
        else:
            encoder_ids[-1].append(token)
    return encoder_ids
