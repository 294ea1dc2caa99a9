"""ONNX graphs of whole models compute what the run computes."""

from pathlib import Path

import pytest

from apecache.export.check import HALF_TOLERANCE, INT8_TOLERANCE, TOLERANCE, compare_exported
from apecache.export.onnx_model import open_onnx_model, write_onnx_model
from apecache.export.whole_model import open_whole_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", TOLERANCE), ("float16", HALF_TOLERANCE), ("int8", INT8_TOLERANCE)],
)
def test_graphs_of_both_sides(dtype: str, tolerance: float, tiny_run: Path, tmp_path: Path) -> None:
    model = open_whole_model(tiny_run)
    write_onnx_model(model, tmp_path, dtype)  # type: ignore[arg-type]
    print(compare_exported(open_onnx_model(tmp_path, model), model, tolerance))
