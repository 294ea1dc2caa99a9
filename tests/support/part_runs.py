"""Extractions in processes of their own, without the seconds of an import for each.

As a program it imports once, and then forks a process for every run that a line of JSON on its
standard input asks for.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class PartRuns:
    """A process that forks extractions. `with PartRuns() as runs: runs.start({"table": …, "part":
    "1/3", …}, …)`."""

    def __enter__(self) -> "PartRuns":
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            **pipes,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, *runs: dict[str, Any]) -> list[str]:
        """Run side by side until all have ended; each result is `done`, `killed` or an error.

        Each run: arguments of `extract_tiny`, `part`, and `kill_at`: the number of the commit
        before which it dies.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(runs, default=str) + "\n")
        self.process.stdin.flush()
        answer: list[str] = json.loads(self.process.stdout.readline())
        return answer


def serve() -> None:
    import apecache.encoders.from_timm
    import apecache.encoders.from_transformers
    import apecache.extraction.run  # noqa: F401

    for line in sys.stdin:
        children = [_fork(run) for run in json.loads(line)]
        print(json.dumps([_result(*child) for child in children]), flush=True)  # noqa: T201


def _fork(run: dict[str, Any]) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    try:
        answer = _extract(**run)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    os.write(writing, answer.encode())
    os._exit(0)


def _extract(table: str, store: str, part: str, kill_at: int | None = None, **settings: Any) -> str:
    from tiny import extract_tiny

    from apecache.extraction.shard_range import parse_part

    if kill_at is not None:
        _kill_before(kill_at)
    extract_tiny(Path(table), Path(store), part=parse_part(part), **settings)
    return "done"


def _kill_before(number: int) -> None:
    from apecache.store.writer import ArrayWriter

    commit = ArrayWriter.commit
    counted = iter(range(number))

    def counting(*arguments: Any, **settings: Any) -> Any:
        if next(counted, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(*arguments, **settings)

    ArrayWriter.commit = counting  # type: ignore[method-assign]


def _result(child: int, reading: int) -> str:
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer or ("killed" if os.WIFSIGNALED(status) else "no answer")


if __name__ == "__main__":
    serve()
