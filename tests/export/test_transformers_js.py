"""transformers.js opens the ONNX folder in Node and gives the same vectors.

Needs Node, and APECACHE_NODE_MODULES: a folder in which `npm install @huggingface/transformers` ran.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import apecache
from apecache.export.export_run import ExportRunSpec, export_run
from benchmarks.small_encoders import build_run

SCRIPT = Path(__file__).with_name("transformers_js.mjs")
TEXTS = ["a photo of two dogs", "snow"]


@pytest.mark.slow
def test_vectors_in_node_are_those_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    modules = os.environ.get("APECACHE_NODE_MODULES")
    if not modules or shutil.which("node") is None:
        pytest.skip("Node or APECACHE_NODE_MODULES (npm install @huggingface/transformers) missing")
    run = build_run(tmp_path / "made", "timm + hf BERT", "linear")
    export_run(run, tmp_path / "out", spec=ExportRunSpec(to="onnx"))
    # Of the model's own size: browsers resize in another way than Pillow.
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    arguments = [modules, tmp_path, "out", tmp_path / "photo.png", tmp_path / "texts.json"]
    result = subprocess.run(
        ["node", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    model = apecache.load(run, device="cpu")
    image = model.encode_image([str(tmp_path / "photo.png")])
    text = model.encode_text(TEXTS)
    assert np.abs(np.array(found["image"]) - image).max() < 1e-4
    assert np.abs(np.array(found["text"]) - text).max() < 1e-4
    cosines = np.array(found["image"]) @ np.array(found["text"]).T
    assert np.abs(cosines - image @ text.T).max() < 1e-3
