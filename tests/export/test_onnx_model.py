"""ONNX graphs of whole models compute what the run computes."""

import json
from pathlib import Path

import pytest

from apecache.export.check import HALF_TOLERANCE, INT8_TOLERANCE, TOLERANCE, compare_exported
from apecache.export.onnx_model import open_onnx_model, write_onnx_model
from apecache.export.whole_model import open_whole_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", TOLERANCE),
        pytest.param("float16", HALF_TOLERANCE, marks=pytest.mark.slow),
        pytest.param("int8", INT8_TOLERANCE, marks=pytest.mark.slow),
    ],
)
def test_graphs_of_both_sides(dtype: str, tolerance: float, tiny_run: Path, tmp_path: Path) -> None:
    model = open_whole_model(tiny_run)
    write_onnx_model(model, tmp_path, dtype)  # type: ignore[arg-type]
    suffix = {"float32": "", "float16": "_fp16", "int8": "_quantized"}[dtype]
    names = sorted(path.name for path in (tmp_path / "onnx").iterdir())
    assert names == [f"text_model{suffix}.onnx", f"vision_model{suffix}.onnx"]
    compare_exported(open_onnx_model(tmp_path, model), model, tolerance)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["crop_size"] == {"height": 32, "width": 32}
    assert (tmp_path / "tokenizer.json").is_file()
    description = json.loads((tmp_path / "apecache.json").read_text())
    assert description["dim"] == model.dim
    assert description["scale"] == model.run.scale
