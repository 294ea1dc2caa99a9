"""Heads on pooled features: what they compute, how many parameters they train, how their widths
meet."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from apecache.heads.build import build_head, build_heads
from apecache.heads.head import HeadSpec, embed
from apecache.heads.pooled import PooledHead, ResidualBlock

SPECS = {
    "identity": HeadSpec(kind="identity"),
    "linear": HeadSpec(kind="linear"),
    "mlp": HeadSpec(kind="mlp", depth=2, width=16),
    "mlp with skip": HeadSpec(
        kind="mlp",
        depth=1,
        width=8,
        skip=True,
        activation="relu",
        expansion=2.5,
    ),
    "plain mlp": HeadSpec(kind="mlp", depth=2, width=8, residual=False, norm="batch"),
    "gated": HeadSpec(kind="gated", expansion=2.0),
    "fusemix": HeadSpec(kind="fusemix", depth=2, expansion=2.0, skip=True),
}


def features(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def make(spec: HeadSpec, in_dim: int, out_dim: int, seed: int = 0) -> PooledHead:
    torch.manual_seed(seed)
    return PooledHead(spec, in_dim, out_dim).eval()


def n_trained(*heads: nn.Module) -> int:
    return sum(p.numel() for head in heads for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
def test_every_head_gives_float32_unit_vectors_of_the_asked_width(
    name: str,
    dtype: torch.dtype,
) -> None:
    out_dim = 12 if name == "identity" else 5
    embedded = make(SPECS[name], 12, out_dim)(features(9, 12).to(dtype))
    assert embedded.shape == (9, out_dim)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(9))


def test_an_identity_head_only_normalizes() -> None:
    head = make(HeadSpec(kind="identity", standardize=False), 4, 4)
    x = features(3, 4) * 50 + 7
    head.fit_statistics(x)
    torch.testing.assert_close(head(x), F.normalize(x, dim=-1), rtol=0, atol=0)
    assert n_trained(head) == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_linear_head_trains_weights_and_a_bias(in_dim: int, out_dim: int) -> None:
    assert (
        n_trained(PooledHead(HeadSpec(kind="linear"), in_dim, out_dim))
        == in_dim * out_dim + out_dim
    )


def test_the_two_projections_of_lilt_have_393728_parameters() -> None:
    spec = HeadSpec(kind="linear", dim=256)
    assert n_trained(*build_heads(spec, text=spec, image_dim=768, text_dim=768)) == 393_728


def test_a_linear_head_is_one_affine_map_of_the_standardized_features() -> None:
    head = make(HeadSpec(kind="linear"), 6, 4)
    x = features(20, 6) * 3 + 1
    head.fit_statistics(x)
    weight, bias = head.parameters()
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    wanted = F.normalize(standard @ weight.T + bias, dim=-1)
    torch.testing.assert_close(head(x), wanted)


def by_definition(head: PooledHead, x: Tensor) -> Tensor:
    """A gated or FuseMix head in double precision, from nothing but its state."""
    state = iter(
        tensor.double() for name, tensor in head.state_dict().items() if name.startswith("body")
    )

    def linear(value: Tensor) -> Tensor:
        weight = next(state)
        bias = next(state)
        return value @ weight.T + bias

    def norm(value: Tensor) -> Tensor:
        mean = value.mean(-1, keepdim=True)
        variance = value.var(-1, keepdim=True, correction=0)
        return (value - mean) / (variance + 1e-5).sqrt() * next(state) + next(state)

    y = x.double()
    if head.spec.kind == "gated":
        z = norm(y)
        gate = linear(z).clamp(0, 6)
        return F.normalize(linear(gate * linear(z)), dim=-1)
    for _ in range(head.spec.depth):
        y = y + linear(F.gelu(linear(norm(y))))
    return F.normalize(linear(norm(y)), dim=-1)


@pytest.mark.parametrize("kind", ["gated", "fusemix"])
def test_gated_and_fusemix_heads_compute_what_their_papers_say(kind: str) -> None:
    spec = HeadSpec.model_validate(
        {"kind": kind, "depth": 3, "expansion": 1.5, "standardize": False}
    )
    head = make(spec, 5, 4)
    randomize_norms(head)
    x = features(9, 5) * 4
    torch.testing.assert_close(head(x).double(), by_definition(head, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (HeadSpec(kind="gated", expansion=8), 2 * 7 + 2 * (7 * 56 + 56) + 56 * 4 + 4),
        (
            HeadSpec(kind="fusemix", depth=4, expansion=4),
            4 * (14 + 7 * 28 + 28 + 28 * 7 + 7) + 14 + 7 * 4 + 4,
        ),
        (
            HeadSpec(kind="fusemix", depth=1, expansion=4, skip=True),
            14 + 2 * 196 + 35 + 14 + 32 + 28,
        ),
    ],
)
def test_parameters_of_the_later_kinds_are_counted_as_their_layers_have_them(
    spec: HeadSpec,
    wanted: int,
) -> None:
    assert n_trained(build_head(spec, 7, 4)) == wanted


def test_a_dictionary_keeps_the_largest_similarities_to_its_entries() -> None:
    head = make(HeadSpec(kind="dictionary", top=2, power=3, standardize=False), 3, 4)
    entries = F.normalize(torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [-1, 0, 0]]), dim=-1)
    head.load_state_dict({"body.entries": entries}, strict=False)
    x = torch.tensor([[3.0, 1, 0], [-2, 0, 0]])
    cosines = F.normalize(x, dim=-1) @ entries.T
    wanted = torch.zeros(2, 4)
    wanted[0, :2] = cosines[0, :2] ** 3
    wanted[1, 3] = 1  # the second largest is 0 or less
    torch.testing.assert_close(head(x), F.normalize(wanted, dim=-1))
    assert n_trained(head) == 0


def test_several_heads_stand_side_by_side_and_a_cosine_is_the_mean_of_theirs() -> None:
    torch.manual_seed(0)
    image = HeadSpec(
        kind="ensemble",
        parts=(HeadSpec(dim=4), HeadSpec(kind="identity"), HeadSpec(standardize=False)),
    )
    text = HeadSpec(
        kind="ensemble",
        parts=(HeadSpec(), HeadSpec(kind="mlp", width=8), HeadSpec(kind="gated", dim=3)),
    )
    sides = [head.eval() for head in build_heads(image, text=text, image_dim=6, text_dim=5)]
    x = features(8, 6) * 3 + 1, features(8, 5, seed=1)
    for head, part in zip(sides, x, strict=True):
        head.fit_statistics(part)
    cosines = sides[0](x[0]) @ sides[1](x[1]).T
    alone = [[single(part) for single in side.parts] for side, part in zip(sides, x, strict=True)]
    wanted = sum(a @ b.T for a, b in zip(*alone, strict=True)) / 3
    torch.testing.assert_close(cosines, wanted)
    assert sides[0].widths == sides[1].widths == [4, 6, 3]
    assert sides[0].out_dim == 13
    assert sides[0].parts[2].mean.abs().sum() == 0
    torch.testing.assert_close(sides[0].parts[0].mean, x[0].mean(0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "ensemble"}, "go together"),
        ({"parts": [{}]}, "go together"),
        (
            {"kind": "ensemble", "parts": [{"kind": "ensemble", "parts": [{}]}]},
            "parts are single heads",
        ),
        (
            {"kind": "ensemble", "parts": [{}, {"kind": "anchors"}]},
            "all on pooled features or all on tokens",
        ),
    ],
)
def test_parts_that_make_no_sense_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HeadSpec.model_validate(spec)


def test_parts_meet_one_by_one() -> None:
    two = HeadSpec(kind="ensemble", parts=(HeadSpec(dim=4), HeadSpec(dim=4)))
    with pytest.raises(ValueError, match="as many parts: image 2, text 0"):
        build_heads(two, text=HeadSpec(dim=4), image_dim=6, text_dim=5)
    with pytest.raises(ValueError, match="different widths: image 4, text 3"):
        build_heads(
            two,
            text=HeadSpec(kind="ensemble", parts=(HeadSpec(), HeadSpec(dim=3))),
            image_dim=6,
            text_dim=5,
        )


def test_views_are_embedded_one_by_one_and_averaged() -> None:
    head = make(HeadSpec(kind="mlp", width=8), 5, 4)
    views = features(18, 5).view(6, 3, 5)
    wanted = F.normalize(sum(head(views[:, i]) for i in range(3)).detach(), dim=-1)
    torch.testing.assert_close(embed(head, views, batch=4), wanted)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("skip", [True, False])
def test_an_mlp_computes_what_its_description_says(
    residual: bool,
    norm: str,
    activation: str,
    skip: bool,
) -> None:
    spec = HeadSpec.model_validate(
        {"kind": "mlp", "depth": 2, "width": 6, "expansion": 1.5, "standardize": False}
        | {"residual": residual, "norm": norm, "activation": activation, "skip": skip}
    )
    head = make(spec, 5, 4)
    randomize_norms(head)
    state = iter(
        tensor.double() for name, tensor in head.state_dict().items() if name.startswith("body")
    )
    x = features(7, 5).double()

    def linear(value: Tensor) -> Tensor:
        weight = next(state)
        bias = next(state)
        return value @ weight.T + bias

    def normalize(value: Tensor) -> Tensor:
        if norm == "none":
            return value
        weight = next(state)
        bias = next(state)
        if norm == "batch":
            mean = next(state)
            variance = next(state)
            _ = next(state)
        else:
            mean = value.mean(-1, keepdim=True)
            variance = (value - mean).square().mean(-1, keepdim=True)
        return (value - mean) / (variance + 1e-5).sqrt() * weight + bias

    act = torch.relu if activation == "relu" else F.gelu
    if residual:
        y = linear(x)
        for _ in range(2):
            y = y + linear(act(linear(normalize(y))))
        y = linear(normalize(y))
    else:
        y = linear(act(normalize(linear(act(normalize(linear(x)))))))
    if skip:
        assert head.direct is not None
        y = y + x @ head.direct.weight.detach().double().T
    assert next(state, None) is None
    torch.testing.assert_close(
        head(x.float()).double(),
        F.normalize(y, dim=-1),
        rtol=1e-4,
        atol=1e-6,
    )


def randomize_norms(head: nn.Module) -> None:
    """Weights, biases and running statistics as a training would leave them: positive, none of them
    0 or 1."""
    for module in head.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2)


@settings(deadline=None, max_examples=30)
@given(
    in_dim=st.integers(1, 9),
    out_dim=st.integers(1, 9),
    depth=st.integers(1, 4),
    width=st.integers(1, 12),
    expansion=st.sampled_from([0.01, 0.5, 1.0, 4.0]),
    skip=st.booleans(),
    residual=st.booleans(),
    norm=st.sampled_from(["layer", "batch", "none"]),
)
def test_an_mlp_trains_as_many_parameters_as_its_layers_have(
    in_dim: int,
    out_dim: int,
    depth: int,
    width: int,
    expansion: float,
    skip: bool,
    residual: bool,
    norm: str,
) -> None:
    spec = HeadSpec.model_validate(
        {"kind": "mlp", "depth": depth, "width": width, "expansion": expansion}
        | {"skip": skip, "residual": residual, "norm": norm}
    )
    inner = max(1, round(width * expansion))
    norms = 0 if norm == "none" else 2 * width
    first = in_dim * width + width
    last = width * out_dim + out_dim
    if residual:
        wanted = (
            first
            + depth * (norms + (width * inner + inner) + (inner * width + width))
            + norms
            + last
        )
    else:
        wanted = first + (depth - 1) * (width * width + width) + depth * norms + last
    assert n_trained(PooledHead(spec, in_dim, out_dim)) == wanted + skip * in_dim * out_dim


def test_a_residual_block_whose_branch_is_silent_passes_its_input_on() -> None:
    block = ResidualBlock(HeadSpec(kind="mlp", width=8, expansion=2.0))
    last = block.branch[3]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    x = features(4, 8)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["identity", "linear"])
def test_skip_adds_nothing_where_the_head_is_a_direct_map_already(kind: str) -> None:
    plain, skipping = (make(HeadSpec(kind=kind, skip=skip), 4, 4) for skip in (False, True))
    assert n_trained(plain) == n_trained(skipping)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("linear", "input_dropout"),
        ("identity", "input_dropout"),
        ("mlp", "input_dropout"),
        ("mlp", "dropout"),
        ("plain mlp", "dropout"),
    ],
)
def test_dropout_acts_in_training_only(name: str, which: str) -> None:
    head = make(SPECS[name].model_copy(update={which: 0.5, "norm": "none"}), 12, 12)
    x = features(6, 12)
    torch.testing.assert_close(head(x), head(x), rtol=0, atol=0)
    head.train().requires_grad_(False)
    assert not torch.equal(head(x), head(x))


def test_statistics_standardize_each_training_feature() -> None:
    head = make(HeadSpec(kind="identity"), 3, 3)
    x = features(50, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, 0.0, -900.0])
    head.fit_statistics(x)
    standard = (x - head.mean) / head.deviation
    torch.testing.assert_close(standard.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(head(x), F.normalize(standard, dim=-1))


@pytest.mark.parametrize("constant", [0.0, 0.1, -777.7, 1000.1, 65504.0])
@pytest.mark.parametrize("n", [1, 3, 5500])
def test_a_constant_feature_keeps_deviation_one(constant: float, n: int) -> None:
    head = make(HeadSpec(kind="identity"), 2, 2)
    x = torch.stack([features(n, 1).flatten(), torch.full((n,), constant)], dim=1)
    head.fit_statistics(x)
    assert head.deviation[1] == 1
    assert head.mean[1] == pytest.approx(constant, rel=1e-5)
    assert torch.isfinite(head(x)).all()


def test_statistics_of_half_precision_features_do_not_overflow() -> None:
    head = make(HeadSpec(kind="identity"), 2, 2)
    x = torch.tensor([[60000.0, 1.0], [50000.0, 2.0], [65000.0, 3.0], [55000.0, 4.0]])
    head.fit_statistics(x.half())
    torch.testing.assert_close(head.mean, x.half().float().mean(0))
    torch.testing.assert_close(head.deviation, x.half().float().std(0, correction=0))


def test_without_standardize_features_are_taken_as_they_are() -> None:
    head = make(HeadSpec(kind="linear", standardize=False), 3, 2)
    head.fit_statistics(features(9, 3) * 4 + 2)
    assert head.mean.tolist() == [0, 0, 0]
    assert head.deviation.tolist() == [1, 1, 1]


def test_statistics_are_saved_with_the_head_and_never_trained() -> None:
    head = make(HeadSpec(kind="linear"), 3, 2)
    assert {"mean", "deviation"} <= head.state_dict().keys()
    assert {"mean", "deviation"}.isdisjoint(dict(head.named_parameters()))


@pytest.mark.parametrize(
    ("image", "text", "width"),
    [
        (HeadSpec(kind="identity"), HeadSpec(kind="mlp", width=4), 10),
        (HeadSpec(kind="linear"), HeadSpec(kind="identity"), 7),
        (HeadSpec(kind="linear", dim=3), HeadSpec(kind="mlp", width=4), 3),
        (HeadSpec(kind="linear", dim=3), HeadSpec(kind="linear", dim=3), 3),
        (HeadSpec(kind="identity"), HeadSpec(kind="linear", dim=10), 10),
    ],
)
def test_a_side_without_a_width_takes_that_of_the_other(
    image: HeadSpec,
    text: HeadSpec,
    width: int,
) -> None:
    first, second = build_heads(image, text=text, image_dim=10, text_dim=7)
    assert first(features(2, 10)).shape == second(features(2, 7)).shape == (2, width)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (HeadSpec(dim=3), HeadSpec(dim=4), "image 3, text 4"),
        (HeadSpec(kind="identity"), HeadSpec(dim=4), "image 10, text 4"),
        (HeadSpec(kind="identity"), HeadSpec(kind="identity"), "image 10, text 7"),
        (HeadSpec(), HeadSpec(kind="mlp"), "neither head has a width; give dim"),
    ],
)
def test_widths_that_cannot_meet_are_refused(image: HeadSpec, text: HeadSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_heads(image, text=text, image_dim=10, text_dim=7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "perceptron"},
        {"dim": 0},
        {"dim": -3},
        {"depth": 0},
        {"depth": 65},
        {"width": 0},
        {"expansion": 0.0},
        {"expansion": float("inf")},
        {"expansion": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"input_dropout": 1.0},
        {"norm": "group"},
        {"activation": "tanh"},
        {"size": 3},
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HeadSpec.model_validate(wrong)
