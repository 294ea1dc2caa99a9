"""Write the history of a fit for TensorBoard, besides the run folder's own."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError, RunError, require_local
from apecache.train.loop import FitProgress


@contextmanager
def log_to_tensorboard(folder: AnyPath) -> Iterator[FitProgress]:
    """Return a `progress` for `fit_head` and `fit_encoder` that writes events by training step.

    The events are `loss`, `lr`, `temperature`, `dev/mean_recall`, `dev/image_to_text/R@k` and
    `dev/text_to_image/R@k`, recalls in percent. Each line is on disk before the next epoch begins.
    When a fit is resumed or begun anew in the same folder, TensorBoard no longer shows the events
    of later steps. The folder is made with the first line.

    Args:
        folder: Folder of events.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        RunError: `folder` is a file, or on object storage.
    """
    with log_scalars(folder) as log:
        yield lambda line: log(line["step"], scalars_of(line))


@contextmanager
def log_scalars(folder: AnyPath) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Return a function that writes the scalars of a step, by tag, as events.

    Each step is on disk before the function returns. Events of later steps in the same folder are
    no longer shown. The folder is made with the first step.

    Args:
        folder: Folder of events.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        RunError: `folder` is a file, or on object storage.
    """
    folder = as_path(folder, "folder")
    require_local(folder, "folder of events")
    if folder.exists() and not folder.is_dir():
        raise RunError(
            f"{folder} is not a folder, so events cannot be written into it; choose another"
        )
    if find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "track")
    with ExitStack() as stack:
        opened: list[_EventFile] = []

        def log(step: int, scalars: Mapping[str, float]) -> None:
            # The file needs the first step, which is known with the first call.
            if not opened:
                opened.append(stack.enter_context(closing(_EventFile(folder, step))))
            opened[0].add(step, scalars)

        yield log


class _EventFile:
    """Write one file of events.

    TensorBoard's own writer has a thread, which prints a traceback when the disk is full.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Create the file. TensorBoard hides events of earlier files from `first_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        begin = time.time()
        # Readers take files in the order of their names.
        path = folder / f"events.out.tfevents.{begin:.6f}.{os.getpid()}"
        self.file = path.open("xb")
        self.records = RecordWriter(self.file)
        self._write(Event(wall_time=begin, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=begin, step=first_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step to the disk."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        summary = Summary(value=values)
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        # The record writer writes through to the file, but the file has a buffer.
        self.file.flush()

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of a line of the history by tag. Epoch 0 has no loss."""
    dev = line["dev"]
    scalars = {name: line[name] for name in ("loss", "lr", "temperature") if line[name] is not None}
    scalars["dev/mean_recall"] = dev["mean_recall"]
    for direction in ("image_to_text", "text_to_image"):
        for k, recall in dev[direction].items():
            scalars[f"dev/{direction}/R@{k}"] = recall
    return scalars
