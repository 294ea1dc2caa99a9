"""The example that trains within the towers runs as its page says, and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_shapes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "towers.py"

pytestmark = pytest.mark.slow


def command(table: Path, out: Path, image: Path, text: Path) -> list[str]:
    words = [sys.executable, str(SCRIPT), str(table), "--out", str(out)]
    return [*words, "--image", f"timm:{image}", "--text", f"hf:{text}"]


def run(table: Path, out: Path, image: Path, text: Path, *options: str) -> list[str]:
    done = subprocess.run(
        [*command(table, out, image, text), *options, "--set", "schedule.epochs=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_compares_towers_with_heads_and_resumes(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    table = make_shapes(tmp_path / "shapes", copies=4)
    out = tmp_path / "towers"
    printed = run(table, out, tiny_image_encoder, tiny_text_encoder)
    # LiT's image tower is frozen and read from the store; LilT's towers both run.
    assert [line.partition(" s, ")[2] for line in printed[:3]] == [
        "nothing encoded again",
        "from the cache: image",
        "from the cache: nothing",
    ]
    rows = [line.split(" | ") for line in printed[5:]]
    assert [row[0] for row in rows] == ["| projection", "| lit", "| lilt-j", "| chance"]
    n_trained = [int(row[1].replace(",", "")) for row in rows[:3]]
    assert min(n_trained) > 0
    assert len(set(n_trained)) == 3
    assert (out / "towers.md").read_text("utf-8").splitlines() == printed[3:]
    # Nothing is fitted twice.
    assert run(table, out, tiny_image_encoder, tiny_text_encoder) == printed[3:]


def test_it_holds_images_out_of_a_table_without_splits(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    import apecache

    table = make_shapes(tmp_path / "shapes", copies=4)
    cells = [line.split("\t") for line in table.read_text("utf-8").splitlines()]
    table.write_text("\n".join("\t".join(row[:2]) for row in cells) + "\n", encoding="utf-8")
    out = tmp_path / "towers"
    refused = subprocess.run(
        command(table, out, tiny_image_encoder, tiny_text_encoder),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "has no split `val`: add --val .1" in refused.stderr
    assert not (out / "heads").exists()
    options = ("--val", ".25", "--recipe", "lit")
    run(table, out, tiny_image_encoder, tiny_text_encoder, *options)
    splits = apecache.FeatureStore.open(out / "store").pairs.splits
    assert set(splits) == {"train", "val"}
