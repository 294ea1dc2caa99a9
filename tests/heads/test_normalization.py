"""Vectors are normalized, and compared, in float32 at least: in half precision and under autocast,
on any device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apecache.heads.build import build_head
from apecache.heads.head import HeadSpec
from apecache.heads.normalization import normalize, similarities
from apecache.losses.contrastive import Groups, grouped_info_nce, info_nce, sigmoid_loss
from apecache.losses.distillation import distil_classes, distil_contrastive
from apecache.losses.geometry import structure_divergence
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from apecache.metrics.retrieval import image_to_text_ranks

HALVES = [torch.bfloat16, torch.float16]
FLOAT_STEP = 1e-6
"""Of a float32 sum of some hundred terms: more than its rounding, a thousandth of that of
bfloat16."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [0, -1])
def test_half_precision_is_normalized_in_float32(dtype: torch.dtype, dim: int) -> None:
    x = drawn(200, 300, dtype=dtype)
    unit = normalize(x, dim=dim)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(
        unit.double(),
        F.normalize(x.double(), dim=dim),
        rtol=FLOAT_STEP,
        atol=FLOAT_STEP,
    )
    assert float((unit.double().norm(dim=dim) - 1).abs().max()) < FLOAT_STEP


def test_double_precision_is_kept() -> None:
    x = drawn(3, 5).double()
    assert torch.equal(normalize(x), F.normalize(x, dim=-1))


@pytest.mark.parametrize("dtype", HALVES)
def test_similarities_are_of_float32_under_autocast(dtype: torch.dtype) -> None:
    x = normalize(drawn(30, 64))
    y = normalize(drawn(40, 64, seed=1))
    with torch.autocast("cpu", dtype):
        found = similarities(x, y)
    torch.testing.assert_close(found.double(), x.double() @ y.double().T, rtol=0, atol=FLOAT_STEP)


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec(kind="linear"),
        HeadSpec(kind="identity"),
        HeadSpec(kind="mlp", width=32, skip=True),
        HeadSpec(kind="gated"),
        HeadSpec(kind="fusemix"),
        HeadSpec(kind="transformer", n_heads=2),
        HeadSpec(kind="attention", n_heads=2),
        HeadSpec(kind="anchors"),
        HeadSpec(kind="projector"),
    ],
    ids=lambda spec: spec.kind,
)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_head_gives_vectors_of_length_one_under_autocast(
    spec: HeadSpec,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    head = build_head(spec, 64, 64).eval()
    x = drawn(20, 6, 64) if spec.cut == "tokens" else drawn(20, 64)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        embedded = head(x.to(dtype))
    assert embedded.dtype == torch.float32
    assert float((embedded.double().norm(dim=-1) - 1).abs().max()) < FLOAT_STEP


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    own = torch.arange(24)
    groups = Groups(image=own // 2, text=own // 2)
    return {
        "info_nce": lambda x, y: info_nce(x, y, 100.0),
        "grouped": lambda x, y: grouped_info_nce(x, text=y, scale=100.0, groups=groups),
        "sigmoid": lambda x, y: sigmoid_loss(x, text=y, scale=100.0, bias=-10.0),
        "tiled": lambda x, y: tiled_info_nce(x, text=y, scale=100.0, groups=groups, tile=5),
        "tiled sigmoid": lambda x, y: tiled_sigmoid_loss(
            x,
            text=y,
            scale=100.0,
            bias=-10.0,
            tile=5,
        ),
        "structure": structure_divergence,
        "contrastive": lambda x, y: distil_contrastive(
            x,
            teacher=y,
            bank=y.roll(1, 1),
            scale=100.0,
        ),
        "classes": lambda x, y: distil_classes(100 * x, y.softmax(-1)),
    }


@pytest.mark.parametrize("name", losses())
@pytest.mark.parametrize("dtype", HALVES)
def test_losses_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    """Of float32 vectors under autocast, and of stored half precision: within 1e-4 of float64,
    where half precision is off by several per cent at a temperature of 0.01."""
    loss = losses()[name]
    x = normalize(drawn(24, 48))
    y = normalize(drawn(24, 48, seed=1))
    exact = loss(x.double(), y.double())
    with torch.autocast("cpu", dtype):
        under = loss(x, y)
    assert under.dtype == torch.float32
    torch.testing.assert_close(under.double(), exact, rtol=1e-4, atol=1e-6)
    if name != "classes":  # its inputs are multiplied by the test itself
        low = loss(x.to(dtype), y.to(dtype))
        stored = loss(x.to(dtype).double(), y.to(dtype).double())
        torch.testing.assert_close(low.double(), stored, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_ranks_of_half_precision_are_those_of_its_values(dtype: torch.dtype) -> None:
    """Cosines that differ by 0.0001 are ties in bfloat16."""
    image = normalize(drawn(50, 32)).to(dtype)
    text = normalize(image.float() + 0.3 * drawn(50, 32, seed=1)).to(dtype)
    own = torch.arange(50)
    expected = image_to_text_ranks(image.double(), text.double(), own)
    assert torch.equal(image_to_text_ranks(image, text, own), expected)


class Projection(nn.Module):
    """A head at the end of an exported model."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = build_head(HeadSpec(kind="anchors"), 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.head(x)
        return embedded


def test_an_exported_head_holds_no_autocast() -> None:
    program = torch.export.export(Projection().eval(), (drawn(2, 3, 8),))
    assert "autocast" not in str(program.graph)
