"""Time, kernels and waits of an action on any device."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from apecache.device import is_accelerator, synchronize

Action = Callable[[], object]


def median_seconds(action: Action, device: torch.device, repeats: int = 5, warm: int = 2) -> float:
    """Return the median seconds of an action, from an idle device to an idle device."""
    for _ in range(warm):
        action()
    synchronize(device)
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def kernel_counts(action: Action, device: torch.device, n_steps: int) -> dict[str, float]:
    """Return kernels a step and milliseconds a step in which kernels ran; empty without CUDA."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        action()
        synchronize(device)
    events = [event for event in profiled.events() if str(event.device_type).endswith("CUDA")]
    busy_microseconds = sum(event.time_range.elapsed_us() for event in events)
    return {
        "kernels a step": round(len(events) / n_steps, 1),
        "kernel ms a step": round(busy_microseconds / n_steps / 1000, 4),
    }


def waits_per_step(action: Action, device: torch.device, n_steps: int) -> float | None:
    """Count the calls of a step that wait for the device, as torch warns of them.

    Returns:
        None without CUDA: no other device warns.
    """
    if device.type != "cuda":
        action()
        return None
    synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    n_waits = sum("synchroniz" in str(warning.message).lower() for warning in caught)
    return round(n_waits / n_steps, 2)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's precision of float32 products for a while: `highest`, or `high` for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Check whether the device can have TF32: an accelerator other than a pretended one."""
    return is_accelerator(device) and device.type == "cuda"
