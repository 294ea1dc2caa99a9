"""Heads on pooled features: what is trained when both encoders stay frozen. See `HeadSpec`."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.head import Head, HeadSpec
from apecache.heads.normalization import normalize, similarities

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class ResidualBlock(nn.Module):
    """x + dropout(Linear(act(Linear(norm(x))))), width -> width x expansion -> width."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        inner = max(1, round(spec.width * spec.expansion))
        layers = (
            _norm(spec),
            nn.Linear(spec.width, inner),
            ACTIVATIONS[spec.activation](),
            nn.Linear(inner, spec.width),
        )
        self.branch = nn.Sequential(*layers, nn.Dropout(spec.dropout))

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.branch(x)
        return grown


class FuseMixBlock(nn.Module):
    """x + Linear(dropout(gelu(Linear(norm(x))))) (FuseMix, Vouitsis et al. 2024; block of an
    inverted bottleneck)."""

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
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.branch(x)
        return grown


class GatedUnit(nn.Module):
    """W3(dropout(relu6(W1 x) * W2 x)) of x = LayerNorm (SAIL, Zhang et al. 2024)."""

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
        y: Tensor = self.last(self.dropout(F.relu6(self.gate(x)) * self.value(x)))
        return y


class Dictionary(nn.Module):
    """Similarities to the entries [n_entries, in_dim], of which the `top` largest positive ones
    stay, to a power (ASIF, Norelli et al. 2022)."""

    entries: Tensor

    def __init__(self, spec: HeadSpec, in_dim: int, n_entries: int) -> None:
        super().__init__()
        self.top = min(spec.top, n_entries)
        self.power = spec.power
        self.register_buffer("entries", torch.zeros(n_entries, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        similar = similarities(normalize(x), self.entries)
        values, places = similar.topk(self.top, dim=-1)
        return torch.zeros_like(similar).scatter_(-1, places, values.clamp_min(0) ** self.power)


def _norm(spec: HeadSpec) -> nn.Module:
    match spec.norm:
        case "layer":
            return nn.LayerNorm(spec.width)
        case "batch":
            return nn.BatchNorm1d(spec.width)
        case "none":
            return nn.Identity()


def _mlp(spec: HeadSpec, in_dim: int, out_dim: int) -> nn.Sequential:
    last = nn.Linear(spec.width, out_dim)
    if spec.residual:
        blocks = (ResidualBlock(spec) for _ in range(spec.depth))
        return nn.Sequential(nn.Linear(in_dim, spec.width), *blocks, _norm(spec), last)
    widths = [in_dim] + [spec.width] * spec.depth
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (
            nn.Linear(before, after),
            _norm(spec),
            ACTIVATIONS[spec.activation](),
            nn.Dropout(spec.dropout),
        )
    ]
    return nn.Sequential(*layers, last)


def _fusemix(spec: HeadSpec, in_dim: int, out_dim: int) -> nn.Sequential:
    blocks = (FuseMixBlock(in_dim, spec.expansion, spec.dropout) for _ in range(spec.depth))
    return nn.Sequential(*blocks, nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))


class PooledHead(Head):
    """float [n, in_dim] -> float32 [n, out_dim], L2-normalised."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__(spec, in_dim, out_dim)
        self.body = self._build_body()
        skips = spec.skip and spec.kind in ("mlp", "gated", "fusemix")
        self.direct = nn.Linear(in_dim, out_dim, bias=False) if skips else None

    def _build_body(self) -> nn.Module:
        spec = self.spec
        match spec.kind:
            case "identity":
                return nn.Identity()
            case "linear":
                return nn.Linear(self.in_dim, self.out_dim)
            case "mlp":
                return _mlp(spec, self.in_dim, self.out_dim)
            case "gated":
                return GatedUnit(
                    self.in_dim,
                    out_dim=self.out_dim,
                    expansion=spec.expansion,
                    dropout=spec.dropout,
                )
            case "fusemix":
                return _fusemix(spec, self.in_dim, self.out_dim)
            case "dictionary":
                return Dictionary(spec, self.in_dim, self.out_dim)
        raise ValueError(f"a head of kind {spec.kind} needs tokens, not pooled features")

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.standardised(features)
        y = self.body(x)
        return normalize(y if self.direct is None else y + self.direct(x), dim=-1)
