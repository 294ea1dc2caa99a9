"""The committed figures of other programs are ours, and the script that measures them runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "quality-suites.json"


@pytest.mark.slow
def test_the_script_runs_without_data(tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    pytest.importorskip("webdataset")
    command = ["-m", "benchmarks.quality.suites", "--quick", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert all(goal["met"] for goal in result["goals"]), done.stdout


def test_no_committed_figure_differs_from_ours_and_every_source_is_named() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    (mean,) = [row for row in result["rows"] if "missing tasks" in row]
    assert mean["data set"] == f"mean of {38 - len(mean['missing tasks'])} of 38 tasks"
    rows = [row for row in result["rows"] if row is not mean]
    assert {"clip-benchmark", "datacomp-38"} <= {row["program"] for row in rows}
    assert not [row for row in rows if row["hits that differ"]]
    # None of the data sets is the published one.
    assert all(row["source"] for row in rows)
