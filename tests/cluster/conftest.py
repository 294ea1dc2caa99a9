"""One Ray cluster of three simulated nodes for all tests here; they skip without Ray."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

if TYPE_CHECKING:
    from benchmarks.reliability.injection.cluster import Nodes


@pytest.fixture(scope="session")
def nodes() -> "Iterator[Nodes]":
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'apecache[ray]'")
    from benchmarks.reliability.injection.cluster import Nodes

    try:
        running = Nodes([SUPPORT])
    except Exception as error:  # whatever a machine lacks: ports, memory, half a minute
        pytest.skip(f"no Ray cluster starts on this machine ({type(error).__name__}: {error})")
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def long_run() -> bool:
    return os.environ.get("APECACHE_FAULTS") == "long"
