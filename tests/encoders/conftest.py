"""Variants of small saved encoders: the same folder with one thing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[[Path], None]


@pytest.fixture
def variant(tmp_path: Path) -> Callable[[Path, Edit], Path]:
    """A copy of an encoder's folder, elsewhere and under another name, changed by `edit`."""

    def make(folder: Path, edit: Edit) -> Path:
        copy = tmp_path / f"variant-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        edit(copy)
        return copy

    return make


@pytest.fixture(scope="session")
def edits() -> Any:
    """Functions that make an `Edit`: `json(file, **values)`, `tensor(name, change)`, `cut(file,
    n)`, …"""

    class Edits:
        @staticmethod
        def json(file: str, **values: Any) -> Edit:
            def edit(folder: Path) -> None:
                found = json.loads((folder / file).read_text())
                for path, value in values.items():
                    *parents, last = path.split("__")
                    inner = found
                    for parent in parents:
                        inner = inner[parent]
                    inner[last] = value
                (folder / file).write_text(json.dumps(found))

            return edit

        @staticmethod
        def tensor(name: str, change: Callable[[Any], Any]) -> Edit:
            """Replace one weight by `change(weight)`; None drops it."""

            def edit(folder: Path) -> None:
                from safetensors.torch import load_file, save_file

                state = load_file(folder / "model.safetensors")
                state[name] = change(state[name].clone())
                kept = {
                    key: value.contiguous() for key, value in state.items() if value is not None
                }
                save_file(kept, folder / "model.safetensors", {"format": "pt"})

            return edit

        @staticmethod
        def cut(file: str, n_bytes: int) -> Edit:
            def edit(folder: Path) -> None:
                (folder / file).write_bytes((folder / file).read_bytes()[:n_bytes])

            return edit

        @staticmethod
        def remove(pattern: str) -> Edit:
            def edit(folder: Path) -> None:
                for path in folder.glob(pattern):
                    path.unlink()

            return edit

        @staticmethod
        def write(file: str, content: Any) -> Edit:
            def edit(folder: Path) -> None:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(json.dumps(content))

            return edit

    return Edits
