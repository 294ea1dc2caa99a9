"""Views are removed and the store is compacted, disturbed at any moment: no view that stays is lost."""

from pathlib import Path

import pytest

from benchmarks.reliability.injection.removals import (
    removal_cuts,
    removal_errors,
    removal_kills,
)
from benchmarks.reliability.injection.tower import Towers


def test_kills_lose_no_view(towers: Towers, tmp_path: Path, long_run: bool) -> None:
    result = removal_kills(towers, tmp_path, count=200 if long_run else 9, seed=1)
    assert result.wrong == []
    assert result.faults >= 9


def test_power_cuts_lose_no_view(tmp_path: Path, long_run: bool) -> None:
    result = removal_cuts(tmp_path, resumes=250 if long_run else 12, seed=1)
    assert result.wrong == []
    assert result.cuts > 500
    assert result.resumed >= 12


@pytest.mark.slow
def test_failing_calls_lose_no_view(tmp_path: Path, long_run: bool) -> None:
    result = removal_errors(tmp_path, step=5 if long_run else 40)
    assert result.wrong == []
    assert result.faults > 10
