"""Write the same model with random weights, to compare pretraining with."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError
from apecache.storage.replace import replace_tensors

WEIGHTS = "model.safetensors"
DEVIATION = 0.02
"""Standard deviation of all matrices, as in BERT and ViT (Devlin et al. 2019; Dosovitskiy et al.
2021, there truncated)."""


def write_random(spec: EncoderSpec, out: Path, seed: int) -> None:
    """Write a copy of the encoder's folder with random weights, unless it exists already.

    Matrices and embeddings are N(0, 0.02), biases 0, other vectors (scales of norms and layers) 1.
    Integer tensors stay.

    Raises:
        EncoderError: the encoder is not a local folder with model.safetensors.
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
    pretrained = load_file(folder / WEIGHTS)
    # Sorted, so that a seed gives the same weights however the file orders its tensors.
    tensors = {name: _drawn(name, pretrained[name], generator) for name in sorted(pretrained)}
    replace_tensors(out / WEIGHTS, tensors, {"format": "pt"})


def _drawn(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if name.endswith("bias"):
        return torch.zeros_like(tensor)
    if tensor.ndim < 2:
        return torch.ones_like(tensor)
    return (DEVIATION * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
