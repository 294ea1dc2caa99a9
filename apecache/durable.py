"""Small files that are replaced whole: after a kill or a power cut the old or the new one is there, and the one scratch
name beside it at most. What a store keeps goes through `store.files`."""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def scratch_of(path: Path) -> Path:
    """Where `path` is written before it takes its name: a file for text, a folder for tensors. A kill leaves it; the
    next write of `path` takes it away."""
    return path.with_name(f".{path.name}.tmp")


def replace_text(path: Path, text: str) -> None:
    scratch = scratch_of(path)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    _make_durable(path.parent)


def replace_tensors(path: Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, str] | None = None) -> None:
    """One safetensors file; tensors may lie on any device. safetensors writes under a name of its own choosing beside
    the file it is asked for, which a kill would leave in the folder: hence a folder for it."""
    from safetensors.torch import save_file

    scratch = scratch_of(path)
    _clear(scratch)
    scratch.mkdir()
    try:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, scratch / path.name, dict(header) if header else None)
        apply_umask(scratch)
        _make_durable(scratch / path.name)
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _make_durable(path.parent)


def apply_umask(folder: Path) -> None:
    """Give every file below a folder the mode that the umask leaves to a new file.

    safetensors creates its files for their owner alone, whatever the umask says.
    """
    probe = folder / ".mode.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def undone_on_error(folder: Path) -> Iterator[None]:
    """Make a new or empty folder, and empty it on an error, so that the same command can run again."""
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


def remove_tensors(path: Path) -> None:
    """The file, and what a killed write of it left."""
    path.unlink(missing_ok=True)
    _clear(scratch_of(path))


def _clear(scratch: Path) -> None:
    """Whatever a killed writer left there; it may have been one that wrote tensors into a file of this name."""
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
