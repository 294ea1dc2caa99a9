"""List what devices can compute, from vendors' data sheets, and measure this machine."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from apecache.device import resolve_device, timed_seconds
from apecache.errors import OptionError, nearest


@dataclass(frozen=True, kw_only=True)
class Device:
    """Hold the rate and the memory of a device."""

    name: str
    flops: float
    """Floating-point operations a second."""
    memory_bytes: int | None
    """None: not known."""
    source: str
    """Where `flops` comes from: a data sheet, or a measurement."""


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
    """Return a device of the table, or for `here` measure this machine (about a second).

    Raises:
        OptionError: another name; the message lists the names of the table.
    """
    if name == "here":
        return measure_device()
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    names = ", ".join(device.name for device in DEVICES)
    raise OptionError(
        f"no device {name!r}; there are here, {names}{nearest(name, names.split(', '))}"
    )


def measure_device(dim: int = 384, length: int = 128, n: int = 4, seconds: float = 1.0) -> Device:
    """Measure the rate that one Transformer block reaches on this machine, which is not a peak.

    Forward and backward passes run in float32, on CUDA under bfloat16 autocast.

    Args:
        dim: width of the block.
        length: tokens of a sequence.
        n: sequences in a batch.
        seconds: how long to run.
    """
    device = resolve_device("auto")
    on_cuda = device.type == "cuda"
    block = nn.TransformerEncoderLayer(
        dim,
        nhead=dim // 64,
        dim_feedforward=4 * dim,
        dropout=0.0,
        batch_first=True,
    )
    block = block.to(device)
    tokens = torch.randn(n, length, dim, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
        # The first step allocates memory and picks kernels: it is not timed.
        step = partial(_step, block, tokens)
        step()
        elapsed = 0.0
        n_steps = 0
        while elapsed < seconds:
            elapsed += timed_seconds(step, device)
            n_steps += 1
    memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else None
    # A backward pass takes twice the operations of the forward pass.
    return Device(
        name="here",
        flops=n_steps * 3 * n * block_flops(dim, length) / elapsed,
        memory_bytes=memory,
        source=f"measured on this {device.type}",
    )


def _step(block: nn.Module, tokens: torch.Tensor) -> None:
    block(tokens).sum().backward()


def block_flops(dim: int, length: int, expansion: int = 4) -> int:
    """Count the forward operations of one Transformer block on one sequence.

    A multiplication and an addition are two operations. Counted are the query, key, value and
    output projections, the scores and their weighted sum, and the two layers of the MLP.
    """
    projections_and_mlp = 2 * length * (4 + 2 * expansion) * dim**2
    attention = 4 * length**2 * dim
    return projections_and_mlp + attention
