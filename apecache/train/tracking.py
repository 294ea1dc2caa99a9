"""The history of a fit for TensorBoard, besides the run folder's own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError, RunError, require_local
from apecache.train.loop import Progress


@contextmanager
def log_to_tensorboard(folder: AnyPath) -> Iterator[Progress]:
    """A `progress` for `fit_head` and `fit_encoder` that writes every line of the history as events: `loss`, `lr`,
    `temperature`, `dev/mean_recall` and `dev/image_to_text/R@k`, `dev/text_to_image/R@k` (per cent), by training step.

    Each line is on disk when the next epoch begins. Where a fit goes on, or is begun anew in the same folder, what was
    written of later steps is shown no more. Nothing is written, and no folder made, without a line.

    Raises:
        MissingExtraError: TensorBoard is not installed. RunError: `folder` is a file, or on object storage.
    """
    folder = as_path(folder, "folder")
    require_local(folder, "folder of events")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is no folder, so no events can be written into it; choose another")
    if find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "track")
    from torch.utils.tensorboard import SummaryWriter

    with ExitStack() as stack:
        opened: list[SummaryWriter] = []

        def log(line: dict[str, Any]) -> None:
            if not opened:
                opened.append(stack.enter_context(SummaryWriter(str(folder), purge_step=line["step"])))
            for name, value in _scalars(line).items():
                opened[0].add_scalar(name, value, line["step"])
            opened[0].flush()

        yield log


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    dev = line["dev"]
    found = {name: line[name] for name in ("loss", "lr", "temperature") if line[name] is not None}
    found["dev/mean_recall"] = dev["mean_recall"]
    for way in ("image_to_text", "text_to_image"):
        found |= {f"dev/{way}/R@{k}": recall for k, recall in dev[way].items()}
    return found
