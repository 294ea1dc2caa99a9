"""Counts: small enough for every change, or (APECACHE_FAULTS=long) those of the promises in the
documentation."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.reliability.injection.tower import Towers


@pytest.fixture(scope="session")
def long_run() -> bool:
    return os.environ.get("APECACHE_FAULTS") == "long"


@pytest.fixture(scope="session")
def towers() -> "Iterator[Towers]":
    from benchmarks.reliability.injection.tower import Towers

    with Towers() as running:
        yield running
