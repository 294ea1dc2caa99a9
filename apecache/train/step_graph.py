"""A step of training recorded once and replayed as one launch.

For small heads the host is slower than the device. A record fixes every shape, every address and
every number of the host. What changes from step to step, batches and learning rates, is in tensors
that keep their addresses and are written before each replay. Two things cannot be recorded: random
numbers of which the host sets the state in each step, and losses that depend on the content of a
batch. torch's own generator of a device is moved on by each replay.

Not measured on a GPU: the tests replay a record of the same operations on the CPU, under the same
rules.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apecache.device import is_accelerator

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Records a function without effect on its tensors. Returns a function that replays it and returns
the recorded tensor."""


def recorder_of(device: torch.device) -> Recorder | None:
    """Return the recorder of a device; None where steps run one operation at a time."""
    if not is_accelerator(device):
        return None
    device_module = torch.get_device_module(device)
    return partial(record_graph, device_module) if hasattr(device_module, "CUDAGraph") else None


def record_graph(device_module: Any, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a function as a graph of the device: a `Recorder`.

    Args:
        device_module: `torch.cuda`, or a module of another device with the same graphs.
        run: The function.
    """
    graph = device_module.CUDAGraph()
    # By default an unsafe call to the device by any other thread would break the record.
    with device_module.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class StepGraph:
    """Replay `run` for other inputs of the same shapes.

    Args:
        run: The function to record. Whatever changes between calls must be in tensors that keep
            their addresses.
        inputs: The inputs to record with; they are copied.
        record: The recorder of the device.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],
        inputs: Sequence[Tensor],
        record: Recorder,
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self._replay = try_to_record(lambda: run(self.inputs), record)

    @property
    def is_recorded(self) -> bool:
        """Return whether the device has recorded the step."""
        return self._replay is not None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return what `run` returns for these inputs."""
        for recorded, current in zip(self.inputs, inputs, strict=True):
            recorded.copy_(current)
        assert self._replay is not None
        # A copy: the next replay writes its result to the same memory.
        return self._replay().clone()


def try_to_record(run: Callable[[], Tensor], record: Recorder) -> Callable[[], Tensor] | None:
    """Record a step; return what replays it, or None, with a warning, where the device refuses.

    A step that could not be recorded has had no effect.
    """
    try:
        return record(run)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"training steps are not recorded, and go on one operation at a time: {reason}",
            stacklevel=2,
        )
        return None
