"""A loaded, frozen encoder: what extraction, evaluation and search call, whichever library it came
from."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.errors import EncoderError
from apecache.fingerprint import FEATURE_CODE_VERSION, Fingerprint, Json, digest_tensors

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

State = int | Literal["end", "own"]
"""Where a forward pass is tapped: after so many blocks; `end`: the tokens that the model returns;
`own`: what it makes of them itself."""
States = Callable[[tuple[Tensor, ...], Collection[State]], dict[State, Tensor]]
"""One forward pass on the model's inputs, and what the states asked for are in it."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Which state of the forward pass features are taken from, and how they are pooled. Encoders
    with the same `states` are cuts of one model: one pass serves all of them.

    `pool`: (state, mask or None) -> [n, dim] or, for `tokens`, [n, length, dim].
    """

    states: States
    state: State
    pool: Callable[[Tensor, Tensor | None], Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Images: (pixels); texts: (ids, mask)."""
        mask = inputs[1] if len(inputs) > 1 else None
        return self.pool(self.states(inputs, (self.state,))[self.state], mask)


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """`preprocess`: RGB image -> float32 [3, height, width] on the CPU, safe to call from several
    threads. `forward`: float [n, 3, height, width] on `device` -> [n, *row_shape] in the encoder's
    dtype, not normalised. `row_shape`: (dim,) or, for `tokens`, (tokens, dim)."""

    spec: EncoderSpec
    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    forward: Callable[[Tensor], Tensor]
    input_shape: tuple[int, int, int]
    row_shape: tuple[int, ...]
    fingerprint: Fingerprint
    device: torch.device

    @property
    def dim(self) -> int:
        return self.row_shape[-1]

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [n, 3, height, width] on any device -> float32 [n, *row_shape] on the CPU, not
        normalised."""
        with torch.inference_mode():
            return self.forward(self.move(pixels)).float().cpu()

    def move(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, TORCH_DTYPES[self.spec.dtype], non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of texts, special tokens included, without padding. `n_truncated` of them were
    over-long."""

    ids: list[list[int]]
    n_truncated: int


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """`tokenise`: texts -> Tokens. `forward`: (ids, mask) int64 [n, length] on `device` -> [n, dim]
    or, for `tokens`, [n, length, dim], not normalised. `row_shape`: (dim,) or (max_tokens, dim).
    `length`: pad every batch to so many tokens, for models that see the padding; None: to its
    longest text."""

    spec: EncoderSpec
    module: nn.Module
    tokenise: Callable[[Sequence[str]], Tokens]
    forward: Callable[[Tensor, Tensor], Tensor]
    pad_id: int
    max_tokens: int
    row_shape: tuple[int, ...]
    fingerprint: Fingerprint
    device: torch.device
    length: int | None = None

    @property
    def dim(self) -> int:
        return self.row_shape[-1]

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """One padded batch: lists of token ids -> float32 [n, dim] or [n, longest, dim] on the CPU,
        not normalised."""
        batch, mask = self.pad(ids)
        with torch.inference_mode():
            return self.forward(batch, mask).float().cpu()

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(ids, mask) int64 [n, longest] on the device."""
        batch, mask = pad_ids(ids, self.pad_id, self.length or 1)
        return batch.to(self.device), mask.to(self.device)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float32 [n, dim] in the order of `texts`; for queries and class names, not for data sets
        (see extract).

        Raises:
            EncoderError: an encoder of tokens, which are not one vector each.
        """
        if len(self.row_shape) > 1:
            raise EncoderError(
                f"encoder {self.spec}: one vector for each text is needed, not its tokens"
            )
        ids = self.tokenise(texts).ids
        parts = [self.encode_ids(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)


def encode_images(encoders: Sequence[ImageEncoder], pixels: Tensor) -> list[Tensor]:
    """One batch by cuts of one model in one forward pass: for each, what `encode` gives, still on
    the device."""
    with torch.inference_mode():
        return _tapped([encoder.forward for encoder in encoders], (encoders[0].move(pixels),))


def compile_images(encoders: Sequence[ImageEncoder]) -> Callable[[Tensor], list[Tensor]]:
    """`encode_images` by a model that TorchInductor compiles at the first batch: equal to rounding,
    not bit by bit.

    Only for cuts that are not after a block, which are caught by hooks. The first batch raises
    RuntimeError where there is no compiler, or the model has an operation that it does not know.
    """
    run = _compiled(tuple(encoder.forward for encoder in encoders))

    def encode(pixels: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            found: list[Tensor] = run(encoders[0].move(pixels))
            return found

    return encode


@lru_cache(maxsize=8)
def _compiled(forwards: tuple[Callable[..., Tensor], ...]) -> Callable[[Tensor], list[Tensor]]:
    """Once in a process; what cannot be compiled as a whole is an error, never run in another
    way."""
    run: Callable[[Tensor], list[Tensor]] = torch.compile(
        lambda pixels: _tapped(forwards, (pixels,)),
        fullgraph=True,
    )
    return run


def encode_texts(encoders: Sequence[TextEncoder], ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """One batch of token ids by cuts of one model in one forward pass: for each, what `encode_ids`
    gives, still on the device."""
    with torch.inference_mode():
        return _tapped([encoder.forward for encoder in encoders], encoders[0].pad(ids))


def _tapped(forwards: Sequence[Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    first = forwards[0]
    if len(forwards) == 1 or not isinstance(first, Tap):
        return [forward(*inputs).float() for forward in forwards]
    taps = [forward for forward in forwards if isinstance(forward, Tap)]
    found = first.states(inputs, {tap.state for tap in taps})
    mask = inputs[1] if len(inputs) > 1 else None
    return [tap.pool(found[tap.state], mask).float() for tap in taps]


def pad_ids(ids: Sequence[Sequence[int]], pad_id: int, length: int = 1) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [n, longest, but at least `length`], padded on the right."""
    longest = max(length, max(map(len, ids), default=1))
    batch = torch.full((len(ids), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for row, sequence in enumerate(ids):
        batch[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return batch, mask


def pool_tokens(hidden: Tensor, mask: Tensor | None, pooling: Pooling, n_prefix: int = 0) -> Tensor:
    """[n, length, dim] -> [n, dim], [n, 2 dim] for `cls+mean`, all of it for `tokens`.

    Mean and max are over the tokens that `mask` [n, length] keeps, and without the first `n_prefix`
    ones (an image's CLS and register tokens).
    """
    match pooling:
        case "tokens":
            return hidden
        case "cls":
            return hidden[:, 0]
        case "cls+mean":
            return torch.cat(
                (hidden[:, 0], pool_tokens(hidden, mask=mask, pooling="mean", n_prefix=n_prefix)),
                dim=1,
            )
        case "max":
            kept = (
                hidden if mask is None else hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
            )
            return kept[:, n_prefix:].amax(1)
        case _:
            if mask is None:
                return hidden[:, n_prefix:].mean(1)
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def digest_module(module: nn.Module, exclude: Sequence[str] = ()) -> str:
    """Digest of the state dict as loaded (before any change of dtype); `exclude`d names were never
    loaded."""
    left_out = set(exclude)
    return digest_tensors(
        (name, str(tensor.dtype), tuple(tensor.shape), _raw_bytes(tensor))
        for name, tensor in module.state_dict().items()
        if name not in left_out
    )


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def build_fingerprint(
    spec: EncoderSpec,
    weights: str,
    architecture: Json,
    inputs: Json,
) -> Fingerprint:
    """Identity of the features of one encoder.

    `architecture` is its class with the settings that the weights do not show (heads, activations,
    the model's own pooling); `inputs` is the resolved preprocessing or tokenizer.
    """
    return Fingerprint(
        fields={
            "feature_code": FEATURE_CODE_VERSION,
            "library": spec.library,
            "architecture": architecture,
            "revision": spec.revision,
            "weights": weights,
            "modality": spec.modality,
            "cut": "tokens" if spec.pooling == "tokens" else "pooled",
            "inputs": inputs,
            "compute_dtype": spec.dtype,
            "compile": "eager",
        }
    )


def freeze(module: nn.Module, spec: EncoderSpec, device: torch.device) -> nn.Module:
    """The module in evaluation mode, without gradients, on `device` in the spec's dtype."""
    return module.eval().requires_grad_(False).to(device, TORCH_DTYPES[spec.dtype])


def parse_device(device: str) -> torch.device:
    """`auto` is CUDA if there is one, else the CPU.

    Raises:
        EncoderError: a device that is not there.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"device {device!r} cannot be used ({reason}); try --device auto or cpu"
        ) from None
    return torch.device(name)
