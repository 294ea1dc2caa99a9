"""Several processes that train one model: who encodes which part of a batch, and how the parts come
together.

Every process draws the same batches and ends every step with the same weights; only the first
writes files. What is exchanged are embeddings and gradients, so that the loss is that of the whole
batch with all its negatives. Dropout draws by sample (`apecache.encoders.sample_draws`): any number
of processes trains the weights of one, up to rounding.
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
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shares(self, n: int) -> list[range]:
        """Positions of n items that each process works on, in order, as even as can be.

        Raises:
            OptionError: fewer items than processes.
        """
        if n < self.size:
            raise OptionError(
                f"{n} items for {self.size} processes; raise schedule.batch_size or start "
                "fewer of them"
            )
        ends = [n * i // self.size for i in range(self.size + 1)]
        return [range(begin, end) for begin, end in pairwise(ends)]

    def gathered(self, own: Tensor, begin: int, n: int) -> Tensor:
        """Rows of all processes, [n, …]; this one's `own` stand from `begin` on. No gradient goes
        back."""
        if self.size == 1:
            return own.detach()
        whole = torch.zeros((n, *own.shape[1:]), dtype=own.dtype, device=own.device)
        whole[begin : begin + len(own)] = own.detach()
        dist.all_reduce(whole)
        return whole

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over processes in the place of each tensor; the same ones, in the same order,
        in all of them."""
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, total in zip(
            tensors,
            together.split([t.numel() for t in tensors]),
            strict=True,
        ):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, NCCL on CUDA and gloo else; without it this one alone. A
    group that exists is used and left as it is."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    elif n_processes() == 1:
        yield ALONE
    else:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
        finally:
            dist.destroy_process_group()


def n_processes() -> int:
    """That torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str) -> str:
    """`auto` and `cuda` under torchrun: each process has the GPU of its number on this machine."""
    local = os.environ.get("LOCAL_RANK")
    if (
        local is None
        or n_processes() == 1
        or name not in ("auto", "cuda")
        or not torch.cuda.is_available()
    ):
        return name
    return f"cuda:{int(local)}"
