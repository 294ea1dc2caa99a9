"""Object storage that fails: answers of 5xx, resets, time-outs, lost answers; and writers that are
killed."""

from pathlib import Path

import pytest
from faults_remote import faulty_removals, faulty_runs, killed_runs
from remote import KINDS, S3Server

from benchmarks.reliability.injection.tower import SMALL, Towers


def test_two_hundred_faults_lose_nothing_and_double_nothing(
    bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    long_run: bool,
) -> None:
    monkeypatch.setenv("APECACHE_REQUEST_SECONDS", "0.3")
    result = faulty_runs(
        s3_server,
        folder=tmp_path,
        spec=SMALL,
        faults=2_000 if long_run else 200,
        share=0.1,
        seed=5,
    )
    assert result.wrong == []
    assert set(result.faults) == set(KINDS)
    assert min(result.faults.values()) >= 10


def test_faults_while_views_are_removed_lose_no_view(
    bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    long_run: bool,
) -> None:
    monkeypatch.setenv("APECACHE_REQUEST_SECONDS", "0.3")
    result = faulty_removals(
        s3_server,
        folder=tmp_path,
        rounds=60 if long_run else 2,
        share=0.1,
        seed=7,
    )
    assert result.wrong == []
    assert result.faults.total() > 20


def test_of_two_writing_processes_one_is_killed(
    bucket: str,
    s3_server: S3Server,
    towers: Towers,
    tmp_path: Path,
    long_run: bool,
) -> None:
    result = killed_runs(
        towers,
        server=s3_server,
        folder=tmp_path,
        spec=SMALL,
        kills=50 if long_run else 5,
        seed=1,
    )
    assert result.wrong == []
    assert result.killed > 0
