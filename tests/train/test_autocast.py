"""The type in which towers compute, where the user leaves it open."""

from typing import Any

import pytest
import torch

from apecache.train.encoder_data import FitEncoderSpec


@pytest.mark.parametrize(
    ("autocast", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("float32", "cuda", False),
        ("bfloat16", "cpu", True),
    ],
)
def test_towers_compute_in_bfloat16_on_cuda_unless_told_otherwise(
    autocast: Any,
    device: str,
    expected: bool,
) -> None:
    spec = FitEncoderSpec(autocast=autocast)
    assert spec.uses_bfloat16(torch.device(device)) is expected
