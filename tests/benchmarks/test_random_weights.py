"""Random weights in the place of pretrained ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apecache.encoders.load import load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError
from benchmarks.laws.random_weights import write_random


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
