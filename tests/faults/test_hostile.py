import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.injection.hostile import hostile_files

LONG = os.environ.get("APECACHE_FAULTS") == "long"


def test_a_few_hostile_files_of_every_kind_are_refused_or_read(tmp_path: Path) -> None:
    outcome = hostile_files(tmp_path, count=60, seed=11)
    assert outcome.wrong == []
    assert len(outcome.tried) >= 4
    assert outcome.refused.total() > 10


@pytest.mark.slow
def test_files_that_somebody_wrote_to_do_harm_give_errors_of_ours_and_run_nothing(
    tmp_path: Path,
) -> None:
    outcome = hostile_files(tmp_path, count=5000 if LONG else 500, seed=7)
    assert outcome.wrong == []
    assert min(outcome.tried.values()) > 80, outcome.tried
    assert min(outcome.refused.values()) > 20, outcome.refused


@pytest.mark.parametrize(
    "deed",
    [
        "eval('1 + 1')",
        "import wave",
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "open('/etc/hostname')",
        "pickle.loads(pickle.dumps(random.Random))",
        "os.system('true')",
    ],
)
def test_the_watch_sees_what_must_not_happen(tmp_path: Path, deed: str) -> None:
    code = f"""
import contextlib, os, pickle, random, socket
from pathlib import Path
from benchmarks.reliability.injection.hostile import watch
seen = []
arm = watch(Path({str(tmp_path)!r}), seen)
arm(True)
with contextlib.suppress(OSError):
    {deed}
arm(False)
print(len(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) > 0, done.stderr
