"""Random weights in the place of pretrained ones, and shapes in float32."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apecache.encoders.load import load_text_encoder, shape_tower
from apecache.encoders.random_weights import write_random
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError


def test_random_weights_are_seeded_and_load_as_the_same_model(
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    spec = parse_encoder(f"hf:{tiny_text_encoder}", "text")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random(spec, tmp_path / name, seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    own = load_file(tiny_text_encoder / "model.safetensors")
    matrix = "encoder.layer.0.output.dense.weight"
    assert torch.equal(a[matrix], b[matrix])
    assert not torch.equal(a[matrix], c[matrix])
    assert not torch.equal(a[matrix], own[matrix])
    assert 0.015 < float(a[matrix].std()) < 0.025
    assert float(a["encoder.layer.0.output.LayerNorm.weight"].min()) == 1.0
    assert float(a["encoder.layer.0.output.dense.bias"].abs().max()) == 0.0
    random = load_text_encoder(parse_encoder(f"hf:{tmp_path / 'a'}", "text"), "cpu")
    assert random.fingerprint.digest != load_text_encoder(spec, "cpu").fingerprint.digest


def test_what_is_no_local_folder_has_no_random_weights(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="need a local folder"):
        write_random(EncoderSpec("hf", "some/model", "text"), tmp_path / "out", 0)


def test_shapes_of_half_precision_files_are_float32(
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_text_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tower = shape_tower(parse_encoder(f"hf:{folder}", "text"))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
