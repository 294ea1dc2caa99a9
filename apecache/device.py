"""Call what torch has for each accelerator, by a device instead of by the name CUDA.

An accelerator computes beside the host, in memory of its own. The CPU does not, so each function
does nothing there, or returns what says so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from apecache.errors import OptionError

CPU = torch.device("cpu")
# Apple's GPU shares the host's memory, and torch has other functions for it.
_WITHOUT_ACCELERATOR = ("cpu", "meta", "mps")


def resolve_device(name: str) -> torch.device:
    """Return the device of a name, with its index: `cuda` is `cuda:0`, as tensors on it say.

    Args:
        name: `auto`, which is CUDA if there is any, else the CPU, or a name as torch takes it.

    Raises:
        OptionError: the device cannot be used.
    """
    torch_name = name
    if name == "auto":
        torch_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # torch.device accepts devices that do not exist. Only an allocation finds out.
        return torch.empty(1, device=torch_name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {name!r} cannot be used ({reason}); try --device auto or cpu"
        ) from None


def is_accelerator(device: torch.device) -> bool:
    """Check whether a device computes beside the host, in memory of its own."""
    return device.type not in _WITHOUT_ACCELERATOR


def device_name(device: torch.device) -> str | None:
    """Return the name of an accelerator's hardware; None for other devices."""
    if not is_accelerator(device):
        return None
    return str(torch.get_device_module(device).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed all that was started. Read clocks only after this."""
    if is_accelerator(device):
        torch.get_device_module(device).synchronize(device)


def timed_seconds(
    run: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time one call in seconds, from an idle device until the device has finished its work."""
    synchronize(device)
    begin = clock()
    run()
    synchronize(device)
    return clock() - begin


def release_cached_memory(device: torch.device) -> None:
    """Give back the memory that torch's allocator keeps for later."""
    if is_accelerator(device):
        torch.get_device_module(device).empty_cache()


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the free memory of an accelerator; None for other devices."""
    if not is_accelerator(device):
        return None
    free_bytes, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free_bytes)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device without waiting for the device."""
    if not is_accelerator(device):
        return tensor.to(device)
    # From pageable memory the copy would wait until the device has done all that was started.
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Copy a tensor to the host while the device goes on; `read` waits for this copy alone.

    Work that is started after the copy is not waited for, as it would be by `Tensor.cpu`.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._copied: Any = None
        if is_accelerator(tensor.device):
            device_module = torch.get_device_module(tensor.device)
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = device_module.Event()
            self._copied.record(device_module.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Return the copy on the host, once it is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.cpu()


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Let CUDA round the factors of float32 products and convolutions to TF32, or not, for a while.

    Other devices have no TF32, and nothing changes there.
    """
    if device.type != "cuda":
        yield
        return
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


# --- random numbers -------------------------------------------------------------------------------


def generator_states(device: torch.device = CPU) -> list[Tensor]:
    """Return the states of the CPU's generator and, on an accelerator, of the device's."""
    states = [torch.get_rng_state()]
    if is_accelerator(device):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_generator_states(states: list[Tensor], device: torch.device = CPU) -> None:
    """Set what `generator_states` returned."""
    torch.set_rng_state(states[0])
    if is_accelerator(device):
        torch.get_device_module(device).set_rng_state(states[1], device)


def seed_generators(seed: int, device: torch.device = CPU) -> None:
    """Seed the CPU's generator and, on an accelerator, the device's.

    `torch.manual_seed` would seed the generators of all other devices too.
    """
    torch.default_generator.manual_seed(seed)
    if is_accelerator(device):
        fresh = torch.Generator(device).manual_seed(seed)
        torch.get_device_module(device).set_rng_state(fresh.get_state(), device)


@contextmanager
def kept_generators(device: torch.device = CPU) -> Iterator[None]:
    """Restore the generators of the CPU and of the device at the end."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)


@contextmanager
def seeded_generators(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed the generators of the CPU and of the device, and restore them at the end."""
    with kept_generators(device):
        seed_generators(seed, device)
        yield
