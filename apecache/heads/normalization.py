"""Normalize vectors and compute similarities in at least float32, under any autocast.

In bfloat16 the norm of a normalized vector is off by up to 0.003, and temperatures of 0.01 multiply
that by 100. On CUDA autocast keeps norms in float32. On a CPU it does not.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Divide by the L2 norm along `dim`; float64 stays float64, all others become float32."""
    # Raised first: the norm of half precision would be computed in half precision.
    return F.normalize(at_least_float32(x), dim=dim)


def similarities(x: Tensor, y: Tensor) -> Tensor:
    """Multiply x [n, dim] with y [m, dim] -> [n, m], in float32 (or float64) under any autocast."""
    with without_autocast(x):
        return at_least_float32(x) @ at_least_float32(y).T


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off on the device of `x`.

    Where it is off, no context is entered, so that exported graphs hold none.
    """
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
