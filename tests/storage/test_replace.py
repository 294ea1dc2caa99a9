"""Files that are replaced whole, also by a process that dies while it writes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apecache.storage.replace import remove_tensors, replace_tensors, replace_text, scratch_of

DIES_WHILE_WRITING = """
import resource, signal, sys
from pathlib import Path
import torch
from apecache.storage.replace import replace_tensors, replace_text

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
path = Path(sys.argv[1])
if path.suffix == ".txt":
    replace_text(path, "new" * (1 << 16))
else:
    replace_tensors(path, {"x": torch.ones(1 << 16)})
"""


def write(path: Path, value: float) -> None:
    if path.suffix == ".txt":
        replace_text(path, f"{value} \N{SNOWMAN}")
    else:
        replace_tensors(path, {"x": torch.full((3, 4), value).T}, {"kind": "test"})


def read(path: Path) -> float:
    if path.suffix == ".txt":
        return float(path.read_text(encoding="utf-8").removesuffix(" \N{SNOWMAN}"))
    return load_file(path)["x"].unique().item()


@pytest.mark.parametrize("name", ["words.txt", "weights.safetensors"])
def test_a_file_replaces_the_one_before_it_and_nothing_stays_beside_it(
    tmp_path: Path,
    name: str,
) -> None:
    for value in (1.0, 2.0):
        write(tmp_path / name, value)
        assert read(tmp_path / name) == value
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["words.txt", "weights.safetensors"])
def test_a_process_that_dies_while_writing_leaves_the_old_file_and_the_scratch_name_alone(
    tmp_path: Path,
    name: str,
) -> None:
    path = tmp_path / name
    write(path, 1.0)
    died = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_WRITING, str(path)],
        stderr=subprocess.PIPE,
    )
    assert died.returncode == -signal.SIGXFSZ, died.stderr
    assert read(path) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {name, scratch_of(path).name}
    write(path, 2.0)
    assert read(path) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_removed_with_what_a_killed_write_of_it_left(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    remove_tensors(path)
    write(path, 1.0)
    subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING, str(path)], stderr=subprocess.PIPE)
    assert scratch_of(path).is_dir()
    remove_tensors(path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_scratch_folder_is_taken_away_too(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    scratch_of(path).write_bytes(b"half")
    write(path, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    scratch_of(path).write_bytes(b"half")
    remove_tensors(path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_written_leave_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write(path, 1.0)
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        replace_tensors(path, {"a": shared, "b": shared})
    assert read(path) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
