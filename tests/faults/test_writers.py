"""Four processes at one store: one record per shard, and the bytes of a single writer."""

from pathlib import Path

from benchmarks.reliability.injection.tower import EDITED, SMALL, Towers, TowerSpec
from benchmarks.reliability.injection.writers import crowded_rounds, edited_rounds


def test_writers_at_the_same_time_make_the_store_of_one(
    towers: Towers,
    tmp_path: Path,
    long_run: bool,
) -> None:
    spec = TowerSpec() if long_run else SMALL
    result = crowded_rounds(
        towers,
        folder=tmp_path,
        spec=spec,
        rounds=200 if long_run else 20,
        seed=3,
    )
    assert result.wrong == []
    assert result.commits > spec.n_shards * result.rounds
    assert result.killed > 0


def test_writers_that_edit_the_table_at_the_same_time_make_the_views_of_one(
    towers: Towers,
    tmp_path: Path,
    long_run: bool,
) -> None:
    result = edited_rounds(
        towers,
        folder=tmp_path,
        spec=EDITED,
        rounds=100 if long_run else 6,
        seed=5,
    )
    assert result.wrong == []
    assert result.rounds >= 6
