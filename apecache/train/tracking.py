"""The history of a fit for TensorBoard, besides the run folder's own."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError, RunError, require_local
from apecache.train.loop import Progress


@contextmanager
def log_to_tensorboard(folder: AnyPath) -> Iterator[Progress]:
    """A `progress` for `fit_head` and `fit_encoder` that writes every line of the history as
    events: `loss`, `lr`, `temperature`, `dev/mean_recall` and `dev/image_to_text/R@k`,
    `dev/text_to_image/R@k` (per cent), by training step.

    Each line is on disk when the next epoch begins. Where a fit goes on, or is begun anew in the
    same folder, what was written of later steps is shown no more. Nothing is written, and no folder
    made, without a line.

    Raises:
        MissingExtraError: TensorBoard is not installed. RunError: `folder` is a file, or on object
            storage.
    """
    folder = as_path(folder, "folder")
    require_local(folder, "folder of events")
    if folder.exists() and not folder.is_dir():
        raise RunError(
            f"{folder} is no folder, so no events can be written into it; choose another"
        )
    if find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "track")
    with ExitStack() as stack:
        opened: list[_EventFile] = []

        def log(line: dict[str, Any]) -> None:
            if not opened:
                opened.append(stack.enter_context(closing(_EventFile(folder, line["step"]))))
            opened[0].add(line["step"], _scalars(line))

        yield log


class _EventFile:
    """One file of events. TensorBoard's own writer has a thread, which prints a traceback when the
    disk is full."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: what earlier files of the folder say of later steps is shown no more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        begin = time.time()
        path = (
            folder / f"events.out.tfevents.{begin:.6f}.{os.getpid()}"
        )  # readers take files in the order of names
        self.file = path.open("xb")
        self.records = RecordWriter(self.file)
        self._write(Event(wall_time=begin, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=begin, step=first_step, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.file.flush()

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        self.file.close()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    dev = line["dev"]
    found = {name: line[name] for name in ("loss", "lr", "temperature") if line[name] is not None}
    found["dev/mean_recall"] = dev["mean_recall"]
    for way in ("image_to_text", "text_to_image"):
        found |= {f"dev/{way}/R@{k}": recall for k, recall in dev[way].items()}
    return found
