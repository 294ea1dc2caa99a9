"""kill -9 of an import: it goes on, and the finished store is the one of an undisturbed import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.reliability.injection.program import program_environment
from benchmarks.reliability.injection.tower import tree_digest

PROGRAM = Path(__file__).parents[1] / "support" / "killed_imports.py"
N_ROWS = 41


def imports(folder: Path, source: Path, count: int, seed: int) -> list[dict[str, int | str]]:
    arguments = [str(folder), str(source), str(count), str(seed)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**program_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kills_of_an_import_lose_nothing(tmp_path: Path, long_run: bool) -> None:
    from apecache.store.import_features import import_features
    from apecache.store.import_spec import ImportSpec

    source = tmp_path / "f.npz"
    generator = np.random.default_rng(0)
    image = generator.standard_normal((N_ROWS, 6)).astype(np.float32)
    image[7, 2] = np.nan
    text = generator.standard_normal((N_ROWS, 5)).astype(np.float32)
    np.savez(source, image=image, text=text)
    spec = ImportSpec(source=source, shard_rows=4, by_row=True, max_bad=0.05)
    import_features(tmp_path / "undisturbed", spec)
    wanted = tree_digest(tmp_path / "undisturbed")
    (tmp_path / "stores").mkdir()
    outcomes = imports(tmp_path / "stores", source, count=100 if long_run else 12, seed=3)
    assert [outcome["digest"] for outcome in outcomes] == [wanted] * len(outcomes)
    assert sum(int(outcome["kills"]) for outcome in outcomes) > len(outcomes)
    # A run that is resumed imports what is missing and nothing else.
    assert any(0 < int(outcome["rows"]) < 2 * N_ROWS for outcome in outcomes)
