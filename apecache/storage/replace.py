"""Replace small files whole.

After a kill or a power cut the old or the new file is there, and at most one scratch file beside
it. The objects of a store are written by `apecache.storage.files` instead.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


HEADER_KEY = "apecache"
"""Of the JSON in the header of our safetensors files."""


def scratch_of(path: Path) -> Path:
    """Return where `path` is written before it gets its name.

    It is a file for text and bytes, and a folder for tensors. A kill leaves it; the next write of
    `path` removes it.
    """
    return path.with_name(f".{path.name}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, durably, in place of the old one."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file, durably, in place of the old one."""
    scratch = scratch_of(path)
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            # Before the rename: else a power cut could leave the new name with an empty file.
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    # The folder holds the name, so the rename is durable only after it is synced.
    _make_durable(path.parent)


def replace_tensors(
    path: Path,
    tensors: Mapping[str, "Tensor"],
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, durably, in place of the old one.

    Args:
        path: The file.
        tensors: Tensors by name, on any device.
        header: Strings by name for the file's metadata.
    """
    from safetensors.torch import save_file

    # safetensors first writes a file of a random name beside its target. A kill would leave it in
    # the user's folder, so it gets a scratch folder.
    scratch = scratch_of(path)
    _clear(scratch)
    scratch.mkdir()
    try:
        cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        scratch_file = scratch / path.name
        save_file(cpu_tensors, scratch_file, dict(header) if header else None)
        apply_umask(scratch)
        _make_durable(scratch_file)
        os.replace(scratch_file, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _make_durable(path.parent)


def apply_umask(folder: Path) -> None:
    """Give every file below a folder the mode that a new file has under the umask.

    safetensors creates its files for their owner alone, whatever the umask says.
    """
    # Reading the umask would need to set it, for all threads: a new file shows it instead.
    probe = folder / ".mode.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def undone_on_error(folder: Path) -> Iterator[None]:
    """Make a new or empty folder, and empty it on an error, so that the command can run again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            _clear(path)
        if is_new:
            folder.rmdir()
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder, which takes the name `folder` once the block has ended.

    After an error or a kill nothing has that name, so the same command can run again.

    Args:
        folder: must not exist, or be empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(folder)
    _clear(scratch)
    scratch.mkdir()
    try:
        yield scratch
        # Some libraries make files that only the owner can read.
        apply_umask(scratch)
        for path in scratch.rglob("*"):
            _make_durable(path)
        _make_durable(scratch)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _make_durable(folder.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the name of a scratch file, which takes the name `path` once the block has ended.

    For writers that need a name and not bytes. After an error `path` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(path)
    try:
        yield scratch
        _make_durable(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    _make_durable(path.parent)


def remove_tensors(path: Path) -> None:
    """Remove the file, and what a killed write of it left."""
    path.unlink(missing_ok=True)
    _clear(scratch_of(path))


def _clear(scratch: Path) -> None:
    """Remove a scratch file or folder that a killed writer left."""
    if scratch.is_dir():
        shutil.rmtree(scratch)
    else:
        scratch.unlink(missing_ok=True)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
