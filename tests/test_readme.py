"""README: its Python runs, its commands exist."""

import re
import shutil
from pathlib import Path

import pytest
from apecache_cli.app import app
from tiny import make_shapes
from typer.main import get_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    folder = make_shapes(tmp_path / "shapes", copies=4).parent
    shutil.copytree(tiny_image_encoder, folder / "image-encoder")
    shutil.copytree(tiny_text_encoder, folder / "text-encoder")
    monkeypatch.chdir(folder)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    told = capsys.readouterr()
    assert "RetrievalReport" in told.out
    assert not told.err


def test_every_command_that_the_readme_names_exists() -> None:
    known = set(get_command(app).commands)
    named = set(
        re.findall(
            r"apecache ([a-z][a-z-]+)",
            "\n".join(re.findall(r"`apecache [^`]*`|    apecache .*", README)),
        )
    )
    assert named
    assert named <= known
    assert known <= named, "a command is missing in the README"


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
