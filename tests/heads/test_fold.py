"""A head that has taken up its standardization embeds as it did."""

from typing import Any

import pytest
import torch

from apecache.heads.build import build_heads
from apecache.heads.fold import folded, standardizes
from apecache.heads.head import Head, HeadSpec

SPECS = {
    "linear": HeadSpec(dim=5),
    "mlp": HeadSpec(kind="mlp", dim=5, width=7),
    "plain mlp with a direct way": HeadSpec(
        kind="mlp",
        dim=5,
        width=7,
        residual=False,
        norm="batch",
        skip=True,
    ),
    "several": HeadSpec(
        kind="ensemble",
        parts=(HeadSpec(dim=5), HeadSpec(kind="mlp", dim=3, width=4, skip=True)),
    ),
}


def fitted(spec: HeadSpec) -> tuple[Head, torch.Tensor]:
    torch.manual_seed(0)
    head, _ = build_heads(spec, text=spec, image_dim=6, text_dim=6)
    features = 3 + 10 * torch.rand(6) * torch.randn(50, 6)
    head.fit_statistics(features)
    return head.eval(), features


@pytest.mark.parametrize("name", SPECS)
def test_the_same_embeddings_without_statistics(name: str) -> None:
    head, features = fitted(SPECS[name])
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    made = folded(head)
    torch.testing.assert_close(made(features), head(features), rtol=0, atol=1e-5)
    assert not any(standardizes(part) for part in (made, *getattr(made, "parts", ())))
    assert not made.spec.standardize
    assert all(torch.equal(before[key], tensor) for key, tensor in head.state_dict().items())


@pytest.mark.parametrize("kind", ["gated", "fusemix", "identity"])
def test_what_begins_with_no_linear_layer_is_refused_if_it_standardizes(kind: Any) -> None:
    spec = HeadSpec(kind=kind, dim=None if kind == "identity" else 5)
    head, features = fitted(spec)
    with pytest.raises(ValueError, match=f"of kind {spec.kind} cannot take up its standardization"):
        folded(head)
    still, _ = fitted(spec.model_copy(update={"standardize": False}))
    assert torch.equal(folded(still)(features), still(features))
