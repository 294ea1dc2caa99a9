"""The GPU benchmark: its goals, its parts, and a dry run on the CPU."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.goals import reached_goals
from benchmarks.gpu.run import NEEDS_INPUTS, PARTS, chosen_parts

ROOT = Path(__file__).parents[2]


def dry_run(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    result = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--tiny", "--device", "cpu"]
    subprocess.run([*command, "--json", str(result), *options], check=True, cwd=ROOT)
    rows: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return rows


def test_every_part_has_a_function() -> None:
    for part in PARTS:
        module, _, function = part.function.partition(":")
        assert callable(getattr(import_module(f"benchmarks.gpu.{module}"), function))


def test_all_parts_together_fit_the_time_that_is_promised() -> None:
    """Limits of the parts that must run add up to less than eight minutes."""
    must_run = PARTS[: [part.name for part in PARTS].index("extractions") + 1]
    assert sum(part.seconds for part in must_run) < 480


def test_parts_bring_what_they_need() -> None:
    for name in NEEDS_INPUTS:
        assert [part.name for part in chosen_parts(name)] == ["prepare", name]


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(SystemExit, match="no part speed"):
        chosen_parts("fits,speed")


def test_goals_are_shares_of_the_ceilings_of_the_same_run() -> None:
    model = {"what": "bare image model", "model": "vit-b", "precision": "float16"}
    rows: list[dict[str, Any]] = [
        {"what": "gemm", "precision": "float16", "TFLOP/s": 600.0},
        {**model, "TFLOP/s": 300.0, "images_s": 6000},
        {"what": "decoding", "resize": "torchvision", "images_s": 4000},
        {"what": "extraction", "run": "vit-b torchvision", "image_rows_s": 3000},
    ]
    by_name = {goal.name: goal for goal in reached_goals(rows)}
    assert len(by_name) == 2
    products = by_name["ViT-B/14 in float16, share of the rate of products"]
    assert (products.value, products.met) == (0.5, True)
    whole = by_name["extraction by ViT-B/14, share of the slower of decoding and model"]
    assert (whole.value, whole.met) == (0.75, False)


def test_decoding_on_the_card_and_batches_of_tokens_have_goals() -> None:
    model = {"what": "bare image model", "model": "vit-b", "precision": "float16"}
    extraction = {"what": "extraction"}
    rows: list[dict[str, Any]] = [
        {**model, "images_s": 6000},
        {"what": "decoding on the device", "resized": False, "images_s": 9000},
        {"what": "decoding on the device", "resized": True, "images_s": 3000},
        {**extraction, "run": "vit-b decoded on the device", "image_rows_s": 1900},
        {**extraction, "run": "captions", "text_rows_s": 30_000},
        {**extraction, "run": "captions, 256 in a batch", "text_rows_s": 24_000},
    ]
    by_name = {goal.name: goal for goal in reached_goals(rows)}
    # Both together are 2,000 images a second.
    there = by_name["extraction with --decode cuda, share of decoding and model on the card"]
    assert (there.value, there.met) == (0.95, True)
    gain = by_name["captions in batches of tokens, times the rate of 256 in a batch"]
    assert (gain.value, gain.met) == (1.25, True)


def test_goals_without_a_measurement_are_left_out() -> None:
    assert reached_goals([{"what": "skipped", "part": "fits"}]) == []


def test_parts_without_time_are_named_as_skipped(tmp_path: Path) -> None:
    rows = dry_run(tmp_path, "--seconds", "1")
    assert [row["part"] for row in rows] == [part.name for part in PARTS]
    assert {row["what"] for row in rows} == {"skipped"}


@pytest.mark.slow
def test_a_dry_run_of_all_parts(tmp_path: Path) -> None:
    rows = dry_run(tmp_path, "--seconds", "3000")
    endings = {row["part"]: row["what"] for row in rows}
    assert endings == dict.fromkeys((part.name for part in PARTS), "done")
    assert not [row for row in rows if "failed" in row]
