"""`apecache extract`: a dry run, the resize, progress for log files, and its last line."""

import json
from pathlib import Path
from typing import Any

import apecache_cli.terminal as terminal
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner, Result

from apecache.extraction.run import ExtractionState

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


@pytest.fixture
def call(shapes: Path, tmp_path: Path, tiny_image_encoder: Path, tiny_text_encoder: Path) -> Any:
    def extract(*more: object) -> Result:
        encoders = (
            "--image",
            f"timm:{tiny_image_encoder}",
            "--text",
            f"hf:{tiny_text_encoder}",
            "--device",
            "cpu",
        )
        arguments = ("extract", shapes, "--store", tmp_path / "store", *encoders, *more)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return extract


def test_a_dry_run_says_rows_bytes_time_and_price_and_writes_nothing(
    call: Any,
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = call("--dry-run", "--price-per-hour", "2")
    assert shown.exit_code == 0, shown.output
    assert all(
        word in shown.stdout
        for word in ("tiny-vit", "tiny-bert", "about ", "price 0.0", "MB free", "nothing")
    )
    told = json.loads(call("--dry-run", "--json").stdout)
    assert [(a["modality"], a["rows"], a["n_pending"]) for a in told["arrays"]] == [
        ("image", 12, 12),
        ("text", 24, 24),
    ]
    assert told["fits"] is True
    assert told["price"] is None
    assert told["seconds"] == pytest.approx(told["image_seconds"] + told["text_seconds"])
    assert told["n_bytes"] == sum(array["n_bytes"] for array in told["arrays"])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_last_line_sums_up_and_json_has_the_same(call: Any, tmp_path: Path) -> None:
    shown = call("--workers", "2")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[-1].startswith("36 rows encoded in ")
    assert shown.stdout.splitlines()[-1].endswith(" MB; 0 unreadable")
    told = json.loads(call("--json").stdout)
    assert told["nothing_to_do"] is True
    assert [array["n_bytes"] for array in told["arrays"]] == [0, 0]
    assert told["seconds"] > 0


def test_resize_is_part_of_the_identity(call: Any) -> None:
    assert call("--workers", "0").exit_code == 0
    other = call("--resize", "torchvision")
    assert other.exit_code == 4
    assert "torchvision-uint8" in other.stderr
    both = json.loads(call("--resize", "torchvision", "--add", "--json").stdout)
    assert next((a["name"], a["n_encoded"]) for a in both["arrays"]) == ("tiny-vit-torchvision", 12)
    wrong = call("--resize", "torchvison")
    assert wrong.exit_code == 2
    assert "did you mean torchvision?" in wrong.stderr


def test_lines_come_at_the_start_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress() as update:
        for second in range(26):
            now[0] = 100.0 + second
            update(
                ExtractionState(
                    modality="image",
                    done=40 * second,
                    rows=1000,
                    n_bad=second // 10,
                    n_bytes=2_000_000_000 * (second // 10),
                )
            )
        update(
            ExtractionState(modality="image", done=1000, rows=1000, n_bad=3, n_bytes=6_000_000_000)
        )
        update(ExtractionState(modality="text", done=0, rows=7))
        update(ExtractionState(modality="text", done=7, rows=7))
    assert capsys.readouterr().err.splitlines() == [
        "image: 0/1,000, 0.0/s",
        "image: 400/1,000, 40.0/s, 2.0 GB, 1 unreadable, 15 s left",
        "image: 800/1,000, 40.0/s, 4.0 GB, 2 unreadable, 5 s left",
        "image: 1,000/1,000, 40.0/s, 6.0 GB, 3 unreadable",
        "text: 0/7, 0.0/s",
        "text: 7/7, 7000000000.0/s",
    ]
