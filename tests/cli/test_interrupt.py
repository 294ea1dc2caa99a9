"""Interrupts and kills of the real command, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shapes

COPIES = 16  # of 12 shapes: 192 images in 24 shards of 8 rows, 384 captions in 48


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("many") / "shapes", copies=COPIES)


def command(table: Path, store: Path, image: Path, text: Path) -> list[str]:
    options = ["--shard-rows", "8", "--image-batch", "4", "--text-batch", "4", "--device", "cpu"]
    encoders = ["--image", f"timm:{image}", "--text", f"hf:{text}"]
    return [
        sys.executable,
        "-m",
        "apecache",
        "extract",
        str(table),
        "--store",
        str(store),
        *encoders,
        *options,
    ]


def files(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def stop_after(
    process: subprocess.Popen[str],
    store: Path,
    n_commits: int,
    with_signal: signal.Signals,
) -> int:
    """Send the signal once `n_commits` image shards are committed; returns how many there were
    then."""
    folder = next(iter(store.glob("records/image/*/commits")), None)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        folder = folder or next(iter(store.glob("records/image/*/commits")), None)
        if folder and (count := len(list(folder.glob("*.json")))) >= n_commits:
            process.send_signal(with_signal)
            return count
        time.sleep(0.002)
    raise AssertionError(f"ended before {n_commits} commits: {process.communicate()}")


def test_killed_and_interrupted_runs_resume_to_the_same_bytes(
    many: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    clean = tmp_path / "clean"
    broken = tmp_path / "broken"
    encoders = (tiny_image_encoder, tiny_text_encoder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        command(many, clean, *encoders),
        check=True,
        capture_output=True,
        env=environment,
    )
    started: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment,
    }
    # A shell's background job ignores SIGINT, and so would the children of a test run that is one.
    started["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)

    killed = subprocess.Popen(command(many, broken, *encoders), **started)
    assert 4 <= stop_after(killed, store=broken, n_commits=4, with_signal=signal.SIGKILL) < 24
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()

    interrupted = subprocess.Popen(command(many, broken, *encoders), **started)
    before = stop_after(interrupted, store=broken, n_commits=10, with_signal=signal.SIGINT)
    _, told = interrupted.communicate()
    assert interrupted.returncode == 130
    assert "resume with: apecache extract" in told
    assert "Traceback" not in told

    kept = {p: p.stat().st_mtime_ns for p in broken.glob("records/image/*/commits/*.json")}
    assert len(kept) >= before
    resumed = subprocess.run(
        command(many, broken, *encoders),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    left_over = [name for name in files(broken) if ".tmp-" in name]
    assert {name: data for name, data in files(broken).items() if name not in left_over} == files(
        clean
    )
