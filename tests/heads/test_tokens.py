"""Heads on tokens: what they compute, that padding has no influence, how many parameters they
train."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.build import build_head, build_heads
from apecache.heads.head import Head, HeadSpec, embed
from apecache.heads.tokens import Anchors, TransformerBlock, masked_mean, pool

SPECS = {
    "transformer": HeadSpec(kind="transformer", depth=2, n_heads=2, dropout=0.2),
    "attention": HeadSpec(kind="attention", n_heads=2, input_dropout=0.2),
    "anchors": HeadSpec(kind="anchors", dropout=0.2),
    "projector of images": HeadSpec(kind="projector", pooling="cls-and-mean", dropout=0.2),
    "projector of texts": HeadSpec(kind="projector", refine=True, dropout=0.2),
    "with a skip": HeadSpec(kind="attention", n_heads=2, skip=True, standardize=False, dropout=0.2),
}


def tokens(n: int = 5, length: int = 7, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, length, dim, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def make(spec: HeadSpec, in_dim: int = 8, out_dim: int = 6) -> Head:
    torch.manual_seed(0)
    return build_head(spec, in_dim, out_dim).eval()


def n_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SPECS)
def test_padding_has_no_influence_whatever_it_holds(name: str) -> None:
    head = make(SPECS[name])
    x = tokens()
    lengths = torch.tensor([7, 3, 1, 2, 5])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    head.fit_statistics(x, mask)
    wanted = torch.cat([head(x[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(wanted.norm(dim=-1), torch.ones(5))
    for junk in (0.0, 1e4, float("nan")):
        padded = x.masked_fill(~mask.unsqueeze(-1), junk)
        torch.testing.assert_close(head(padded, mask), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            embed(head, padded, lengths, batch=2),
            wanted,
            rtol=1e-4,
            atol=1e-5,
        )
    assert not torch.allclose(head(x), wanted)


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_gets_a_gradient_from_the_start(name: str) -> None:
    head = make(SPECS[name]).train()
    mask = torch.ones(5, 7, dtype=torch.bool)
    (head(tokens(), mask) @ torch.randn(6)).sum().backward()
    silent = {n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent <= {"body.keys_values.bias", "body.blocks.0.attention.qkv.bias"}


@pytest.mark.parametrize("name", SPECS)
def test_dropout_acts_in_training_only(name: str) -> None:
    head = make(SPECS[name])
    x = tokens()
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


def test_statistics_are_those_of_the_tokens_that_are_there() -> None:
    head = make(SPECS["anchors"])
    x = tokens()
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 2, 5]).unsqueeze(1)
    head.fit_statistics(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
    torch.testing.assert_close(head.mean, x[mask].mean(0))
    torch.testing.assert_close(head.deviation, x[mask].std(0, correction=0))


@pytest.mark.parametrize("masked", [True, False])
def test_pooling_is_what_its_name_says(masked: bool) -> None:
    x = tokens()
    lengths = torch.tensor([7, 3, 1, 2, 5]) if masked else torch.full((5,), 7)
    mask = torch.arange(7) < lengths.unsqueeze(1) if masked else None
    means = torch.stack([row[:n].mean(0) for row, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(pool(x, mask, "mean"), means)
    torch.testing.assert_close(pool(x, mask, "cls"), x[:, 0])
    rest = torch.stack(
        [row[1:n].sum(0) / max(1, n - 1) for row, n in zip(x, lengths.tolist(), strict=True)]
    )
    torch.testing.assert_close(pool(x, mask, "cls-and-mean"), x[:, 0] + rest)
    assert masked_mean(x[:, :0], None).shape == (5, 8)


def test_a_transformer_block_is_torchs_own() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 0.0)
    x = tokens()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, norm_first=True, batch_first=True)
    names = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
    }
    ours = {
        "self_attn.out_proj": block.attention.out,
        "linear1": block.mlp[0],
        "linear2": block.mlp[2],
    }
    ours |= {"norm1": block.norm1, "norm2": block.norm2}
    names |= {
        f"{name}.{part}": getattr(module, part)
        for name, module in ours.items()
        for part in ("weight", "bias")
    }
    theirs.load_state_dict(names)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 2, 5]).unsqueeze(1)
    wanted = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(block(x, mask)[mask], wanted[mask], rtol=1e-4, atol=1e-5)


def test_the_deep_adapter_of_lilt_has_a_vit_blocks_parameters() -> None:
    """One block of ViT-B: 7,087,872; its final norm 1,536; the projection 196,864."""
    with torch.device("meta"):
        assert n_trained(TransformerBlock(768, 12, 0.0)) == 7_087_872
        head = build_head(HeadSpec(kind="transformer", depth=1), 768, 256)
    assert n_trained(head) == 7_087_872 + 1_536 + 196_864
    assert head.body.blocks[0].attention.n_heads == 12


def test_anchors_score_as_the_attention_weighted_mean_of_cosines() -> None:
    torch.manual_seed(0)
    anchors = Anchors(HeadSpec(kind="anchors"), 8, 3)
    x = tokens(n=2)
    normed = F.layer_norm(x, (8,))
    wanted = torch.zeros(2, 3)
    for i in range(2):
        for k in range(3):
            cosines = F.cosine_similarity(normed[i], anchors.anchors[k].detach(), dim=-1)
            wanted[i, k] = ((10 * cosines).softmax(0) * cosines).sum()
    torch.testing.assert_close(anchors(x, None), wanted)


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match="10 features cannot be divided among 3 attention heads; set n_heads",
    ):
        build_heads(
            HeadSpec(kind="transformer", dim=4, n_heads=3),
            text=HeadSpec(dim=4),
            image_dim=10,
            text_dim=5,
        )
