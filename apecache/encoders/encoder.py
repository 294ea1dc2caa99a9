"""Hold a loaded, frozen encoder, as extraction, evaluation and search call it.

It looks the same whichever library it came from.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.device import float32_products, send
from apecache.encoders.spec import EncoderSpec, Pooling, Precision
from apecache.errors import EncoderError
from apecache.fingerprint import Fingerprint

_TORCH_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

State = int | Literal["end", "own"]
"""Where a forward pass is tapped.

A number is a count of blocks: the tokens after them. `end` is the tokens that the model returns.
`own` is the model's own pooled output.
"""
MAX_COMPILED_SHAPES = 64
BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Lengths in tokens that batches of compiled models are padded to; each is compiled once."""
States = Callable[[tuple[Tensor, ...], Collection[State]], dict[State, Tensor]]
"""Run one forward pass on the model's inputs and return the requested states."""


@dataclass(frozen=True, kw_only=True)
class FeatureTap:
    """Name the state of the forward pass that features are taken from, and how it is pooled.

    Encoders with the same `states` are cuts of one model: one pass serves all of them.
    """

    states: States
    state: State
    pool: Callable[[Tensor, Tensor | None], Tensor]
    """(state, mask or None) -> [n, dim] or, for `tokens`, [n, length, dim]."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Encode one batch: (pixels,) for images, (ids, mask) for texts."""
        mask = inputs[1] if len(inputs) > 1 else None
        states_by_name = self.states(inputs, (self.state,))
        return self.pool(states_by_name[self.state], mask)


@runtime_checkable
class PixelPreprocess(Protocol):
    """Preprocess images in two steps, of which the second can run on the encoder's device."""

    def pixels(self, image: Any) -> Tensor:
        """Return uint8 [3, height, width]."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return float32 [..., 3, height, width] for such pixels, on their device."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """Hold a frozen image encoder with its preprocessing and the identity of its features."""

    spec: EncoderSpec
    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    """RGB image -> float32 [3, height, width] on the CPU; safe to call from several threads."""
    forward: Callable[[Tensor], Tensor]
    """float [n, 3, height, width] on `device` -> [n, *row_shape] in the encoder's dtype, not
    normalized."""
    input_shape: tuple[int, int, int]
    """(3, height, width) of the pixels that `forward` takes."""
    row_shape: tuple[int, ...]
    """(dim,) or, for `tokens`, (n_tokens, dim)."""
    fingerprint: Fingerprint
    device: torch.device

    @property
    def dim(self) -> int:
        return self.row_shape[-1]

    @property
    def pixel_preprocess(self) -> PixelPreprocess | None:
        """Return the preprocessing if it has two steps."""
        preprocess: object = self.preprocess
        return preprocess if isinstance(preprocess, PixelPreprocess) else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode one batch.

        Args:
            pixels: float32 [n, 3, height, width] on any device.

        Returns:
            float32 [n, *row_shape] on the CPU, not normalized.
        """
        with torch.no_grad(), products_of(self):
            features = self.forward(self.move(pixels))
            return features.float().cpu()

    def move(self, pixels: Tensor) -> Tensor:
        """Return the pixels on the encoder's device, in its dtype; uint8 is normalized there."""
        # Pinned pixels are then copied while the host prepares the next batch.
        if pixels.dtype == torch.uint8:
            in_two_steps = self.pixel_preprocess
            assert in_two_steps is not None
            pixels = in_two_steps.normalize(pixels.to(self.device, non_blocking=True))
        return pixels.to(self.device, computed_in(self.spec.dtype, self.device), non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Hold the token ids of texts, special tokens included."""

    ids: list[list[int]]
    """One list for each text, in the order of the texts."""
    n_truncated: int
    """How many texts were longer than the encoder takes."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Hold a frozen text encoder with its tokenizer and the identity of its features."""

    spec: EncoderSpec
    module: nn.Module
    tokenize: Callable[[Sequence[str]], Tokens]
    forward: Callable[[Tensor, Tensor], Tensor]
    """(ids, mask), int64 [n, length] on `device` -> [n, dim] or, for `tokens`, [n, length, dim],
    not normalized."""
    pad_id: int
    max_tokens: int
    row_shape: tuple[int, ...]
    """(dim,) or, for `tokens`, (max_tokens, dim)."""
    fingerprint: Fingerprint
    device: torch.device
    length: int | None = None
    """Tokens that every batch is padded to, for models that see the padding; None: its longest
    text."""

    @property
    def dim(self) -> int:
        return self.row_shape[-1]

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Encode one padded batch of token ids.

        Returns:
            float32 [n, dim] or, for `tokens`, [n, longest, dim] on the CPU, not normalized.
        """
        batch, mask = self.pad(ids)
        with torch.no_grad(), products_of(self):
            features = self.forward(batch, mask)
            return features.float().cpu()

    def pad(self, ids: Sequence[Sequence[int]], length: int = 1) -> tuple[Tensor, Tensor]:
        """Return (ids, mask), int64 [n, longest or `length`] on the device."""
        batch, mask = pad_ids(ids, self.pad_id, max(length, self.length or 1))
        return send(batch, self.device), send(mask, self.device)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Encode queries or class names; for data sets see `extract`.

        Returns:
            float32 [n, dim] in the order of `texts`, not normalized.

        Raises:
            EncoderError: the encoder gives tokens, not one vector for each text.
        """
        if len(self.row_shape) > 1:
            raise EncoderError(
                f"encoder {self.spec}: one vector for each text is needed, not its tokens"
            )
        ids = self.tokenize(texts).ids
        batches = [self.encode_ids(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        return torch.cat(batches) if batches else torch.empty(0, self.dim)


class TextPass(Protocol):
    """Encode one batch of token ids, padded to at least `length` tokens, as `encode_texts`."""

    def __call__(self, ids: Sequence[Sequence[int]], length: int = 1) -> list[Tensor]: ...


def computed_in(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type of weights and activations for a precision on a device.

    A CPU computes float16 in float32: its own float16 is slower by far, and what a GPU computes in
    float16 differs from float32 by the error that a store records.
    """
    if precision == "float16" and device.type == "cpu":
        return torch.float32
    return _TORCH_DTYPES[precision]


def products_of(encoder: ImageEncoder | TextEncoder) -> AbstractContextManager[None]:
    """Compute products in float32 or TF32 for a while, as the encoder's precision says."""
    return float32_products(encoder.device, encoder.spec.dtype == "tf32")


def encode_images(encoders: Sequence[ImageEncoder], pixels: Tensor) -> list[Tensor]:
    """Encode one batch by cuts of one model in one forward pass.

    Returns:
        What `encode` gives for each encoder, still on the device.
    """
    # Not inference_mode: some models keep tensors from one pass to the next (BEiT the index of its
    # relative positions), and a tensor made in that mode cannot be used in training later on.
    with torch.no_grad(), products_of(encoders[0]):
        forwards = [encoder.forward for encoder in encoders]
        return _tapped(forwards, (encoders[0].move(pixels),))


def compile_images(encoders: Sequence[ImageEncoder]) -> Callable[[Tensor], list[Tensor]]:
    """Return `encode_images` by a model that TorchInductor compiles at the first batch.

    Results equal the eager ones up to rounding, not bit by bit. Cuts after a block are not
    supported: they are caught by hooks. The first batch raises RuntimeError where there is no
    compiler, or the model has an operation that the compiler does not know.
    """
    run = _compiled(tuple(encoder.forward for encoder in encoders), "pixels")

    def encode(pixels: Tensor) -> list[Tensor]:
        with torch.no_grad(), products_of(encoders[0]):
            features: list[Tensor] = run(encoders[0].move(pixels))
            return features

    return encode


def compile_texts(encoders: Sequence[TextEncoder]) -> TextPass:
    """Return `encode_texts` by a model that TorchInductor compiles for each shape of a batch.

    As `compile_images`.
    """
    run = _compiled(tuple(encoder.forward for encoder in encoders), "ids")

    def encode(ids: Sequence[Sequence[int]], length: int = 1) -> list[Tensor]:
        # Each length is compiled; without this, torch gives up after eight of them.
        shapes = torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES)
        with torch.no_grad(), products_of(encoders[0]), shapes:
            features: list[Tensor] = run(*encoders[0].pad(ids, length))
            return features

    return encode


@lru_cache(maxsize=8)
def _compiled(
    forwards: tuple[Callable[..., Tensor], ...],
    inputs: Literal["pixels", "ids"],
) -> Callable[..., list[Tensor]]:
    """Compile the forward passes, once in a process."""
    # fullgraph: a partly eager model would give other last bits than a store records.
    run: Callable[..., list[Tensor]] = torch.compile(
        lambda *batch: _tapped(forwards, batch),
        fullgraph=True,
        # By default the second shape would be compiled for any size, which is slower.
        dynamic=False if inputs == "ids" else None,
        options=vector_width(),
    )
    return run


def vector_width() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Return the vector width that TorchInductor chooses on this processor, as its option.

    Its cache on disk keeps code that was written for one width, under a key that has the options
    but not the processor. Without this option a cache that machines share, or that was filled
    under another ATEN_CPU_CAPABILITY, gives features of NaN, or ends the process (torch 2.14).
    """
    # Heavy, and needed by nobody who does not compile.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": pick_vec_isa().bit_width()}


def encode_texts(
    encoders: Sequence[TextEncoder],
    ids: Sequence[Sequence[int]],
    length: int = 1,
) -> list[Tensor]:
    """Encode one batch of token ids by cuts of one model in one forward pass.

    Args:
        encoders: the cuts.
        ids: of each text.
        length: tokens that texts are padded to at least.

    Returns:
        What `encode_ids` gives for each encoder, still on the device.
    """
    with torch.no_grad(), products_of(encoders[0]):
        forwards = [encoder.forward for encoder in encoders]
        return _tapped(forwards, encoders[0].pad(ids, length))


def _tapped(forwards: Sequence[Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return float32 features for each forward pass; taps of one model share one pass."""
    first = forwards[0]
    if len(forwards) == 1 or not isinstance(first, FeatureTap):
        return [forward(*inputs).float() for forward in forwards]
    taps = [forward for forward in forwards if isinstance(forward, FeatureTap)]
    states_by_name = first.states(inputs, {tap.state for tap in taps})
    mask = inputs[1] if len(inputs) > 1 else None
    return [tap.pool(states_by_name[tap.state], mask).float() for tap in taps]


def pad_ids(ids: Sequence[Sequence[int]], pad_id: int, length: int = 1) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), int64 [n, longest, but at least `length`], padded on the right."""
    longest = max(map(len, ids), default=1)
    # At least one column, so that a batch of empty texts still has a shape.
    n_columns = max(length, longest)
    batch = torch.full((len(ids), n_columns), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), n_columns), dtype=torch.long)
    for row, sequence in enumerate(ids):
        batch[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return batch, mask


def bucket_length(length: int, most: int) -> int:
    """Return the length that a batch of a compiled model is padded to.

    Args:
        length: tokens of the longest text of the batch.
        most: tokens that a text may have.
    """
    bucket = next((bucket for bucket in BUCKETS if bucket >= length), length)
    return max(length, min(bucket, most))


def pool_tokens(hidden: Tensor, mask: Tensor | None, pooling: Pooling, n_prefix: int = 0) -> Tensor:
    """Pool the tokens of each sample.

    Args:
        hidden: [n, length, dim].
        mask: int64 [n, length], 0 for padding; None: no padding. Mean and max leave padding out.
        n_prefix: number of leading tokens (an image's CLS and register tokens) that mean and max
            leave out.

    Returns:
        [n, dim]; [n, 2 dim] for `cls+mean`; `hidden` itself for `tokens`.
    """
    match pooling:
        case "last":
            if mask is None:
                return hidden[:, -1]
            # The last position of a token, whichever side the padding is on.
            positions = torch.arange(mask.shape[1], device=mask.device)
            last_positions = (positions * (mask != 0)).amax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last_positions]
        case "tokens":
            return hidden
        case "cls":
            return hidden[:, 0]
        case "cls+mean":
            mean = pool_tokens(hidden, mask=mask, pooling="mean", n_prefix=n_prefix)
            return torch.cat((hidden[:, 0], mean), dim=1)
        case "max":
            unmasked = hidden
            if mask is not None:
                is_padding = mask.unsqueeze(-1) == 0
                unmasked = hidden.masked_fill(is_padding, -torch.inf)
            return unmasked[:, n_prefix:].amax(1)
        case _:
            if mask is None:
                return hidden[:, n_prefix:].mean(1)
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            # The clamp keeps a text without any token from dividing by zero.
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def freeze(module: nn.Module, spec: EncoderSpec, device: torch.device) -> nn.Module:
    """Return the module in evaluation mode, without gradients, on `device` in the spec's dtype."""
    frozen = module.eval().requires_grad_(False)
    return frozen.to(device, computed_in(spec.dtype, device))
