"""Define heads on pooled features, which are trained while both encoders stay frozen.

`HeadSpec` describes the kinds.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.head import Head, HeadSpec, in_sequence
from apecache.heads.join import build_join, joined_dim
from apecache.heads.normalization import normalize, similarities
from apecache.heads.registered import HEADS

N_COMPLEMENTS = 2
"""Values that a canonical head adds to those of its directions."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class ResidualBlock(nn.Module):
    """Compute x + dropout(Linear(act(Linear(norm(x))))), width -> width x expansion -> width."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        inner = max(1, round(spec.width * spec.expansion))
        layers = (
            _norm(spec),
            nn.Linear(spec.width, inner),
            ACTIVATIONS[spec.activation](),
            nn.Linear(inner, spec.width),
            nn.Dropout(spec.dropout),
        )
        self.branch = in_sequence(layers)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.branch(x)
        return grown


class FuseMixBlock(nn.Module):
    """Compute x + Linear(dropout(gelu(Linear(norm(x))))), an inverted bottleneck.

    Source: FuseMix, Vouitsis et al. 2024.
    """

    def __init__(self, dim: int, expansion: float, dropout: float) -> None:
        super().__init__()
        inner = max(1, round(dim * expansion))
        layers = (
            nn.LayerNorm(dim),
            nn.Linear(dim, inner),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, dim),
        )
        self.branch = in_sequence(layers)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.branch(x)
        return grown


class GatedUnit(nn.Module):
    """Compute W3(dropout(relu6(W1 x) * W2 x)) of layer-normed x (SAIL, Zhang et al. 2024)."""

    def __init__(self, in_dim: int, out_dim: int, expansion: float, dropout: float) -> None:
        super().__init__()
        inner = max(1, round(in_dim * expansion))
        self.norm = nn.LayerNorm(in_dim)
        self.gate = nn.Linear(in_dim, inner)
        self.value = nn.Linear(in_dim, inner)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(inner, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        gate = F.relu6(self.gate(x))
        gated = self.dropout(gate * self.value(x))
        y: Tensor = self.last(gated)
        return y


class Canonical(nn.Module):
    """Weight normalized canonical variables (CSA, Li et al. 2024).

    The product of an image and a text embedding is the sum over k of rho_k u_k v_k, where u and v
    are the L2-normalized projections and rho the canonical correlations. Such embeddings are
    shorter than 1. Each side has one more value that makes them unit vectors, where the other side
    has 0, so that their cosine is that product.
    """

    weights: Tensor
    """[rank], square roots of the correlations, at most 1."""
    complement: Tensor
    """[2], which of the last two values completes this side: (1, 0) images, (0, 1) texts."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        rank = out_dim - N_COMPLEMENTS
        if rank < 1:
            raise ValueError(
                f"a canonical head is at least {N_COMPLEMENTS + 1} wide, not {out_dim}"
            )
        self.linear = nn.Linear(in_dim, rank)
        self.register_buffer("weights", torch.ones(rank))
        self.register_buffer("complement", torch.zeros(N_COMPLEMENTS))

    def forward(self, x: Tensor) -> Tensor:
        weighted = normalize(self.linear(x)) * self.weights
        rest_length = (1 - weighted.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()
        return torch.cat([weighted, rest_length * self.complement], dim=-1)


class Dictionary(nn.Module):
    """Compute similarities to the entries of a dictionary (ASIF, Norelli et al. 2022).

    The `top` largest positive similarities stay, raised to `power`; all others are 0.
    """

    entries: Tensor
    """[n_entries, in_dim], L2-normalized."""

    def __init__(self, spec: HeadSpec, in_dim: int, n_entries: int) -> None:
        super().__init__()
        self.top = min(spec.top, n_entries)
        self.power = spec.power
        self.register_buffer("entries", torch.zeros(n_entries, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        cosines = similarities(normalize(x), self.entries)
        values, indices = cosines.topk(self.top, dim=-1)
        powers = values.clamp_min(0) ** self.power
        return torch.zeros_like(cosines).scatter_(-1, indices, powers)


def _norm(spec: HeadSpec) -> nn.Module:
    match spec.norm:
        case "layer":
            return nn.LayerNorm(spec.width)
        case "batch":
            return nn.BatchNorm1d(spec.width)
        case "none":
            return nn.Identity()


def _mlp(spec: HeadSpec, in_dim: int, out_dim: int) -> nn.Sequential:
    # The last layer is made first: seeded runs depend on the order of the random draws.
    last = nn.Linear(spec.width, out_dim)
    layers: list[nn.Module] = []
    if spec.residual:
        layers.append(nn.Linear(in_dim, spec.width))
        layers += [ResidualBlock(spec) for _ in range(spec.depth)]
        layers.append(_norm(spec))
    else:
        widths = [in_dim] + [spec.width] * spec.depth
        for before, after in pairwise(widths):
            layers.append(nn.Linear(before, after))
            layers.append(_norm(spec))
            layers.append(ACTIVATIONS[spec.activation]())
            layers.append(nn.Dropout(spec.dropout))
    layers.append(last)
    return in_sequence(layers)


def _fusemix(spec: HeadSpec, in_dim: int, out_dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(spec.depth):
        layers.append(FuseMixBlock(in_dim, spec.expansion, spec.dropout))
    layers.append(nn.LayerNorm(in_dim))
    layers.append(nn.Linear(in_dim, out_dim))
    return in_sequence(layers)


class PooledHead(Head):
    """Map float [n, in_dim] to float32 [n, out_dim], L2-normalized."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__(spec, in_dim, out_dim)
        body_dim = joined_dim(spec, in_dim)
        self.body = self._build_body(body_dim)
        # The other kinds are linear already, or nothing in them trains.
        skips = spec.skip and spec.kind in ("mlp", "gated", "fusemix", "custom")
        self.direct = nn.Linear(body_dim, out_dim, bias=False) if skips else None
        # After the body: seeded runs without it depend on the order of the random draws.
        self.join = build_join(spec)

    def _build_body(self, in_dim: int) -> nn.Module:
        spec = self.spec
        match spec.kind:
            case "identity":
                return nn.Identity()
            case "linear":
                return nn.Linear(in_dim, self.out_dim)
            case "mlp":
                return _mlp(spec, in_dim, self.out_dim)
            case "gated":
                return GatedUnit(
                    in_dim,
                    out_dim=self.out_dim,
                    expansion=spec.expansion,
                    dropout=spec.dropout,
                )
            case "fusemix":
                return _fusemix(spec, in_dim, self.out_dim)
            case "canonical":
                return Canonical(in_dim, self.out_dim)
            case "custom":
                return HEADS.find(spec.custom)(in_dim, self.out_dim)
            case "dictionary":
                return Dictionary(spec, in_dim, self.out_dim)
        raise ValueError(f"a head of kind {spec.kind} needs tokens, not pooled features")

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.standardized(features)
        x = x if self.join is None else self.join(x)
        y = self.body(x)
        return normalize(y if self.direct is None else y + self.direct(x), dim=-1)
