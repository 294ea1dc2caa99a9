"""Heads on pooled features: what is trained when both encoders stay frozen.

A head maps float [n, in_dim] features to float32 [n, out_dim] embeddings, L2-normalised.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class HeadSpec(BaseModel):
    """One side's head.

    `identity`: features as they are. `linear`: one Linear with bias (LilT's projection: `dim` 256). `mlp`: `depth`
    layers Linear, norm, activation, dropout of `width`, then a last Linear; with `residual`, a Linear to `width`, then
    `depth` blocks x + dropout(Linear(act(Linear(norm(x))))), norm and a last Linear. `dim` None: the other side's
    width. `standardise`: subtract the training mean and divide by the training deviation of each feature first (kept in
    the head). `skip`: add a direct linear map from input to output. `input_dropout` comes before everything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["identity", "linear", "mlp"] = "linear"
    dim: int | None = Field(default=None, gt=0)
    depth: int = Field(default=2, ge=1, le=64)
    width: int = Field(default=1024, gt=0)
    residual: bool = True
    norm: Literal["layer", "batch", "none"] = "layer"
    expansion: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    activation: Literal["relu", "gelu"] = "gelu"
    standardise: bool = True
    skip: bool = False


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
        for layer in (nn.Linear(before, after), _norm(spec), ACTIVATIONS[spec.activation](), nn.Dropout(spec.dropout))
    ]
    return nn.Sequential(*layers, last)


class PooledHead(nn.Module):
    """See `HeadSpec`. `mean` and `deviation` [in_dim] are buffers, so they are saved and never trained."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.spec, self.in_dim, self.out_dim = spec, in_dim, out_dim
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("deviation", torch.ones(in_dim))
        self.input_dropout = nn.Dropout(spec.input_dropout)
        self.body = self._build_body()
        self.direct = nn.Linear(in_dim, out_dim, bias=False) if spec.skip and spec.kind == "mlp" else None

    def _build_body(self) -> nn.Module:
        spec = self.spec
        match spec.kind:
            case "identity":
                return nn.Identity()
            case "linear":
                return nn.Linear(self.in_dim, self.out_dim)
            case "mlp":
                return _mlp(spec, self.in_dim, self.out_dim)

    @torch.no_grad()
    def fit_statistics(self, features: Tensor) -> None:
        """Take mean and deviation from training features [n, in_dim]; a constant feature keeps deviation 1."""
        if self.spec.standardise:
            wide = features.float()
            self.mean.copy_(wide.mean(0))
            deviation = wide.std(0, correction=0)
            self.deviation.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        x = self.input_dropout((features.float() - self.mean) / self.deviation)
        y = self.body(x)
        return F.normalize(y if self.direct is None else y + self.direct(x), dim=-1)


def build_heads(image: HeadSpec, text: HeadSpec, image_dim: int, text_dim: int) -> tuple[PooledHead, PooledHead]:
    """Both sides' heads with one output width.

    Raises:
        ValueError: the widths cannot be made equal.
    """
    widths = {"image": _fixed_dim(image, image_dim), "text": _fixed_dim(text, text_dim)}
    fixed = {width for width in widths.values() if width is not None}
    if len(fixed) > 1:
        raise ValueError(f"the heads end in different widths: image {widths['image']}, text {widths['text']}")
    if not fixed:
        raise ValueError("neither head has a width; give dim to one of them")
    out = fixed.pop()
    return PooledHead(image, image_dim, out), PooledHead(text, text_dim, out)


def _fixed_dim(spec: HeadSpec, in_dim: int) -> int | None:
    return in_dim if spec.kind == "identity" else spec.dim
