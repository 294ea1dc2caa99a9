"""What a device can compute: from vendors' data sheets, or measured on this machine."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from apecache.errors import OptionError, nearest


@dataclass(frozen=True, kw_only=True)
class Device:
    """`flops`: floating-point operations per second. `memory_bytes` None: not known. `source` says
    whence it is."""

    name: str
    flops: float
    memory_bytes: int | None
    source: str


GB = 10**9
DEVICES = (
    Device(
        name="T4",
        flops=65e12,
        memory_bytes=16 * GB,
        source="NVIDIA T4 data sheet, FP16 tensor cores",
    ),
    Device(
        name="V100",
        flops=125e12,
        memory_bytes=32 * GB,
        source="NVIDIA V100 SXM2 data sheet, FP16 tensor cores",
    ),
    Device(
        name="A100",
        flops=312e12,
        memory_bytes=80 * GB,
        source="NVIDIA A100 80GB SXM data sheet, BF16 dense",
    ),
    Device(
        name="L4",
        flops=121e12,
        memory_bytes=24 * GB,
        source="NVIDIA L4 data sheet, BF16, half of the figure with sparsity",
    ),
    Device(
        name="H100",
        flops=989.5e12,
        memory_bytes=80 * GB,
        source="NVIDIA H100 SXM data sheet, BF16, half of the figure with sparsity",
    ),
    Device(
        name="H200",
        flops=989.5e12,
        memory_bytes=141 * GB,
        source="NVIDIA H200 SXM data sheet, BF16, half of the figure with sparsity",
    ),
    Device(
        name="A6000",
        flops=154.85e12,
        memory_bytes=48 * GB,
        source="NVIDIA RTX A6000 data sheet, tensor cores, half of the figure with sparsity",
    ),
    Device(
        name="RTX3090",
        flops=71e12,
        memory_bytes=24 * GB,
        source="NVIDIA GA102 white paper, BF16 dense with FP32 accumulation",
    ),
    Device(
        name="RTX4090",
        flops=165.2e12,
        memory_bytes=24 * GB,
        source="NVIDIA Ada white paper, BF16 dense with FP32 accumulation",
    ),
)
"""Peaks: no training reaches them. Seconds computed from them are lower bounds."""


def find_device(name: str) -> Device:
    """One of the table, or `here`: this machine, measured (about a second).

    Raises:
        OptionError: another name, with those that there are.
    """
    if name == "here":
        return measure_device()
    known = {device.name.lower(): device for device in DEVICES}
    if name.lower() not in known:
        names = ", ".join(device.name for device in DEVICES)
        raise OptionError(
            f"no device {name!r}; there are here, {names}{nearest(name, names.split(', '))}"
        )
    return known[name.lower()]


def measure_device(dim: int = 384, length: int = 128, n: int = 4, seconds: float = 1.0) -> Device:
    """Forward and backward passes of one Transformer block in float32, on CUDA under bfloat16: the
    rate reached, not a peak. `n` sequences of `length` tokens at a time."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, dropout=0.0, batch_first=True).to(
        where
    )
    x = torch.randn(n, length, dim, device=where, requires_grad=True)
    with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
        _step(block, x)
        begin = time.perf_counter()
        count = 0
        while time.perf_counter() - begin < seconds:
            _step(block, x)
            count += 1
    elapsed = time.perf_counter() - begin
    memory = torch.cuda.get_device_properties(where).total_memory if where.type == "cuda" else None
    return Device(
        name="here",
        flops=count * 3 * n * block_flops(dim, length) / elapsed,
        memory_bytes=memory,
        source=f"measured on this {where.type}",
    )


def _step(block: nn.Module, x: torch.Tensor) -> None:
    block(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def block_flops(dim: int, length: int, expansion: int = 4) -> int:
    """Forward operations of one Transformer block and one sequence, a multiplication and an
    addition being two: query, key, value and output projections, scores and their weighted sum, and
    the two layers of the MLP."""
    return 2 * length * (4 + 2 * expansion) * dim**2 + 4 * length**2 * dim
