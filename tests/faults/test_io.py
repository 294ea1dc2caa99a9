"""A failing disk: an error that says what to do, what was committed stands, and the next run goes
on."""

from pathlib import Path

import pytest

from benchmarks.reliability.injection.io_errors import failing_calls
from benchmarks.reliability.injection.syscalls import CHANGING
from benchmarks.reliability.injection.tower import EDITED, SMALL, TowerSpec

CALLS_OF_EXTRACTION = set(CHANGING) - {"rmdir"}
"""Calls of an extraction or an edit: they remove no folder."""


def test_any_failing_call_ends_in_one_clear_error_and_the_next_run_completes(
    tmp_path: Path,
    long_run: bool,
) -> None:
    result = failing_calls(tmp_path, TowerSpec() if long_run else SMALL, every=long_run)
    assert result.wrong == []
    assert set(result.failed) == CALLS_OF_EXTRACTION
    assert result.failed.total() > 300


@pytest.mark.slow
def test_any_failing_call_of_an_edit_ends_in_one_clear_error_too(tmp_path: Path) -> None:
    result = failing_calls(tmp_path, EDITED)
    assert result.wrong == []
    assert set(result.failed) == CALLS_OF_EXTRACTION
