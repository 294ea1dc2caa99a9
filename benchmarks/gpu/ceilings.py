"""What the card itself reaches: products, copies, launches."""

from functools import partial

import torch

from apecache.device import device_name, is_accelerator
from benchmarks.gpu.clocks import has_tf32, matmul_precision, median_seconds
from benchmarks.gpu.parts import PartContext

N_LAUNCHES = 2000
GEMM_KINDS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
}


def measure(context: PartContext) -> None:
    """Measure the rates that all goals are compared with."""
    device = context.device
    context.add("card", name=device_name(device), torch=torch.__version__)
    for precision in GEMM_KINDS:
        if precision != "tf32" or has_tf32(device):
            context.add("gemm", precision=precision, **_gemm(context, precision))
    _copies(context)
    if is_accelerator(device) and hasattr(torch.get_device_module(device), "CUDAGraph"):
        _launches(context)


def _gemm(context: PartContext, precision: str) -> dict[str, float]:
    n = context.size(8192, 256)
    dtype, name = GEMM_KINDS[precision]
    left = torch.randn(n, n, device=context.device, dtype=dtype)
    right = torch.randn(n, n, device=context.device, dtype=dtype)
    with matmul_precision(name):
        seconds = median_seconds(lambda: left @ right, context.device)
    return {"n": n, "TFLOP/s": round(2 * n**3 / seconds / 1e12, 3)}


def _copies(context: PartContext) -> None:
    device = context.device
    n_numbers = context.size(2**28, 2**20)
    source = torch.zeros(n_numbers, device=device)
    destination = torch.empty_like(source)
    seconds = median_seconds(lambda: destination.copy_(source), device)
    context.add("copy on the device", **{"GB/s": round(8 * n_numbers / seconds / 1e9, 1)})
    if not is_accelerator(device):
        return
    for pinned in (True, False):
        host = torch.zeros(n_numbers // 4, pin_memory=pinned)
        there = destination[: n_numbers // 4]
        to_device = median_seconds(partial(there.copy_, host, non_blocking=pinned), device)
        to_host = median_seconds(partial(host.copy_, there, non_blocking=pinned), device)
        context.add(
            "copy between host and device",
            pinned=pinned,
            to_device_gb_s=round(n_numbers / to_device / 1e9, 2),
            to_host_gb_s=round(n_numbers / to_host / 1e9, 2),
        )


def _launches(context: PartContext) -> None:
    """Compare a launch by the host with a node of a recorded graph."""
    device = context.device
    small = torch.zeros(64, device=device)

    def launch_all() -> None:
        for _ in range(N_LAUNCHES):
            small.add_(1)

    eager = median_seconds(launch_all, device, repeats=3, warm=1)
    module = torch.get_device_module(device)
    graph = module.CUDAGraph()
    with module.graph(graph):
        launch_all()
    replayed = median_seconds(graph.replay, device, repeats=3, warm=1)
    context.add(
        "launch",
        eager_microseconds=round(1e6 * eager / N_LAUNCHES, 2),
        graph_microseconds=round(1e6 * replayed / N_LAUNCHES, 2),
    )
