"""What stands in a run folder: recipe, history, checkpoint while it runs, head when it is done."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apecache.errors import MismatchError, RunError, require_local, require_new
from apecache.fingerprint import Fingerprint, shorten
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint
from apecache.runs.heads import DESCRIPTION, WEIGHTS
from apecache.runs.ledger import LEDGER
from apecache.runs.model_card import CARD
from apecache.storage.atomic import scratch_of

HISTORY = "history.jsonl"
RECIPE = "recipe.json"
OURS = {HISTORY, RECIPE, CHECKPOINT, LEDGER, CARD}
HEAD_FILES = (WEIGHTS, DESCRIPTION)


def require_usable(out: Path, overwrite: bool, files: tuple[str, str] = HEAD_FILES) -> None:
    """A finished run is begun anew only with `overwrite`, a foreign folder never; an unfinished one
    goes on. `files`: weights and description, whose presence makes a run of this kind a finished
    one.

    Raises:
        RunError: `out` holds a finished run, or something else.
    """
    require_local(out, "run folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    done = files[1] in names and RECIPE in names  # an index has a head, but no recipe
    known = OURS | set(files)
    ours = out.is_dir() and names <= known | {scratch_of(out / name).name for name in known}
    unfinished = ours and (CHECKPOINT in names or files[1] not in names)
    if not unfinished and not (overwrite and done):
        require_new(out, "run folder", overwrite)


def find_checkpoint(
    out: Path,
    identity: Fingerprint,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Tensors and state of the same fit, broken off; None if there is none.

    Raises:
        MismatchError: it is of another recipe, data, seed or split. RunError: it is damaged.
    """
    if not (out / CHECKPOINT).is_file():
        return None
    tensors, state = load_checkpoint(out)
    differences = identity.difference(Fingerprint(fields=state.get("identity", {})))
    if differences:
        shown = "; ".join(
            f"{path} is {shorten(here)}, there {shorten(there)}"
            for path, here, there in differences[:3]
        )
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise MismatchError(
            (
                f"{out} holds another fit, broken off ({shown}{more}); choose another --out, or "
                "add --overwrite"
            ),
            differences,
        )
    return tensors, state


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder, made if it is not there, for one fit at a time. The lock goes with the process,
    also by a kill.

    Raises:
        RunError: another process fits into it.
    """
    require_local(out, "folder")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(
            f"another process is fitting into {out}; wait for it, or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def clear_folder(out: Path, recipe: Recipe) -> None:
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / RECIPE).write_text(
        json.dumps(recipe.model_dump(), indent=1, ensure_ascii=False),
        encoding="utf-8",
    )


def write_history(run: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    (run / HISTORY).write_text(text, encoding="utf-8")


def add_to_history(run: Path, line: dict[str, Any]) -> None:
    with (run / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def read_history(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's history, epoch 0 (untrained) first; `loss` is None there."""
    for text in (run / HISTORY).read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def history_line(
    epoch: int,
    step: int,
    loss: float,
    lr: float,
    temperature: float,
    dev: RetrievalReport,
    seconds: float,
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": step,
        "loss": loss if math.isfinite(loss) else None,
        "lr": lr,
        "temperature": temperature,
        "dev": {
            "image_to_text": {str(k): value for k, value in dev.image_to_text.items()},
            "text_to_image": {str(k): value for k, value in dev.text_to_image.items()},
            "mean_recall": dev.mean_recall,
            "chance": dev.mean_chance,
        },
        "seconds": seconds,
    }
