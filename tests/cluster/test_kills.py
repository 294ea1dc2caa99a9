"""kill -9 of actors, nodes and drivers: no row lost or twice, and the finished store is
bit-identical."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.reliability.injection.tower import TowerSpec

if TYPE_CHECKING:
    from benchmarks.reliability.injection.cluster import Nodes


@pytest.mark.parametrize(
    "kind",
    [
        "actor",
        pytest.param("node", marks=pytest.mark.slow),
        pytest.param("driver", marks=pytest.mark.slow),
    ],
)
def test_kills_on_a_cluster_lose_nothing(
    nodes: "Nodes",
    tmp_path: Path,
    long_run: bool,
    kind: str,
) -> None:
    from benchmarks.reliability.injection.cluster import cluster_kills

    count = 20 if long_run else 1
    result = cluster_kills(nodes, folder=tmp_path, spec=TowerSpec(), kind=kind, count=count, seed=5)
    assert result.wrong == []
    assert result.kills == count
