"""Train one model in several processes, each of which encodes a share of every batch.

Every process draws the same batches and ends every step with the same weights. Only the first one
writes files. Processes exchange embeddings and gradients, so that the loss is that of the whole
batch with all its negatives. Dropout draws by sample (`apecache.encoders.sample_draws`), so any
number of processes trains the same weights, up to rounding.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from apecache.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Identify this process among those that train one model."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def shares(self, n: int) -> list[range]:
        """Cut n positions into a share for each process, in order, as even as possible.

        Raises:
            OptionError: There are fewer items than processes.
        """
        if n < self.size:
            raise OptionError(
                f"{n} items for {self.size} processes; raise schedule.batch_size or start "
                "fewer of them"
            )
        ends = [n * i // self.size for i in range(self.size + 1)]
        return [range(begin, end) for begin, end in pairwise(ends)]

    def gathered(self, own: Tensor, begin: int, n: int) -> Tensor:
        """Gather the rows of all processes, without gradients.

        Args:
            own: Rows of this process, [share, ...].
            begin: Position of its first row.
            n: Rows of all processes.

        Returns:
            [n, ...], the same in every process.
        """
        if self.size == 1:
            return own.detach()
        # A sum with zeros: shares can differ in length, which a gather does not allow.
        all_rows = torch.zeros((n, *own.shape[1:]), dtype=own.dtype, device=own.device)
        all_rows[begin : begin + len(own)] = own.detach()
        dist.all_reduce(all_rows)
        return all_rows

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over processes.

        Every process must pass tensors of the same shapes, in the same order.
        """
        if self.size == 1 or not tensors:
            return
        # One exchange for all: each one costs a round trip.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        totals = flat.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes call this."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()
"""The only process."""


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, by NCCL on CUDA and by gloo elsewhere.

    Without torchrun this process is alone. A group that exists already is used and kept.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    elif n_processes() == 1:
        yield ALONE
    else:
        if device.type == "cuda":
            # NCCL works on the current device of the process.
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
        finally:
            dist.destroy_process_group()


def n_processes() -> int:
    """Count the processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str) -> str:
    """Return the device of this process.

    Under torchrun `auto` and `cuda` are the GPU with the number that the process has on this
    machine.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or n_processes() == 1:
        return name
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(local_rank)}"
