"""How features of several encoders meet in a head."""

import pytest
import torch

from apecache.heads.build import build_heads
from apecache.heads.fold import folded
from apecache.heads.head import Head, HeadSpec
from apecache.heads.join import EncoderGate, LayerMix

TEXT = HeadSpec(kind="linear", dim=4)


def image_head(**settings: object) -> Head:
    spec = HeadSpec.model_validate({"kind": "linear", "dim": 4, **settings})
    return build_heads(spec, TEXT, image_dim=6, text_dim=3)[0].eval()


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "fusemix"])
@pytest.mark.parametrize("join", ["gate", "mix"])
def test_every_kind_of_head_takes_joined_features(kind: str, join: str) -> None:
    head = image_head(kind=kind, join=join, widths=(3, 3), width=5, skip=True)
    embedded = head(torch.randn(7, 6))
    assert embedded.shape == (7, 4)
    embedded.sum().backward()
    assert head.join is not None
    for parameter in head.join.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0  # a gate that never opens would have none


def test_a_new_gate_changes_nothing_and_a_trained_one_scales_each_encoder() -> None:
    gate = EncoderGate((2, 4))
    x = torch.randn(5, 6)
    assert torch.equal(gate(x), x)
    with torch.no_grad():
        gate.score.bias.copy_(torch.tensor([-50.0, 50.0]))
    assert torch.allclose(gate(x), torch.cat((0 * x[:, :2], 2 * x[:, 2:]), dim=1))


def test_a_new_mix_is_the_mean_and_a_trained_one_the_weighted_sum() -> None:
    mix = LayerMix((3, 3))
    x = torch.randn(5, 6)
    assert torch.allclose(mix(x), (x[:, :3] + x[:, 3:]) / 2)
    with torch.no_grad():
        mix.logits.copy_(torch.tensor([0.0, 50.0]))
    assert torch.allclose(mix(x), x[:, 3:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"join": "gate"}, "needs the features of several"),
        ({"join": "gate", "widths": (3, 4)}, "add up to 7; the features have 6"),
        ({"join": "mix", "widths": (2, 4)}, "of one width; found 2, 4"),
    ],
)
def test_widths_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_head(**settings)


def test_only_a_single_head_on_pooled_features_joins() -> None:
    for kind in ("transformer", "ensemble"):
        parts = (HeadSpec(),) if kind == "ensemble" else ()
        with pytest.raises(ValueError, match="single head on pooled features"):
            HeadSpec.model_validate({"kind": kind, "join": "gate", "parts": parts})


def test_widths_reach_the_parts_that_need_them() -> None:
    parts = (HeadSpec(dim=4), HeadSpec(dim=4, join="gate"))
    spec = HeadSpec(kind="ensemble", parts=parts).with_widths((2, 4))
    assert [part.widths for part in spec.parts] == [(), (2, 4)]
    assert HeadSpec(dim=4).with_widths((2, 4)) == HeadSpec(dim=4)


def test_a_gate_is_not_folded() -> None:
    head = image_head(join="gate", widths=(2, 4))
    head.mean.fill_(1.0)
    with pytest.raises(ValueError, match="join gate"):
        folded(head)
