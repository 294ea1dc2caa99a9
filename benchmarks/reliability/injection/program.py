"""Run modules of this package as programs of their own, from any working folder."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
"""The folder that has the package `benchmarks`."""


def program_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package."""
    return [sys.executable, "-m", f"{__package__}.{module}", *arguments]


def program_environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds the package `benchmarks` too."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
