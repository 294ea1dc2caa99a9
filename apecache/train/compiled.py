"""Compile the towers that run in a step of a fit."""

from collections.abc import Callable

import torch
from torch import Tensor

from apecache.encoders.encoder import MAX_COMPILED_SHAPES, vector_width
from apecache.errors import EncoderError, one_line
from apecache.models.dual_encoder import Side
from apecache.models.shared_encoder import SharedSide

Outputs = Callable[..., Tensor]
"""Compute what the loss takes from inputs and a mask, as `Side.outputs` does."""


def require_compiler(device: torch.device) -> None:
    """Compile a sum, so that a missing compiler is reported before anything is read.

    Raises:
        EncoderError: This machine cannot compile for the device.
    """
    try:
        torch.compile(torch.add, options=vector_width())(torch.ones(2, device=device), 1)
    except (RuntimeError, OSError) as error:
        raise EncoderError(
            f"--compile: torch.compile does not work here ({one_line(error)}); install a C++ "
            "compiler, or leave --compile out"
        ) from None


def compiled_outputs(side: Side | SharedSide) -> Outputs:
    """Return the side's `outputs`, compiled at the first batch of each shape.

    Results equal the eager ones up to rounding, dropout masks included: `SampleDraws` hands its
    numbers to the compiled model as tensors. A side whose features are cached stays eager. An
    operation that the compiler does not know runs eagerly between compiled ones.
    """
    if side.tower is None:
        return side.outputs
    # By default the second shape would be compiled for any size, which is slower.
    run = torch.compile(side.outputs, dynamic=False, options=vector_width())

    def outputs(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        # Each length is compiled; without this, torch gives up after eight of them.
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
            computed: Tensor = run(inputs, mask)
        return computed

    return outputs
