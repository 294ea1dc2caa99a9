"""Heads as ONNX graphs. The only module that exports to ONNX; the extra `onnx` has what it
needs."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apecache.errors import MissingExtraError
from apecache.export.weights import SIDES, write_description
from apecache.heads.head import Head
from apecache.runs.heads import TrainedHeads

OPSET = 18


class _Graph(nn.Module):
    """A head with plain inputs."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded: Tensor = self.head(features, mask)
        return embedded


def export_onnx(heads: TrainedHeads, out: Path) -> list[str]:
    """`image.onnx`, `text.onnx` (opset 18) and `heads.json`. Returns the names of the files.

    Inputs: `features` float32 [rows, in_dim], or for heads on tokens [rows, tokens, in_dim] and
    `mask` bool [rows, tokens], true where there is a token. Output: `embeddings` float32 [rows,
    out_dim], L2-normalised. Rows are free; so are tokens.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    _require_extra()
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        _export(getattr(heads, side).head, out / f"{side}.onnx")
    return [*(f"{side}.onnx" for side in SIDES), write_description(heads, out, opset=OPSET)]


def _export(head: Head, path: Path) -> None:
    rows = torch.export.Dim.DYNAMIC
    if head.spec.cut == "tokens":
        inputs: tuple[Tensor, ...] = (
            torch.zeros(3, 5, head.in_dim),
            torch.ones(3, 5, dtype=torch.bool),
        )
        shapes: tuple[Any, ...] = ({0: rows, 1: rows}, {0: rows, 1: rows})
    else:
        inputs = (torch.zeros(3, head.in_dim),)
        shapes = ({0: rows},)
    names = ["features", "mask"][: len(inputs)]
    with _quiet():
        program: Any = torch.onnx.export(
            _Graph(head.cpu()).eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["embeddings"],
            dynamic_shapes=shapes,
            verbose=False,
        )
        program.save(str(path), external_data=False)


def _require_extra() -> None:
    for module in ("onnx", "onnxscript"):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "onnx") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own insides, and tells of optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
