"""A step of training recorded once and replayed as one launch: for small heads the host is slower
than the device.

Recording bakes in every shape, every place in memory and every number of the host. So what changes
from step to step, batches and learning rates, lies in tensors that stay where they are and are
written before each replay; random numbers, which come from states that the host sets, and losses
that depend on what is in a batch cannot be recorded.

Not measured on a GPU: the tests replay a record of the same operations on the CPU, which has the
same rules.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes what is to be recorded, without letting it take effect; gives what replays it and returns
what it returned."""


def recorder_of(device: torch.device) -> Recorder | None:
    """None where steps run one operation at a time."""
    return record_cuda_graph if device.type == "cuda" else None


def record_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class StepGraph:
    """`run` of `inputs`, which are copied to places of its own before each replay. Shapes stay the
    same."""

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],
        inputs: Sequence[Tensor],
        record: Recorder,
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self._replay = record(lambda: run(self.inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """What `run` returns, in memory that the next call leaves alone."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        return self._replay().clone()


def try_to_record(
    run: Callable[[Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    record: Recorder,
) -> StepGraph | None:
    """None, with a warning, where the device refuses: nothing has taken effect then."""
    try:
        return StepGraph(run, inputs, record)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"training steps are not recorded, and go on one operation at a time: {reason}",
            stacklevel=2,
        )
        return None
