"""A tape of torch's operations with the rules of a CUDA graph.

Nothing takes effect while it records. A replay runs the same operations on the same memory with the
same numbers, and asking a tensor for its value is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(name in func.__name__ for name in WAITING):
            raise RuntimeError(f"{func}: not permitted while recording")
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                self._keep(tensor)
        out = func(*args, **kwargs)
        self.own |= {
            _memory(t)
            for t in _tensors(out)
            if _memory(t) not in {_memory(a) for a in _tensors(args)}
        }
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, tensor: Tensor) -> None:
        if _memory(tensor) not in self.before and _memory(tensor) not in self.own:
            self.before[_memory(tensor)] = (tensor, _flat(tensor).clone())

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for made, kept in zip(_tensors(found), _tensors(out), strict=True):
                if _memory(made) != _memory(kept):
                    kept.copy_(made)

    def undo(self) -> None:
        for tensor, value in self.before.values():
            _flat(tensor).copy_(value)


def _flat(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is part of."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor.detach(), (size,), (1,), 0)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class Records:
    """How many steps were recorded, and how often they were replayed."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tape = Tape()
        # A device that records draws no numbers.
        random_state = torch.get_rng_state()
        with torch.no_grad():
            with tape:
                out = run()
            tape.undo()
        torch.set_rng_state(random_state)
        self.made += 1

        def replay() -> Tensor:
            self.replayed += 1
            with torch.no_grad():
                tape.replay()
            return out

        return replay
