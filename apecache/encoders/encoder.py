"""A loaded, frozen encoder: what extraction, evaluation and search call, whichever library it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.errors import EncoderError
from apecache.fingerprint import FEATURE_CODE_VERSION, Fingerprint, Json, digest_tensors

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ImageEncoder:
    """`preprocess`: RGB image -> float32 [3, height, width] on the CPU, safe to call from several threads.
    `forward`: float [n, 3, height, width] on `device` -> [n, dim] in the encoder's dtype, not normalised."""

    spec: EncoderSpec
    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    forward: Callable[[Tensor], Tensor]
    input_shape: tuple[int, int, int]
    dim: int
    fingerprint: Fingerprint
    device: torch.device

    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [n, 3, height, width] on any device -> float32 [n, dim] on the CPU, not normalised."""
        with torch.inference_mode():
            moved = pixels.to(self.device, TORCH_DTYPES[self.spec.dtype], non_blocking=True)
            return self.forward(moved).float().cpu()


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, special tokens included, without padding. `n_truncated` of them were over-long."""

    ids: list[list[int]]
    n_truncated: int


@dataclass(frozen=True)
class TextEncoder:
    """`tokenise`: texts -> Tokens. `forward`: (ids, mask) int64 [n, length] on `device` -> [n, dim], not normalised."""

    spec: EncoderSpec
    module: nn.Module
    tokenise: Callable[[Sequence[str]], Tokens]
    forward: Callable[[Tensor, Tensor], Tensor]
    pad_id: int
    max_tokens: int
    dim: int
    fingerprint: Fingerprint
    device: torch.device
    prefix: str = field(default="")

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """One padded batch: lists of token ids -> float32 [n, dim] on the CPU, not normalised."""
        batch, mask = pad_ids(ids, self.pad_id)
        with torch.inference_mode():
            return self.forward(batch.to(self.device), mask.to(self.device)).float().cpu()

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float32 [n, dim] in the order of `texts`; for queries and class names, not for data sets (see extract)."""
        ids = self.tokenise(texts).ids
        parts = [self.encode_ids(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)


def pad_ids(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [n, longest], padded on the right."""
    longest = max(1, max(map(len, ids), default=1))
    batch = torch.full((len(ids), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for row, sequence in enumerate(ids):
        batch[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return batch, mask


def pool_tokens(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """[n, length, dim] -> [n, dim]: the first token, or the mean over the tokens that `mask` [n, length] keeps."""
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def digest_module(module: nn.Module, exclude: Sequence[str] = ()) -> str:
    """Digest of the state dict as loaded (before any change of dtype); `exclude`d names were never loaded."""
    left_out = set(exclude)
    return digest_tensors(
        (name, str(tensor.dtype), tuple(tensor.shape), _raw_bytes(tensor))
        for name, tensor in module.state_dict().items()
        if name not in left_out
    )


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def build_fingerprint(spec: EncoderSpec, weights: str, architecture: Json, inputs: Json) -> Fingerprint:
    """Identity of the features of one encoder.

    `architecture` is its class with the settings that the weights do not show (heads, activations, the model's own
    pooling); `inputs` is the resolved preprocessing or tokenizer.
    """
    return Fingerprint(
        {
            "feature_code": FEATURE_CODE_VERSION,
            "library": spec.library,
            "architecture": architecture,
            "revision": spec.revision,
            "weights": weights,
            "modality": spec.modality,
            "cut": "pooled",
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
        raise EncoderError(f"device {device!r} cannot be used ({reason}); try --device auto or cpu") from None
    return torch.device(name)
