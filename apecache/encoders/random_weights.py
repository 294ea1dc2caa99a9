"""The same model with random weights: what pretraining is compared with."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError
from apecache.storage.atomic import replace_tensors

WEIGHTS = "model.safetensors"
DEVIATION = 0.02
"""Of all matrices, as BERT and ViT begin (Devlin et al. 2019; Dosovitskiy et al. 2021: truncated,
here not)."""


def write_random(spec: EncoderSpec, out: Path, seed: int) -> None:
    """A copy of the encoder's folder with other weights: matrices and embeddings N(0, 0.02), biases
    0, other vectors (scales of norms and layers) 1; what is no floating-point number stays. Nothing
    is done where it is there already.

    Raises:
        EncoderError: the encoder is no local folder with model.safetensors.
    """
    if (out / WEIGHTS).is_file():
        return
    folder = spec.folder
    if folder is None or not (folder / WEIGHTS).is_file():
        raise EncoderError(
            f"encoder {spec}: random weights need a local folder with {WEIGHTS}; save the "
            "model there"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pth"):
            shutil.copyfile(path, out / path.name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _drawn(name, tensor, generator)
        for name, tensor in sorted(load_file(folder / WEIGHTS).items())
    }
    replace_tensors(out / WEIGHTS, tensors, {"format": "pt"})


def _drawn(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if name.endswith("bias"):
        return torch.zeros_like(tensor)
    if tensor.ndim < 2:
        return torch.ones_like(tensor)
    return (DEVIATION * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
