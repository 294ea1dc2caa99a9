"""Define heads: their description, and what all kinds share.

A head maps features to float32 [n, out_dim] embeddings, L2-normalized. Heads on pooled features
take float [n, in_dim]. Heads on tokens take float [n, tokens, in_dim] and a mask of valid tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from apecache.heads.normalization import normalize
from apecache.settings import Settings

Kind = Literal[
    "identity",
    "linear",
    "mlp",
    "gated",
    "fusemix",
    "canonical",
    "dictionary",
    "custom",
    "transformer",
    "attention",
    "anchors",
    "projector",
    "freeze-align",
    "ensemble",
]
TOKEN_KINDS = frozenset({"transformer", "attention", "anchors", "projector", "freeze-align"})
"""Kinds that need token features; all others take pooled features."""


class HeadSpec(Settings):
    """Describe one side's head.

    On pooled features:
    `identity`: features as they are. `linear`: one Linear with bias (LilT's projection: `dim` 256).
    `mlp`: `depth` layers Linear, norm, activation, dropout of `width`, then a last Linear; with
    `residual`, a Linear to `width`, then `depth` blocks x + dropout(Linear(act(Linear(norm(x))))),
    norm and a last Linear. `gated`: W3(relu6(W1 x) * W2 x) of x = LayerNorm, `expansion` times as
    wide as the features, dropout before W3 (SAIL). `fusemix`: `depth` blocks x +
    Linear(dropout(gelu(Linear(norm(x))))) at the features' own width, `expansion` times as wide
    inside, norm and a last Linear. `canonical`: a Linear, normalized, then weighted by the
    canonical correlations (CSA; only `init` cca makes it). `dictionary`: similarities to the `dim`
    entries of a dictionary, the `top` largest kept, to the power `power` (ASIF); nothing trains.
    `custom`: the head of one's own that is registered under the name in `custom` (see
    `apecache.register_head`).

    On tokens:
    `transformer`: `depth` pre-norm blocks of `n_heads` (0: one per 64 features), norm, pooling, a
    last Linear (LilT's deep adapter). `attention`: one learned query per head looks at all tokens,
    then a last Linear. `anchors`: `dim` learned anchors attend to the tokens; the vector of their
    scores is the embedding. `projector`: norm, then Linear plus a two-layer MLP on every token,
    pooled; with `refine`, then x + dropout(MLP(x)) and a norm. `freeze-align`: norm and dropout,
    then Linear plus a two-layer MLP on every token, pooled, where `cls-and-mean` has projectors of
    its own for the first token; with `refine`, then a Linear, x + dropout(Linear(gelu(x))), and a
    norm. `pooling`: the mean of the tokens, the first one (`cls`), or the first plus the mean of
    the others (`cls-and-mean`).

    `dim` None: the other side's width. `standardize`: subtract the training mean and divide by the
    training deviation of each feature first (kept in the head). `skip`: add a direct linear map
    from input to output. `input_dropout` comes before everything else.

    `ensemble`: the `parts`, heads of any of these kinds, side by side. Part i of one side meets
    part i of the other in a width of their own and is trained by a loss of its own; the embedding
    is all of them, each L2-normalized, so that a cosine is the mean of theirs.

    `join` says how features of several encoders or layers meet, after standardization, in a head on
    pooled features: `concat` side by side, `gate` side by side and scaled by a gate for each
    encoder and sample, `mix` averaged with learned weights. `widths` are their widths, in order.
    The trainer fills them in.
    """

    kind: Kind = "linear"
    dim: int | None = Field(default=None, gt=0)
    depth: int = Field(default=2, ge=1, le=64)
    width: int = Field(default=1024, gt=0)
    residual: bool = True
    norm: Literal["layer", "batch", "none"] = "layer"
    expansion: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    activation: Literal["relu", "gelu"] = "gelu"
    standardize: bool = True
    skip: bool = False
    initialization: Literal["torch", "xavier"] = "torch"
    """Of linear layers. `torch`: its default. `xavier`: uniform, scaled by both widths (Glorot and
    Bengio 2010); biases 0."""
    n_heads: int = Field(default=0, ge=0)
    pooling: Literal["mean", "cls", "cls-and-mean"] = "mean"
    refine: bool = False
    top: int = Field(default=800, ge=1)
    power: float = Field(default=8.0, gt=0)
    parts: tuple["HeadSpec", ...] = Field(default=(), max_length=64)
    join: Literal["concat", "gate", "mix"] = "concat"
    widths: tuple[int, ...] = ()
    custom: str = ""
    """Name of a registered head, for kind `custom`."""

    @model_validator(mode="after")
    def _whole(self) -> "HeadSpec":
        if (self.kind == "ensemble") != bool(self.parts):
            raise ValueError("kind ensemble and parts go together: give both or none")
        if (self.kind == "custom") != bool(self.custom):
            raise ValueError(
                "kind custom and custom (the head's name) go together: give both or none"
            )
        is_nested = any(spec.parts for spec in self.parts)
        if is_nested or len({spec.cut for spec in self.parts}) > 1:
            raise ValueError("parts are single heads, all on pooled features or all on tokens")
        if self.join != "concat" and (self.parts or self.cut == "tokens"):
            raise ValueError(f"join {self.join} is for a single head on pooled features")
        return self

    @property
    def cut(self) -> Literal["pooled", "tokens"]:
        """Return which features the head needs."""
        if self.parts:
            return self.parts[0].cut
        return "tokens" if self.kind in TOKEN_KINDS else "pooled"

    def with_widths(self, widths: tuple[int, ...]) -> "HeadSpec":
        """Return the same head with the widths of the joined features, where it needs them."""
        head_parts = tuple(head_part.with_widths(widths) for head_part in self.parts)
        if self.join == "concat":
            return self.model_copy(update={"parts": head_parts})
        return self.model_copy(update={"widths": widths})


class Head(nn.Module):
    """Map features of one side to embeddings; `HeadSpec` describes the kinds."""

    # Buffers, so that they are saved with the head and never trained.
    mean: Tensor
    """[in_dim], subtracted from the features."""
    deviation: Tensor
    """[in_dim], by which centered features are divided."""

    def __init__(self, spec: HeadSpec, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("deviation", torch.ones(in_dim))
        self.input_dropout = nn.Dropout(spec.input_dropout)

    @torch.no_grad()
    def fit_statistics(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        rows: int = 4096,
    ) -> None:
        """Take mean and deviation from training features, in double precision.

        A constant feature keeps deviation 1.

        Args:
            features: [n, ..., in_dim], on any device.
            mask: bool [n, tokens], the valid tokens. None: all are valid.
            rows: rows of features that are converted at a time.
        """
        if not (self.spec.standardize or any(spec.standardize for spec in self.spec.parts)):
            return
        count = 0
        total = torch.zeros(self.in_dim, dtype=torch.float64, device=features.device)
        for block in _blocks(features, mask, rows):
            count = count + len(block)
            total = total + block.sum(0)
        mean = total / max(1, count)
        # A second pass: the mean of squares less the squared mean would lose digits.
        squares = torch.zeros_like(mean)
        for block in _blocks(features, mask, rows):
            squares += (block - mean).square().sum(0)
        deviation = (squares / max(1, count)).sqrt()
        # Rounding gives a constant feature a tiny deviation, in proportion to its mean.
        varies = deviation > 1e-6 * (1 + mean.abs())
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(varies, deviation, 1.0))

    def standardized(self, features: Tensor) -> Tensor:
        """Standardize features; in training, apply input dropout."""
        centered = features.float() - self.mean
        dropped: Tensor = self.input_dropout(centered / self.deviation)
        return dropped


def in_sequence(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Chain layers; each is appended as soon as it is made."""
    sequence = nn.Sequential()
    for layer in layers:
        sequence.append(layer)
    return sequence


def _blocks(features: Tensor, mask: Tensor | None, rows: int) -> Iterator[Tensor]:
    """Yield the features of `rows` rows at a time as float64 [m, dim], valid tokens only."""
    for begin in range(0, len(features), rows):
        block = features[begin : begin + rows]
        valid = block.flatten(0, -2) if mask is None else block[mask[begin : begin + rows]]
        yield valid.double()


class EnsembleHead(Head):
    """Hold heads side by side; their embeddings are concatenated. See `HeadSpec`."""

    def __init__(self, spec: HeadSpec, heads: list[Head]) -> None:
        super().__init__(spec, heads[0].in_dim, sum(head.out_dim for head in heads))
        self.parts = nn.ModuleList(heads)
        self.widths = [head.out_dim for head in heads]

    def fit_statistics(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        rows: int = 4096,
    ) -> None:
        """Give every standardizing part the same mean and deviation."""
        super().fit_statistics(features, mask, rows)
        statistics = {"mean": self.mean, "deviation": self.deviation}
        for head, spec in zip(self.parts, self.spec.parts, strict=True):
            if spec.standardize:
                head.load_state_dict(statistics, strict=False)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = [head(features, mask) for head in self.parts]
        # Each embedding has length 1, so this makes the whole vector's length 1.
        side_by_side: Tensor = torch.cat(embedded, dim=-1) / len(embedded) ** 0.5
        return side_by_side


def embed(head: Head, features: Tensor, lengths: Tensor | None = None, batch: int = 8192) -> Tensor:
    """Embed any number of rows in batches, with dropout off.

    Args:
        head: set to evaluation mode.
        features: [n, in_dim] for a head on pooled features; [n, views, in_dim] averages its
            embeddings over the views. [n, tokens, in_dim] for a head on tokens.
        lengths: int [n], valid tokens of each row. None: all tokens are valid.
        batch: rows that are embedded at once.

    Returns:
        float32 [n, out_dim], L2-normalized, on the head's device.
    """
    device = head.mean.device
    head.eval()
    if features.ndim == 3 and head.spec.cut == "pooled":
        views = features.shape[1]
        single = embed(head, features.flatten(0, 1), None, batch)
        return normalize(single.unflatten(0, (-1, views)).mean(1), dim=-1)
    embedded = []
    with torch.no_grad():
        for first in range(0, len(features), batch):
            block = features[first : first + batch]
            mask = None
            if lengths is not None:
                mask = mask_of(lengths[first : first + batch], block).to(device)
            embedded.append(head(block.to(device), mask))
        if not embedded:
            return torch.empty(0, head.out_dim, device=device)
        return torch.cat(embedded)


def mask_of(lengths: Tensor, features: Tensor) -> Tensor:
    """Return bool [n, tokens]: the valid tokens of features [n, tokens, dim]."""
    positions = torch.arange(features.shape[1], device=lengths.device)
    mask: Tensor = positions < lengths.unsqueeze(1)
    return mask
