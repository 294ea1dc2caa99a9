"""Export modules as ONNX graphs; the extra `onnx` installs what this needs."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apecache.errors import MissingExtraError, RunError

OPSET = 18
GraphDtype = Literal["float32", "float16", "int8"]
GRAPH_SUFFIXES: dict[GraphDtype, str] = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
"""Ends of the names of files, as transformers.js asks for them by its `dtype`."""


def export_graph(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_name: str,
    dynamic_axes: Sequence[Sequence[int]],
    path: Path,
) -> None:
    """Write one graph of opset 18.

    Args:
        module: in evaluation mode, on the CPU.
        inputs: one batch; sizes above 1, which the exporter would take for constants.
        input_names: one for each input.
        output_name: of the module's only output.
        dynamic_axes: for each input the axes whose size is free.
        path: of the file.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(axes, dynamic) for axes in dynamic_axes)
    with quiet_exporter():
        program: Any = torch.onnx.export(
            module,
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=[output_name],
            dynamic_shapes=shapes,
            verbose=False,
        )
        # One file, which can be moved and uploaded alone.
        program.save(str(path), external_data=False)


def quantize_graph(path: Path, out: Path, dtype: GraphDtype) -> None:
    """Write a graph with its weights in float16 or int8; inputs and outputs stay float32.

    int8 is dynamic: weights are stored in 8 bits, activations are quantized as they come. Only
    matrix products are quantized: 8-bit convolutions are slow, and some runtimes lack them.
    """
    with quiet_exporter():
        if dtype == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                path,
                out,
                weight_type=QuantType.QInt8,
                # A scale for each output channel: one for a whole matrix would be coarser.
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
                # Only products with weights: attention multiplies two activations.
                extra_options={"MatMulConstBOnly": True},
            )
            return
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        graph = convert_float_to_float16(onnx.load(path), keep_io_types=True)
        onnx.save(graph, out)


def require_loadable(path: Path, dtype: GraphDtype) -> None:
    """Refuse a converted graph that onnxruntime cannot open.

    It is opened by another process: some graphs in float16 end the process that opens them
    (onnxruntime 1.32).

    Raises:
        RunError: onnxruntime cannot open the graph.
    """
    code = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it ended with code {result.returncode}"
        raise RunError(
            f"onnxruntime cannot open {path.name} in {dtype} ({reason[:120]}); export with "
            "--dtype float32"
        )


def require_onnx(runs: bool = False) -> None:
    """Refuse to start without the packages, so that no half export is left.

    Args:
        runs: the graph is run too.
    """
    modules = ("onnx", "onnxscript", "onnxruntime") if runs else ("onnx", "onnxscript")
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "onnx") from None


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter, which warns about its own internals and optional packages."""
    names = ("torch.onnx", "onnxruntime", "onnxruntime.transformers.float16", "")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
