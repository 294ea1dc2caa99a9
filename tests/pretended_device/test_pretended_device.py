"""Run this folder's `on_device_*.py` in processes that have registered the pretended device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_device.build import missing_tools

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "support"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools())),
]


@pytest.fixture(scope="session")
def built() -> None:
    """The extension, built once (minutes) and kept where torch keeps extensions."""
    command = [sys.executable, str(SUPPORT / "pretended_device" / "build.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("path", sorted(HERE.glob("on_device_*.py")), ids=lambda path: path.stem)
def test_on_the_pretended_device(path: Path, built: None) -> None:
    search_path = [str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    plugin = ["-p", "pretended_device.register", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-q", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
