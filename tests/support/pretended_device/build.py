"""Build the pretended device once for this torch, with a C++ compiler."""

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent


def missing_tools() -> str | None:
    """Return why the device cannot be built here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "the pretended device is built on Linux alone"
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            return f"the pretended device needs {tool} to be built"
    return None


def load_extension() -> ModuleType:
    """Build the extension where torch keeps extensions, if need be, and load it (minutes once)."""
    from torch.utils.cpp_extension import load

    version = torch.__version__.replace(".", "_").replace("+", "_")
    extension: ModuleType = load(
        name=f"pretended_device_{version}",
        sources=[str(HERE / "device.cpp")],
        extra_cflags=["-O1", "-std=c++20", "-w"],
        with_cuda=False,
    )
    return extension


if __name__ == "__main__":
    load_extension()
