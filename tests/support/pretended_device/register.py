"""Register the pretended device with torch, for this process, as `pretend`.

A pytest plugin as well: `python -m pytest -p pretended_device.register FILE`. It changes torch for
the whole process, so the tests that use it run in a process of their own.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretended_device.build import load_extension

NAME = "pretend"
TOTAL_BYTES = 2**36
SEED_MASK = 2**64 - 1

torch.utils.rename_privateuse1_backend(NAME)
extension = load_extension()
DEVICE = torch.device(NAME, 0)


class Counts:
    """Count what a region does: waits of the host, copies and operations, by name."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.races: list[str] = []

    def __enter__(self) -> "Counts":
        extension.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.counts = dict(extension.counts())
        self.races = list(extension.races())

    @property
    def waits(self) -> dict[str, int]:
        """Waits of the host for the device, by their reason."""
        return {name: n for name, n in self.counts.items() if name.startswith("wait: ")}

    @property
    def n_waits(self) -> int:
        return sum(self.waits.values())


class Properties:
    total_memory = TOTAL_BYTES
    uuid = "0"


# --- graphs: a tape of operations, on which nothing may wait --------------------------------------


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole_storage(tensor: Tensor) -> Tensor:
    n_numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor.detach(), (n_numbers,), (1,), 0)


class Tape(TorchDispatchMode):
    """Record operations, and what their tensors held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made_here: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _tensors((args, kwargs))
        if func._schema.is_mutable:
            for tensor in arguments:
                is_new = _address(tensor) in self.made_here
                if not is_new and _address(tensor) not in self.before:
                    self.before[_address(tensor)] = (tensor, _whole_storage(tensor).clone())
        out = func(*args, **kwargs)
        argument_addresses = {_address(tensor) for tensor in arguments}
        self.made_here |= {_address(tensor) for tensor in _tensors(out)} - argument_addresses
        self.calls.append((func, args, kwargs, out))
        return out


class Graph:
    """Replay a tape."""

    replays = 0

    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        Graph.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.tape.calls:
                computed = func(*args, **kwargs)
                for new, kept in zip(_tensors(computed), _tensors(out), strict=True):
                    if _address(new) != _address(kept):
                        kept.copy_(new)


class Recording:
    """Record a graph, without effect on the tensors that exist."""

    def __init__(self, graph: Graph, capture_error_mode: str = "global") -> None:
        self.graph = graph

    def __enter__(self) -> None:
        extension.wait("a graph begins")
        # A device that records draws no numbers.
        self.random_state = extension.get_state()
        self.graph.tape.__enter__()
        extension.capture(True)

    def __exit__(self, *error: Any) -> None:
        extension.capture(False)
        self.graph.tape.__exit__(*error)
        for tensor, value in self.graph.tape.before.values():
            _whole_storage(tensor).copy_(value)
        extension.set_state(self.random_state)


class Event:
    """Wait as an event of a device does; what is pretended has happened at once."""

    def record(self, stream: Any) -> None:
        assert stream == DEVICE

    def synchronize(self) -> None:
        extension.wait("event")


# --- what torch asks a device's module for --------------------------------------------------------


class DeviceModule(types.ModuleType):
    """Answer as `torch.cuda` does."""

    OutOfMemoryError = torch.OutOfMemoryError
    CUDAGraph = Graph
    Event = Event
    graph = Recording
    total_bytes = TOTAL_BYTES

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def current_stream(self, device: Any) -> torch.device:
        return torch.device(device)

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        extension.seed(seed & SEED_MASK)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        state: Tensor = extension.get_state()
        return state

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        assert state.device.type == "cpu"
        extension.set_state(state)

    def synchronize(self, device: Any = None) -> None:
        extension.wait("synchronize")

    def empty_cache(self) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "pretended device"

    def get_device_properties(self, device: Any = None) -> Properties:
        return Properties()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.total_bytes - extension.used(), self.total_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        extension.reset_peak()

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(extension.peak())

    def memory_allocated(self, device: Any = None) -> int:
        return int(extension.used())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return True


module = DeviceModule(f"torch.{NAME}")
torch._register_device_module(NAME, module)
torch.utils.generate_methods_for_privateuse1_backend()


def limit_memory(n_bytes: int | None) -> None:
    """Let the device have so much memory above what is in use; None: no limit."""
    in_use = extension.used()
    extension.limit(0 if n_bytes is None else in_use + n_bytes)
    module.total_bytes = TOTAL_BYTES if n_bytes is None else in_use + n_bytes


# torch copies tensors of other devices in ways that need more of a device than this one has.
def _copying(original: Callable[..., Any]) -> Callable[..., Any]:
    def deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Any:
        if tensor.device.type != NAME:
            return original(tensor, memo)
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad)
            else:
                memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return deep_copy


for tensor_class in (Tensor, nn.Parameter):
    tensor_class.__deepcopy__ = _copying(tensor_class.__deepcopy__)  # type: ignore[method-assign]


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Return the distance of two tensors over the length of the second, on the CPU."""
    first = one.detach().cpu().double()
    second = other.detach().cpu().double()
    return float((first - second).norm() / second.norm().clamp_min(1e-12))


def largest_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(relative_distance(a, b) for a, b in zip(ours, theirs, strict=True))
