"""Heads on tokens: what is trained above the last block of a frozen encoder. See `HeadSpec`.

Features [n, tokens, in_dim]; a mask bool [n, tokens] says which tokens are there (None: all).
Padding never has an influence: a row gives the same embedding whatever it is padded with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.head import Head, HeadSpec
from apecache.heads.normalization import normalize, without_autocast


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens: [n, tokens, dim] -> [n, dim]; zeros where no token is there."""
    if mask is None:
        return x.mean(1) if x.shape[1] else x.new_zeros(len(x), x.shape[2])
    kept = mask.unsqueeze(-1)
    return x.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp_min(1)


def pool(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """[n, tokens, dim] -> [n, dim]; see `HeadSpec.pooling`."""
    match how:
        case "cls":
            return x[:, 0]
        case "cls-and-mean":
            return x[:, 0] + masked_mean(x[:, 1:], None if mask is None else mask[:, 1:])
        case _:
            return masked_mean(x, mask)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (_split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, dim=-1))
        seen = None if mask is None else mask[:, None, None, :]
        mixed: Tensor = self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        )
        return mixed


class TransformerBlock(nn.Module):
    """Pre-norm: x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); the MLP four times
    as wide."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, n_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class Transformer(nn.Module):
    """Deep adapter: blocks, norm, pooling, Linear (LilT, Khan and Fu 2023, section 3.2)."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        heads = _n_heads(spec, in_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(in_dim, heads, spec.dropout) for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(in_dim)
        self.last = nn.Linear(in_dim, out_dim)
        self.pooling = spec.pooling

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        y: Tensor = self.last(pool(self.norm(x), mask, self.pooling))
        return y


class AttentionPool(nn.Module):
    """One learned query per head over keys and values of the normed tokens, dropout, Linear."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.n_heads = _n_heads(spec, in_dim)
        self.query = nn.Parameter(torch.randn(in_dim) * 0.02)
        self.norm = nn.LayerNorm(in_dim)
        self.keys_values = nn.Linear(in_dim, 2 * in_dim)
        self.dropout = nn.Dropout(spec.dropout)
        self.last = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (
            _split_heads(part, self.n_heads)
            for part in self.keys_values(self.norm(x)).chunk(2, dim=-1)
        )
        q = _split_heads(self.query.expand(len(x), 1, -1), self.n_heads)
        seen = None if mask is None else mask[:, None, None, :]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(1)
        y: Tensor = self.last(self.dropout(found))
        return y


class Anchors(nn.Module):
    """Embedding value k: the attention-weighted mean, over the tokens, of their cosines with anchor
    k; the attention is the softmax of those cosines with a learned temperature (0.1 at the
    start)."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.anchors = nn.Parameter(torch.randn(out_dim, in_dim) / math.sqrt(in_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        scores = _cosines(self.dropout(self.norm(x)), self.anchors)
        attention = self.log_scale.exp() * scores
        if mask is not None:
            attention = attention.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        y: Tensor = (attention.softmax(1) * scores).sum(1)
        return y


class Projector(nn.Module):
    """norm, then Linear(x) + MLP(x) per token, pooled; with `refine` one residual MLP and a norm
    after that (freeze-align, Maniparambil et al. 2024: the image's form pools `cls-and-mean`, the
    text's refines the mean)."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.linear = nn.Linear(in_dim, out_dim)
        self.mlp = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        self.dropout = nn.Dropout(spec.dropout)
        self.pooling = spec.pooling
        layers = (
            nn.Linear(out_dim, out_dim),
            nn.GELU(),
            nn.Linear(out_dim, out_dim),
            nn.Dropout(spec.dropout),
        )
        self.refine = nn.Sequential(*layers) if spec.refine else None
        self.last_norm = nn.LayerNorm(out_dim) if spec.refine else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm(x)
        pooled = pool(self.dropout(self.linear(x) + self.mlp(x)), mask, self.pooling)
        if self.refine is None or self.last_norm is None:
            return pooled
        y: Tensor = self.last_norm(pooled + self.refine(pooled))
        return y


class TokenHead(Head):
    """float [n, tokens, in_dim] and bool [n, tokens] -> float32 [n, out_dim], L2-normalised."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__(spec, in_dim, out_dim)
        self.body = self._build_body()
        self.direct = nn.Linear(in_dim, out_dim, bias=False) if spec.skip else None

    def _build_body(self) -> nn.Module:
        match self.spec.kind:
            case "transformer":
                return Transformer(self.spec, self.in_dim, self.out_dim)
            case "attention":
                return AttentionPool(self.spec, self.in_dim, self.out_dim)
            case "anchors":
                return Anchors(self.spec, self.in_dim, self.out_dim)
            case "projector":
                return Projector(self.spec, self.in_dim, self.out_dim)
        raise ValueError(f"a head of kind {self.spec.kind} needs pooled features, not tokens")

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:  # padding may hold anything, NaN too
            features = features.masked_fill(~mask.unsqueeze(-1), 0)
        x = self.standardised(features)
        y = self.body(x, mask)
        return normalize(
            y if self.direct is None else y + self.direct(masked_mean(x, mask)),
            dim=-1,
        )


def _cosines(x: Tensor, anchors: Tensor) -> Tensor:
    """[n, tokens, dim] and [k, dim] -> [n, tokens, k], in float32 under any autocast."""
    with without_autocast(x):
        return normalize(x) @ normalize(anchors).T


def _split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[n, tokens, dim] -> [n, heads, tokens, dim / heads]."""
    split: Tensor = x.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return split


def _n_heads(spec: HeadSpec, dim: int) -> int:
    """Raises ValueError if the features cannot be divided among the heads."""
    heads = spec.n_heads or max(1, dim // 64)
    if dim % heads:
        raise ValueError(
            f"{dim} features cannot be divided among {heads} attention heads; set n_heads"
        )
    return heads
