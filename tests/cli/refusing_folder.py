"""Run commands where the system refuses what they write: a process of its own, for it mounts and sets limits.

Reads a JSON request from standard input: `refusal` (full, readonly or limited), `folder` (where it acts), `free_kb`,
and `cases`, each {"name", "arguments", "copies": {source: name below the folder}, "again": whether the command runs
once more after the refusal has ended}. Writes a JSON line for each case.
"""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILLER = ".filler"
LIBRARIES = ("torch", "transformers", "timm", "faiss", "pyarrow.parquet", "onnxscript", "sentence_transformers", "zarr")
Lift = Callable[[], object]
"""Ends a refusal before its folder goes."""


@contextmanager
def full_disk(folder: Path, copies: dict[str, str], free_kb: int) -> Iterator[Lift]:
    """A small file system of its own, with the copies in it and then `free_kb` of room."""
    with mounted(["-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], folder):
        put_copies(folder, copies)
        filler = folder / FILLER
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 1024 * free_kb)
        yield filler.unlink


@contextmanager
def read_only(folder: Path, copies: dict[str, str], free_kb: int) -> Iterator[Lift]:
    put_copies(folder, copies)
    try:
        with mounted(["--bind", str(folder), str(folder)], folder):
            remount = ["mount", "-o", "remount,ro,bind", str(folder)]
            subprocess.run(remount, check=True)
            yield lambda: subprocess.run([*remount[:2], "remount,rw,bind", str(folder)], check=True)
    finally:
        clear(folder)


@contextmanager
def limited(folder: Path, copies: dict[str, str], free_kb: int) -> Iterator[Lift]:
    """No file may grow beyond `free_kb`: what a process without rights can do to itself."""
    put_copies(folder, copies)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * free_kb, hard))
    try:
        yield lift
    finally:
        lift()
        clear(folder)


@contextmanager
def mounted(arguments: list[str], folder: Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def put_copies(folder: Path, copies: dict[str, str]) -> None:
    for source, name in copies.items():
        copy = shutil.copytree if Path(source).is_dir() else shutil.copy
        copy(source, folder / name)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(arguments: list[str]) -> dict[str, Any]:
    from apecache_cli.app import app
    from typer.testing import CliRunner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    failure = None
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        failure = "".join(traceback.format_exception(result.exception))
    return {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "exception": failure}


def serve_only_until_ready() -> None:
    """`apecache serve` ends as by Ctrl-C as soon as it would answer."""
    import uvicorn

    def interrupted(server: object, sockets: object) -> None:
        raise KeyboardInterrupt

    uvicorn.Server.run = interrupted  # type: ignore[assignment]


def import_libraries() -> None:
    """Some libraries end the process, or half import, if they cannot make a file while they are imported."""
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.read())
    refusing = {"full": full_disk, "readonly": read_only, "limited": limited}[request["refusal"]]
    folder = Path(request["folder"])
    with suppress(ImportError):
        serve_only_until_ready()
    import_libraries()
    for case in request["cases"]:
        with refusing(folder, case["copies"], request["free_kb"]) as lift:
            begin = time.monotonic()
            answer = run(case["arguments"])
            answer["seconds"] = time.monotonic() - begin
            answer["left"] = sorted(path.name for path in folder.iterdir() if path.name != FILLER)
            lift()
            answer["again"] = run(case["arguments"]) if case["again"] else None
        answers.write(json.dumps({"name": case["name"], **answer}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
