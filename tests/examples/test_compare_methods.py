"""The example that compares methods runs as its page says, and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "compare_methods.py"
DRAWINGS = ROOT / "examples" / "drawings" / "pairs.tsv"

pytestmark = pytest.mark.slow


def run(out: Path, image: Path, text: Path) -> str:
    command = [sys.executable, str(SCRIPT), str(DRAWINGS), "--out", str(out)]
    command += ["--image", f"timm:{image}", "--text", f"hf:{text}", "--seeds", "2"]
    # For the methods that train: the closed form stays one fit without steps.
    command += ["--set", "schedule.epochs=2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_prints_a_row_for_each_method_and_resumes(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    out = tmp_path / "comparison"
    printed = run(out, tiny_image_encoder, tiny_text_encoder)
    methods = [line.split(" | ")[1] for line in printed.splitlines()[2:]]
    assert methods == ["closed form", "linear", "two layers", "margin loss"]
    assert (out / "comparison.md").read_text("utf-8") == printed
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("head.safetensors")}
    assert len(weights) == 1 + 3 * 2
    # Nothing is fitted twice, and what is missing is fitted.
    (next(out.glob("*-linear-1")) / "head.json").unlink()
    assert len(run(out, tiny_image_encoder, tiny_text_encoder).splitlines()) == 6
    changed = [path for path in weights if path.stat().st_mtime_ns != weights[path]]
    assert [path.parent.name.endswith("-linear-1") for path in changed] == [True]
