"""kill -9: no row lost or twice, no committed shard redone, and the finished store is
bit-identical."""

from pathlib import Path

from benchmarks.reliability.injection.kill import EDIT_POINTS, POINTS, named_kills, random_kills
from benchmarks.reliability.injection.tower import EDITED, Towers, TowerSpec

SPEC = TowerSpec()


def test_a_store_of_the_tests_has_at_least_twenty_shards() -> None:
    assert SPEC.n_shards >= 20


def test_a_kill_at_any_named_point_loses_nothing(towers: Towers, tmp_path: Path) -> None:
    result = named_kills(towers, tmp_path, SPEC)
    assert result.wrong == []
    assert result.kills == len(POINTS)


def test_kills_at_any_moment_lose_nothing(towers: Towers, tmp_path: Path, long_run: bool) -> None:
    result = random_kills(towers, folder=tmp_path, spec=SPEC, count=500 if long_run else 40, seed=1)
    assert result.wrong == []
    assert result.redone > 0


def test_a_kill_at_any_named_point_of_an_edit_loses_nothing(towers: Towers, tmp_path: Path) -> None:
    result = named_kills(towers, tmp_path, EDITED)
    assert result.wrong == []
    assert result.kills == len(POINTS) + len(EDIT_POINTS)


def test_kills_at_any_moment_of_an_edit_lose_nothing(
    towers: Towers,
    tmp_path: Path,
    long_run: bool,
) -> None:
    count = 500 if long_run else 20
    result = random_kills(towers, folder=tmp_path, spec=EDITED, count=count, seed=2)
    assert result.wrong == []
