"""Every format, kind of head and library of encoders: equal to the run, or refused with a reason."""

from pathlib import Path

import pytest

from apecache.errors import EncoderError
from benchmarks.quality.exports import EXACT, measure_cell
from benchmarks.small_encoders import HEADS, PAIRS, build_run

pytest.importorskip("open_clip")
pytest.importorskip("sentence_transformers")

HELD = {
    ("sentence-transformers", "timm + hf BERT", "linear"),
    ("sentence-transformers", "timm + hf BERT", "mlp"),
    ("sentence-transformers", "hf DINOv2 + hf CLIP", "linear"),
    ("sentence-transformers", "hf DINOv2 + hf CLIP", "mlp"),
    ("sentence-transformers", "hf CLIP + st", "linear"),
    ("sentence-transformers", "hf CLIP + st", "mlp"),
    ("open_clip", "timm + hf BERT", "linear"),
    ("transformers", "hf DINOv2 + hf CLIP", "linear"),
}
"""What formats without code of ours can hold; ONNX and the triple hold every run."""


def check_cell(tmp_path: Path, pair: str, head: str, format_name: str) -> None:
    try:
        run = build_run(tmp_path, pair, head)
    except EncoderError as error:
        # st: and open_clip: give no tokens, so no run has such a head on them.
        if head != "transformer on tokens":
            raise AssertionError(pair) from error
        return
    row = measure_cell(run, pair=pair, head=head, format_name=format_name)
    is_held = format_name in ("triple", "onnx") or (format_name, pair, head) in HELD
    assert (row["refused"] is None) == is_held, row
    if is_held:
        assert row["image difference"] < EXACT
        assert row["text difference"] < EXACT
    else:
        # The message says what fits, and what to do instead.
        assert "can hold" in row["refused"] or "projects" in row["refused"]
        assert "--to onnx" in row["refused"] or "open_clip_triple" in row["refused"]


@pytest.mark.parametrize("format_name", ["sentence-transformers", "open_clip", "transformers"])
@pytest.mark.parametrize("head", ["linear", "mlp", "gated"])
@pytest.mark.parametrize("pair", PAIRS)
def test_formats_of_other_libraries(
    tmp_path: Path,
    pair: str,
    head: str,
    format_name: str,
) -> None:
    check_cell(tmp_path, pair, head, format_name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_triple_opens_every_run(tmp_path: Path, pair: str, head: str) -> None:
    check_cell(tmp_path, pair, head, "triple")


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pair", PAIRS)
def test_graphs_of_every_run(tmp_path: Path, pair: str, head: str) -> None:
    pytest.importorskip("onnxruntime")
    check_cell(tmp_path, pair, head, "onnx")
