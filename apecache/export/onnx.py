"""Export heads as ONNX graphs; the extra `onnx` installs what this needs."""

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
    """Wrap a head so that its inputs are tensors alone."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded: Tensor = self.head(features, mask)
        return embedded


def export_onnx(heads: TrainedHeads, out: Path) -> list[str]:
    """Write `image.onnx`, `text.onnx` (opset 18) and `heads.json`.

    Inputs: `features` float32 [rows, in_dim]; for heads on tokens [rows, tokens, in_dim], and
    `mask` bool [rows, tokens], true for valid tokens. Output: `embeddings` float32 [rows, out_dim],
    L2-normalized. Any number of rows and tokens fits.

    Returns:
        The names of the files.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    _require_extra()
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        _export(getattr(heads, side).head, out / f"{side}.onnx")
    graphs = [f"{side}.onnx" for side in SIDES]
    return [*graphs, write_description(heads, out, opset=OPSET)]


def _export(head: Head, path: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    # Sizes above 1: the exporter takes a size of 0 or 1 for a constant.
    if head.spec.cut == "tokens":
        features = torch.zeros(3, 5, head.in_dim)
        mask = torch.ones(3, 5, dtype=torch.bool)
        inputs: tuple[Tensor, ...] = (features, mask)
        shapes: tuple[Any, ...] = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic})
    else:
        inputs = (torch.zeros(3, head.in_dim),)
        shapes = ({0: dynamic},)
    # Heads on pooled features have no mask.
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
    """Refuse to start without the packages, so that no half export is left."""
    for module in ("onnx", "onnxscript"):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(module, "onnx") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns about its own internals and optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
