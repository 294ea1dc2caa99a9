"""Stores of made-up pairs, made once; for tests that only read them."""

from typing import Any

import pytest
from planted_pairs import Planted, write_planted


@pytest.fixture(scope="package")
def planted(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """One caption in ten is of another image."""
    return write_planted(write_store, tmp_path_factory.mktemp("planted") / "s", 0.1)


@pytest.fixture(scope="package")
def clean(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """All captions are right; a second encoder stands beside the first."""
    return write_planted(write_store, tmp_path_factory.mktemp("clean") / "s", 0.0, encoders=2)
