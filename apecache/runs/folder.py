"""Keep a run folder: recipe, history, checkpoint during a fit, head at its end."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import RunError, require_local, require_new
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.heads import DESCRIPTION, WEIGHTS
from apecache.runs.ledger import LEDGER
from apecache.runs.model_card import CARD
from apecache.storage.replace import replace_text, scratch_of

HISTORY = "history.jsonl"
RECIPE = "recipe.json"
OURS = {HISTORY, RECIPE, CHECKPOINT, LEDGER, CARD}
HEAD_FILES = (WEIGHTS, DESCRIPTION)


def require_usable(out: Path, overwrite: bool, files: tuple[str, str] = HEAD_FILES) -> None:
    """Check that a fit may write into `out`.

    A fit may resume an unfinished run, and may replace a finished one with `overwrite`. A folder
    with other files is never touched.

    Args:
        out: Run folder.
        overwrite: Whether a finished run may be replaced.
        files: Names of weights and description. A run with the description is finished.

    Raises:
        RunError: `out` holds a finished run, or something else.
    """
    require_local(out, "run folder")
    description = files[1]
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_finished = description in names and RECIPE in names  # an index has a head, but no recipe
    run_files = OURS | set(files)
    # A write that was killed leaves its scratch file behind.
    scratch_files = {scratch_of(out / name).name for name in run_files}
    is_run_folder = out.is_dir() and names <= run_files | scratch_files
    # A checkpoint beside a description: the fit was killed before it removed the checkpoint.
    is_unfinished = is_run_folder and (CHECKPOINT in names or description not in names)
    if not is_unfinished:
        require_new(out, what="run folder", overwrite=overwrite, holds_another=is_finished)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder for one fit at a time. The folder is made if it is missing.

    Raises:
        RunError: Another process fits into it.
    """
    require_local(out, "folder")
    out.mkdir(parents=True, exist_ok=True)
    # A lock on the folder itself: the kernel releases it when the process ends, also by a kill.
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is fitting into {out}; wait for it, or choose another --out"
            ) from None
        # Outside of the handler: the fit can raise the same error of a pipe or of a socket.
        yield
    finally:
        os.close(descriptor)


def clear_folder(out: Path, recipe: Recipe) -> None:
    """Empty the folder and write the recipe into it."""
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = json.dumps(recipe.model_dump(), indent=1, ensure_ascii=False)
    replace_text(out / RECIPE, text)


def write_history(run: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace a run's history: JSON lines, one for each evaluation."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    replace_text(run / HISTORY, text)


def add_to_history(run: Path, line: dict[str, Any]) -> None:
    """Append one evaluation to a run's history."""
    with (run / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def read_history(run: AnyPath) -> Iterator[dict[str, Any]]:
    """Read the lines of a run's history.

    Epoch 0, the model before training, comes first; its `loss` is None.
    """
    for text in (as_path(run, "run") / HISTORY).read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def history_line(
    epoch: int,
    step: int,
    loss: float,
    lr: float,
    temperature: float,
    dev: RetrievalReport,
    seconds: float,
    contrastive: float | None = None,
) -> dict[str, Any]:
    """Return one line of a history, ready for JSON.

    Args:
        epoch: Epochs done.
        step: Steps done.
        loss: Mean loss of the epoch; not finite before training.
        lr: Learning rate of the last step.
        temperature: Temperature of the evaluated model.
        dev: Retrieval on the dev split, in percent.
        seconds: Time of the epoch.
        contrastive: Mean contrastive term of the epoch; None where it is the loss.
    """
    return {
        "epoch": epoch,
        "step": step,
        # JSON has no NaN.
        "loss": loss if math.isfinite(loss) else None,
        # Only where the loss has further terms.
        **({} if contrastive is None else {"contrastive": contrastive}),
        "lr": lr,
        "temperature": temperature,
        "dev": {
            "image_to_text": {str(k): value for k, value in dev.image_to_text.items()},
            "text_to_image": {str(k): value for k, value in dev.text_to_image.items()},
            "mean_recall": dev.mean_recall,
            "chance": dev.mean_chance,
            # Only where it chooses the epoch in place of the mean recall.
            **({} if dev.map_at_r is None else {"map_at_r": dev.map_at_r}),
        },
        "seconds": seconds,
    }
