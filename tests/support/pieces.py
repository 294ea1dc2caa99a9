"""Small workers for the pool, importable where its actors run."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

from apecache.errors import BadRowsError, EncoderError, MismatchError, MissingExtraError

ERRORS = {
    "rows": BadRowsError("2 of 3 rows"),
    "mismatch": MismatchError("another one", [("encoder.weights", "a", "b")]),
    "extra": MissingExtraError("faiss", "cpu"),
    "bug": KeyError("a bug of ours"),
}


class Pieces:
    """Takes strings: `x` is answered `done x`; `die F` ends the process unless F exists, which it
    makes first."""

    def __init__(self, log: Path, cpus: int) -> None:
        self.log = log
        (log / f"{os.getpid()}-{cpus}").touch()

    def do(self, piece: str) -> Any:
        kind, _, about = piece.partition(" ")
        match kind:
            case "raise":
                raise ERRORS[about]
            case "die":
                if not Path(about).exists():
                    Path(about).touch()
                    os._exit(1)
            case "always-die":
                os._exit(1)
            case "sleep":
                time.sleep(float(about))
        return f"done {piece}"


def sent(what: Any) -> Any:
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(what))  # noqa: S301


def refusing(_: int) -> Pieces:
    raise EncoderError("no such encoder: x")
