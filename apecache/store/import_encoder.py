"""Open the encoders that imported features are said to be of, and try them on a few rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.data.images import load_image
from apecache.data.media import Media, NoMedia
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec
from apecache.errors import MismatchError, RowError
from apecache.store.import_identity import NORMALIZED, KnownEncoder, token_count
from apecache.store.import_rows import finite_rows
from apecache.store.import_sides import NamedRows
from apecache.store.import_table import ImportTable

TRIED_ROWS = 8
LOOKED_AT_ROWS = 64
TRIAL_COSINE = 0.98
"""Least cosine of a row with what the encoder gives for its input. Decoders, kernels and half
precision differ between tools by less."""
UNIT_TOLERANCE = 0.01


def known_encoder(
    named: NamedRows,
    table: ImportTable,
    media: Media,
    device: str,
) -> tuple[KnownEncoder, int]:
    """Open the named encoder of an array, and compare it with the features where inputs are there.

    Returns:
        The encoder's identity, and the number of rows that were compared.

    Raises:
        EncoderError: The encoder cannot be opened.
        MismatchError: It gives other features, or features of another shape.
    """
    assert named.encoder is not None
    is_image = named.encoder.modality == "image"
    encoder = _open(named.encoder, device)
    # The shape is compared first: no input needs to be read for that.
    _require_shape(named, encoder)
    row_map = table.image_map if is_image else table.text_map
    assert row_map is not None
    # The first rows only: a wrong encoder shows in any of them.
    stored_rows = [row for row in range(min(len(row_map), LOOKED_AT_ROWS)) if row_map[row] >= 0]
    fields = encoder.fingerprint.fields
    # Tokens and views depend on padding and chance: only the identity of their encoder is taken.
    if not stored_rows or token_count(named) is not None or named.views:
        return KnownEncoder(spec=encoder.spec, fields=fields), 0
    stored = named.rows.read(row_map[stored_rows]).astype(np.float32)
    # Missing rows are NaN, and like nothing.
    is_finite = finite_rows(stored)
    stored = stored[is_finite]
    rows = [row for row, finite in zip(stored_rows, is_finite, strict=True) if finite]
    # Unit length may be the encoder's own doing: then nothing was done afterwards.
    if _are_unit(stored) and not _are_unit(_sample(encoder)):
        # The head learns from normalized features, so live ones are normalized before it.
        fields = {**fields, NORMALIZED: True}
    positions, fresh = _encode_inputs(encoder, rows, table, media)
    if positions:
        _require_alike(stored[positions], fresh, encoder)
    return KnownEncoder(spec=encoder.spec, fields=fields), len(positions)


def _open(spec: EncoderSpec, device: str) -> ImageEncoder | TextEncoder:
    if spec.modality == "image":
        return load_image_encoder(spec, device)
    return load_text_encoder(spec, device)


def _require_shape(named: NamedRows, encoder: ImageEncoder | TextEncoder) -> None:
    has_tokens = token_count(named) is not None
    makes_tokens = len(encoder.row_shape) > 1
    dim = named.rows.row_shape[-1]
    if dim != encoder.dim or has_tokens != makes_tokens:
        shape_names = {True: "tokens", False: "pooled features"}
        raise MismatchError(
            f"features {named.name} are {shape_names[has_tokens]} of {dim} numbers, {encoder.spec} "
            f"gives {shape_names[makes_tokens]} of {encoder.dim}; name another encoder or cut"
        )


def _are_unit(vectors: NDArray[np.float32]) -> bool:
    """Return whether all vectors have length 1."""
    norms = np.linalg.norm(vectors, axis=1)
    return len(norms) > 0 and bool((np.abs(norms - 1) < UNIT_TOLERANCE).all())


def _sample(encoder: ImageEncoder | TextEncoder) -> NDArray[np.float32]:
    """Return what the encoder gives for some input, [1, dim]."""
    import torch

    if isinstance(encoder, ImageEncoder):
        features = encoder.encode(torch.zeros(1, *encoder.input_shape))
    else:
        features = encoder.encode(["a photo"])
    sample: NDArray[np.float32] = features.numpy()
    return sample


def _encode_inputs(
    encoder: ImageEncoder | TextEncoder,
    rows: Sequence[int],
    table: ImportTable,
    media: Media,
) -> tuple[list[int], NDArray[np.float32]]:
    """Encode the inputs of a few rows that can be read.

    Returns:
        Positions in `rows`, and features [n, dim].
    """
    import torch

    if isinstance(encoder, TextEncoder):
        captions = table.columns.captions
        if not table.has_captions:
            return [], np.empty((0, encoder.dim), np.float32)
        texts = [
            (position, captions[row]) for position, row in enumerate(rows) if captions[row].strip()
        ]
        texts = texts[:TRIED_ROWS]
        if not texts:
            return [], np.empty((0, encoder.dim), np.float32)
        encoded: Any = encoder.encode([text for _, text in texts]).numpy()
        return [position for position, _ in texts], encoded
    positions: list[int] = []
    pixels: list[torch.Tensor] = []
    for position, row in enumerate(rows):
        if isinstance(media, NoMedia) or len(positions) == TRIED_ROWS:
            break
        try:
            image = load_image(table.columns.keys[row], media).image
        except RowError:
            # Images need not be there: features are often kept without them.
            continue
        positions.append(position)
        pixels.append(encoder.preprocess(image))
    if not positions:
        return [], np.empty((0, encoder.dim), np.float32)
    return positions, encoder.encode(torch.stack(pixels)).numpy()


def _require_alike(
    stored: NDArray[np.float32],
    fresh: NDArray[np.float32],
    encoder: ImageEncoder | TextEncoder,
) -> None:
    """Refuse an encoder that gives other features for the same inputs."""
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
    # By cosine, which does not depend on a normalization of one of them.
    cosines = (stored * fresh).sum(1) / np.maximum(norms, 1e-12)
    worst_cosine = float(cosines.min())
    if worst_cosine < TRIAL_COSINE:
        raise MismatchError(
            f"{encoder.spec} gives other features for {len(cosines)} of the inputs (cosine down to "
            f"{worst_cosine:.3f}; expected at least {TRIAL_COSINE}); name the encoder, cut, prefix "
            "and resolution that made them, or import them without an encoder"
        )
