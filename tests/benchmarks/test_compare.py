"""Two checkouts in turns: which figures are compared, and how."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare

ROWS = [
    {"case": "step", "cpu ms per batch": 2.0, "wall ms": 9.0, "rounds": 5},
    {"what": "steps", "members": 4, "solo cpu ms": 3.0, "solo / population": 1.5},
    {"case": "commit, CPU ms", "10 shards": 1.5, "100 shards": 2.5},
    {"case": "commit, wall ms", "10 shards": 7.0},
    {"case": "share of the store, %", "CPU ms/100 MB": 0.1},
]


def test_times_of_the_processor_are_taken_from_all_kinds_of_rows() -> None:
    assert compare.cpu_times(ROWS) == {
        "step, rounds 5: cpu ms per batch": 2.0,
        "steps, members 4: solo cpu ms": 3.0,
        "commit, CPU ms: 10 shards": 1.5,
        "commit, CPU ms: 100 shards": 2.5,
    }


def test_medians_are_compared_and_checkouts_begin_in_turn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base_times = iter([1.0, 5.0, 2.0])
    head_times = iter([3.0, 4.0, 4.0])
    order: list[Path] = []

    def measured(command: str, checkout: Path) -> list[dict[str, Any]]:
        order.append(checkout)
        times = base_times if checkout == tmp_path else head_times
        return [{"case": "step", "cpu ms": next(times)}]

    monkeypatch.setattr(compare, "measured", measured)
    (row,) = compare.compared("speed.fit", tmp_path, turns=3)
    assert (row["before"], row["after"], row["ratio"]) == (2.0, 4.0, 2.0)
    assert order == [tmp_path, compare.HERE, compare.HERE, tmp_path, tmp_path, compare.HERE]
