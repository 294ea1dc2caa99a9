"""Power cuts: what was acknowledged is there, what is there is whole, and no fsync is there for
nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from apecache.storage import local_files
from benchmarks.reliability.injection.power import (
    cut_anywhere,
    cut_removal,
    finds_violation,
    kill_then_cut,
    sync_calls,
    without_sync,
)
from benchmarks.reliability.injection.tower import EDITED, SMALL, TowerSpec

TINY = TowerSpec(images=5)
"""2 + 2 shards."""


def test_a_power_cut_at_any_call_loses_nothing_that_was_acknowledged(
    tmp_path: Path,
    long_run: bool,
) -> None:
    result = cut_anywhere(tmp_path, TowerSpec(), resumes=-1 if long_run else 120)
    assert result.wrong == []
    assert result.cuts > 600
    assert result.states > 2 * result.cuts


def test_a_power_cut_after_a_kill_and_a_resume_loses_nothing(
    tmp_path: Path,
    long_run: bool,
) -> None:
    result = kill_then_cut(tmp_path, TowerSpec() if long_run else TINY)
    assert result.wrong == []
    assert result.resumed > 100


@pytest.mark.slow
def test_a_power_cut_at_any_call_of_an_edit_loses_nothing(tmp_path: Path, long_run: bool) -> None:
    result = cut_anywhere(tmp_path, EDITED, resumes=-1 if long_run else 60)
    assert result.wrong == []


@pytest.mark.slow
def test_a_power_cut_after_a_kill_of_an_edit_loses_nothing(tmp_path: Path) -> None:
    assert kill_then_cut(tmp_path, replace(EDITED, images=5)).wrong == []


@pytest.mark.parametrize("number", range(len(sync_calls())), ids=sync_calls())
def test_no_fsync_can_be_left_out(tmp_path: Path, number: int) -> None:
    """Each in turn is: then some state breaks a promise."""
    assert finds_violation(tmp_path, SMALL, without_sync(number))


def test_every_fsync_of_the_store_is_among_those_tried() -> None:
    source = Path(local_files.__file__).read_text(encoding="utf-8")
    assert len(sync_calls()) == source.count("os.fsync(") + source.count("self._sync_folder(") >= 7


def test_what_was_removed_does_not_come_back(tmp_path: Path) -> None:
    assert cut_removal(tmp_path, SMALL).wrong == []
