"""The catalogue example: new products, one removed, a title corrected, retrained."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "catalogue.py"
DRAWINGS = ROOT / "examples" / "drawings"

pytestmark = pytest.mark.slow


def rows_of_table(folder: Path, count: int) -> list[list[str]]:
    """Copy so many drawings with different captions; return (name, caption) of each."""
    with (DRAWINGS / "pairs.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    by_caption = {row["caption"]: row["image"] for row in rows}
    rows = []
    for caption, path in list(by_caption.items())[:count]:
        name = f"{len(rows)}.jpg"
        shutil.copy(DRAWINGS / path, folder / name)
        rows.append([name, caption])
    return rows


def run(folder: Path, rows: list[list[str]], encoders: list[str], *options: str) -> list[str]:
    with (folder / "products.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    command = [sys.executable, str(SCRIPT), str(folder / "products.csv")]
    command += ["--out", str(folder / "catalogue"), *encoders, *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_is_new_is_encoded(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    encoders = ["--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}"]
    rows = rows_of_table(tmp_path, 130)
    first = run(tmp_path, rows[:120], encoders, "--query", "a cat")
    assert first[:2] == ["image: 120 encoded", "text: 120 encoded"]
    assert first[3] == "index: 120 photos, 120 titles"
    assert len(first) == 4 + 5
    # Next week: ten new products, one removed, the title of another corrected.
    edited = [*rows[1:5], [rows[5][0], "a corrected title"], *rows[6:130]]
    second = run(tmp_path, edited, encoders)
    assert second[:2] == ["image: 10 encoded", "text: 11 encoded"]
    assert second[2] == "index: 21 rows added, 3 removed"
    # Next month: the heads are fitted on all of them, and nothing is encoded.
    third = run(tmp_path, edited, encoders, "--retrain")
    assert third[:2] == ["image: 0 encoded", "text: 0 encoded"]
    assert third[3] == "index: 129 photos, 129 titles"
