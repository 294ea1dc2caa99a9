"""Export heads alone as ONNX graphs, for programs that have the encoders."""

from pathlib import Path

import torch
from torch import Tensor, nn

from apecache.export.onnx_graph import OPSET, export_graph, require_onnx
from apecache.export.weights import SIDES, write_description
from apecache.heads.head import Head
from apecache.runs.heads import TrainedHeads


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
    require_onnx()
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        _export(getattr(heads, side).head, out / f"{side}.onnx")
    graphs = [f"{side}.onnx" for side in SIDES]
    return [*graphs, write_description(heads, out, opset=OPSET)]


def _export(head: Head, path: Path) -> None:
    # Heads on pooled features have no mask.
    if head.spec.cut == "tokens":
        inputs = [torch.zeros(3, 5, head.in_dim), torch.ones(3, 5, dtype=torch.bool)]
        axes: list[tuple[int, ...]] = [(0, 1), (0, 1)]
    else:
        inputs = [torch.zeros(3, head.in_dim)]
        axes = [(0,)]
    export_graph(
        _Graph(head.cpu()).eval(),
        inputs=inputs,
        input_names=["features", "mask"][: len(inputs)],
        output_name="embeddings",
        dynamic_axes=axes,
        path=path,
    )
