"""Four processes at one store: one record per shard, and the bytes of a single writer."""

from pathlib import Path

from benchmarks.reliability.injection.tower import SMALL, Towers, TowerSpec
from benchmarks.reliability.injection.writers import crowded_rounds


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
