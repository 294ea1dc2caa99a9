"""A pytest plugin that rounds matrix products and convolutions as another processor might.

Kernels are chosen by shape: on one machine a batch of 7 and a batch of 8 give the same bits, on the
next they do not. This plugin makes every shape round in its own way, so that a test which relies on
bit-equality between two batch sizes fails on every machine:

    python -m pytest -p other_kernels

Equal shapes still give equal bits, which is all that apecache promises. `torch.export` and
`torch.compile` do not run under the plugin, and Ray's actors do not load it: tests of ONNX graphs,
of compiled encoders and of actors against the local engine fail with it for that reason alone.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
    # Seen whole in inference mode, where composite operations are not taken apart.
    torch.ops.aten.linear,
    torch.ops.aten.matmul,
    torch.ops.aten.conv2d,
)
DTYPES = (torch.float32, torch.float64)


@cache
def rounding_of(
    shapes: tuple[tuple[int, ...], ...],
    out_shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Return factors of 1 plus -1, 0 or 1 unit in the last place, a pure function of the shapes."""
    generator = torch.Generator().manual_seed(hash((shapes, out_shape)) % 2**31)
    units = torch.randint(-1, 2, out_shape, generator=generator).to(dtype)
    return 1 + units * torch.finfo(dtype).eps


class OtherKernels(TorchDispatchMode):
    """Multiply the result of every matrix product by factors that depend on its shapes alone."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        product = func(*args, **(kwargs or {}))
        if func.overloadpacket not in PRODUCTS or not _is_rounded(product):
            return product
        shapes = tuple(tuple(value.shape) for value in args if isinstance(value, Tensor))
        return product * rounding_of(shapes, tuple(product.shape), product.dtype)


def _is_rounded(product: Any) -> bool:
    if not isinstance(product, Tensor) or product.device.type != "cpu":
        return False
    return product.dtype in DTYPES and product.numel() <= 2**22


def pytest_configure(config: Any) -> None:
    mode = OtherKernels()
    mode.__enter__()
    leave: Callable[[], None] = lambda: mode.__exit__(None, None, None)  # noqa: E731
    config.add_cleanup(leave)
