"""The notebook runs from images to a plot, and names neither a machine nor a path."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_shapes

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "images_to_plot.ipynb"
PARAMETERS = """
import apecache

TABLE = "shapes/pairs.tsv"
OUT = "images-to-plot"
IMAGE = "timm:{image}"
TEXT = "hf:{text}"
RECIPE = apecache.load_recipe("projection", ["schedule.epochs=2"])
"""
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
resources = {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.mark.slow
def test_it_runs_from_images_to_a_plot(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    pytest.importorskip("nbclient")
    make_shapes(tmp_path / "shapes", copies=4)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    (parameters,) = [
        cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())
    ]
    parameters["source"] = PARAMETERS.format(image=tiny_image_encoder, text=tiny_text_encoder)
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-c", EXECUTE, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [
        output
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for output in cell.get("outputs", ())
    ]
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(plots) == 2
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    # The bars of the extraction and of the fit.
    assert re.search(r"image: 100%.*48/48", shown)
    assert re.search(r"epochs: 100%.*2/2", shown)


def test_it_names_neither_a_machine_nor_a_path() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", ()):
            assert output["output_type"] in ("display_data", "execute_result")
            text = "".join(output["data"].get("text/plain", ""))
            assert not re.search(r"(?:^|[\s'\"(=])[~/]\w|\\\\|://", text), text
    assert NOTEBOOK.stat().st_size < 300_000
