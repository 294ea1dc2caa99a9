"""Define heads on tokens, which are trained above the last block of a frozen encoder.

Features are [n, tokens, in_dim]. A mask, bool [n, tokens], marks the valid tokens (None: all).
Padding has no influence: a row gives the same embedding whatever it is padded with. `HeadSpec`
describes the kinds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.head import Head, HeadSpec, in_sequence
from apecache.heads.normalization import normalize, without_autocast


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average valid tokens, [n, tokens, dim] -> [n, dim]; rows without any give zeros."""
    if mask is None:
        # The mean over no tokens would be NaN.
        return x.mean(1) if x.shape[1] else x.new_zeros(len(x), x.shape[2])
    # Masked before the sum, because padding may be NaN and NaN times 0 is NaN.
    is_token = mask.unsqueeze(-1)
    total = x.masked_fill(~is_token, 0).sum(1)
    return total / is_token.sum(1).clamp_min(1)


def pool(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Pool tokens, [n, tokens, dim] -> [n, dim]; `HeadSpec.pooling` lists the ways."""
    match how:
        case "cls":
            return x[:, 0]
        case "cls-and-mean":
            # The first token is added by itself, so the mean leaves it out.
            later_mask = None if mask is None else mask[:, 1:]
            return x[:, 0] + masked_mean(x[:, 1:], later_mask)
        case _:
            return masked_mean(x, mask)


class SelfAttention(nn.Module):
    """Attend from every token to all valid tokens, [n, tokens, dim] -> [n, tokens, dim]."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (_split_heads(projection, self.n_heads) for projection in projections)
        # [n, 1, 1, tokens], so that it broadcasts over heads and queries.
        attention_mask = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        merged = attended.transpose(1, 2).flatten(2)
        mixed: Tensor = self.out(merged)
        return mixed


class TransformerBlock(nn.Module):
    """Apply pre-norm attention, then a pre-norm MLP four times as wide, both residual.

    x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))).
    """

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
    """Apply blocks, norm, pooling, Linear: the deep adapter of LilT.

    Source: Khan and Fu 2023, section 3.2.
    """

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
        pooled = pool(self.norm(x), mask, self.pooling)
        y: Tensor = self.last(pooled)
        return y


class AttentionPool(nn.Module):
    """Attend with one learned query per head to the normed tokens, then dropout and Linear."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.n_heads = _n_heads(spec, in_dim)
        # Small at first: attention begins close to the mean over all tokens.
        self.query = nn.Parameter(torch.randn(in_dim) * 0.02)
        self.norm = nn.LayerNorm(in_dim)
        self.keys_values = nn.Linear(in_dim, 2 * in_dim)
        self.dropout = nn.Dropout(spec.dropout)
        self.last = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = self.keys_values(self.norm(x)).chunk(2, dim=-1)
        k, v = (_split_heads(projection, self.n_heads) for projection in projections)
        q = _split_heads(self._queries(len(x)), self.n_heads)
        attention_mask = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        merged = attended.transpose(1, 2).flatten(1)
        y: Tensor = self.last(self.dropout(merged))
        return y

    def _queries(self, n: int) -> Tensor:
        """Return the query of each of n rows, [n, 1, in_dim]."""
        return self.query.expand(n, 1, -1)


class Anchors(nn.Module):
    """Compare tokens with learned anchors.

    Embedding value k is the attention-weighted mean, over the tokens, of their cosines with anchor
    k. The attention is the softmax of those cosines with a learned temperature (0.1 at the start).
    """

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        # Of about length 1, whatever the width of the features.
        self.anchors = nn.Parameter(torch.randn(out_dim, in_dim) / math.sqrt(in_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        scores = self._scores(self.dropout(self.norm(x)))
        attention = self._scales(len(x)) * scores
        if mask is not None:
            # Padding takes no share of the attention.
            attention = attention.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        y: Tensor = (attention.softmax(1) * scores).sum(1)
        return y

    def _scores(self, x: Tensor) -> Tensor:
        """Return the cosines of tokens and anchors, [n, tokens, dim] -> [n, tokens, out_dim]."""
        return _cosines(x, self.anchors)

    def _scales(self, _: int) -> Tensor:
        """Return the factor of the cosines, which broadcasts to [n, tokens, out_dim]."""
        return self.log_scale.exp()


class Projector(nn.Module):
    """Apply norm, then Linear(x) + MLP(x) per token, then pooling.

    With `refine`, one residual MLP and a norm come after the pooling. Source: freeze-align,
    Maniparambil et al. 2024, where images pool `cls-and-mean` and texts refine the mean.
    """

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
        self.refine = in_sequence(layers) if spec.refine else None
        self.last_norm = nn.LayerNorm(out_dim) if spec.refine else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm(x)
        projected = self.dropout(self.linear(x) + self.mlp(x))
        pooled = pool(projected, mask, self.pooling)
        if self.refine is None or self.last_norm is None:
            return pooled
        y: Tensor = self.last_norm(pooled + self.refine(pooled))
        return y


class PatchProjector(nn.Module):
    """Apply norm, dropout, then Linear(x) + Linear(gelu(Linear(x))) to vectors [..., in_dim]."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, out_dim)
        self.mlp = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        projected: Tensor = self.linear(x) + self.mlp(x)
        return projected


class FreezeAlign(nn.Module):
    """Project every token, pool, and with `refine` apply a residual layer.

    Source: freeze-align, Maniparambil et al. 2024, and its published code. Images pool
    `cls-and-mean`, with a projector of its own for the first token. Texts refine the mean:
    p = Linear(mean), then norm(p + dropout(Linear(gelu(p)))).
    """

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.pooling = spec.pooling
        self.tokens = PatchProjector(in_dim, out_dim, spec.dropout)
        has_cls = spec.pooling == "cls-and-mean"
        self.cls = PatchProjector(in_dim, out_dim, spec.dropout) if has_cls else None
        self.refine = None
        if spec.refine:
            self.refine = nn.ModuleDict(
                {
                    "first": nn.Linear(out_dim, out_dim),
                    "second": nn.Linear(out_dim, out_dim),
                    "dropout": nn.Dropout(spec.dropout),
                    "norm": nn.LayerNorm(out_dim),
                }
            )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        pooled: Tensor
        if self.cls is not None:
            later_mask = None if mask is None else mask[:, 1:]
            pooled = self.cls(x[:, 0]) + masked_mean(self.tokens(x[:, 1:]), later_mask)
        else:
            pooled = pool(self.tokens(x), mask, self.pooling)
        if self.refine is None:
            return pooled
        first = self.refine["first"](pooled)
        second = self.refine["second"](F.gelu(first))
        y: Tensor = self.refine["norm"](first + self.refine["dropout"](second))
        return y


class TokenHead(Head):
    """Map float [n, tokens, in_dim] and bool [n, tokens] to float32 [n, out_dim], L2-normalized."""

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
            case "freeze-align":
                return FreezeAlign(self.spec, self.in_dim, self.out_dim)
        raise ValueError(f"a head of kind {self.spec.kind} needs pooled features, not tokens")

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:  # padding may hold anything, NaN too
            features = features.masked_fill(~mask.unsqueeze(-1), 0)
        x = self.standardized(features)
        y = self.body(x, mask)
        if self.direct is not None:
            # The skip connection sees the pooled input, because the body pools as well.
            y = y + self.direct(masked_mean(x, mask))
        return normalize(y, dim=-1)


def _cosines(x: Tensor, anchors: Tensor) -> Tensor:
    """Compute cosines of [n, tokens, dim] with [k, dim] -> [n, tokens, k], in float32."""
    with without_autocast(x):
        return normalize(x) @ normalize(anchors).T


def _split_heads(x: Tensor, n_heads: int) -> Tensor:
    """Reshape [n, tokens, dim] -> [n, heads, tokens, dim / heads]."""
    split: Tensor = x.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return split


def _n_heads(spec: HeadSpec, dim: int) -> int:
    """Return the number of attention heads of features [..., dim].

    Raises:
        ValueError: the features cannot be divided among the heads.
    """
    heads = spec.n_heads or max(1, dim // 64)
    if dim % heads:
        raise ValueError(
            f"{dim} features cannot be divided among {heads} attention heads; set n_heads"
        )
    return heads
