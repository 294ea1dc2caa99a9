"""Fingerprint encoders: digests of their weights, and what else decides on their features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apecache.encoders.spec import EncoderSpec
from apecache.fingerprint import FEATURE_CODE_VERSION, Fingerprint, Json, digest_tensors


def digest_module(module: nn.Module, exclude: Sequence[str] = ()) -> str:
    """Return a digest of the state dict as loaded, before any change of dtype.

    Args:
        exclude: names that the files do not hold; their values are random.
    """
    left_out = set(exclude)
    return digest_tensors(
        (name, str(tensor.dtype), tuple(tensor.shape), _raw_bytes(tensor))
        for name, tensor in module.state_dict().items()
        if name not in left_out
    )


def build_fingerprint(
    spec: EncoderSpec,
    weights: str,
    architecture: Json,
    inputs: Json,
) -> Fingerprint:
    """Return the identity of the features of one encoder.

    Args:
        weights: digest of the state dict.
        architecture: its class with the settings that the weights do not show (heads, activations,
            the model's own pooling).
        inputs: the resolved preprocessing or tokenizer.
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


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # NumPy has no bfloat16, so every dtype is read as bytes.
    return flat.view(torch.uint8).numpy().data
