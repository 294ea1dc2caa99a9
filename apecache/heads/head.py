"""What a head is: its description, and what all kinds share.

A head maps features to float32 [n, out_dim] embeddings, L2-normalised. Heads on pooled features
take float [n, in_dim]; heads on tokens take float [n, tokens, in_dim] and a mask of the tokens that
are there.
"""

from collections.abc import Iterator
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
    "dictionary",
    "transformer",
    "attention",
    "anchors",
    "projector",
    "several",
]
TOKEN_KINDS = frozenset({"transformer", "attention", "anchors", "projector"})


class HeadSpec(Settings):
    """One side's head.

    On pooled features:
    `identity`: features as they are. `linear`: one Linear with bias (LilT's projection: `dim` 256).
    `mlp`: `depth` layers Linear, norm, activation, dropout of `width`, then a last Linear; with
    `residual`, a Linear to `width`, then `depth` blocks x + dropout(Linear(act(Linear(norm(x))))),
    norm and a last Linear. `gated`: W3(relu6(W1 x) * W2 x) of x = LayerNorm, `expansion` times as
    wide as the features, dropout before W3 (SAIL). `fusemix`: `depth` blocks x +
    Linear(dropout(gelu(Linear(norm(x))))) at the features' own width, `expansion` times as wide
    inside, norm and a last Linear. `dictionary`: similarities to the `dim` entries of a dictionary,
    the `top` largest kept, to the power `power` (ASIF); nothing trains.

    On tokens:
    `transformer`: `depth` pre-norm blocks of `n_heads` (0: one per 64 features), norm, pooling, a
    last Linear (LilT's deep adapter). `attention`: one learned query per head looks at all tokens,
    then a last Linear. `anchors`: `dim` learned anchors attend to the tokens; the vector of their
    scores is the embedding. `projector`: norm, then Linear plus a two-layer MLP on every token,
    pooled; with `refine`, then x + dropout(MLP(x)) and a norm (freeze-align). `pooling`: the mean
    of the tokens, the first one (`cls`), or the first plus the mean of the others (`cls-and-mean`).

    `dim` None: the other side's width. `standardise`: subtract the training mean and divide by the
    training deviation of each feature first (kept in the head). `skip`: add a direct linear map
    from input to output. `input_dropout` comes before everything else.

    `several`: the `parts`, heads of any of these kinds, side by side. Part i of one side meets part
    i of the other in a width of their own and is trained by a loss of its own; the embedding is all
    of them, each L2-normalised, so that a cosine is the mean of theirs.
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
    standardise: bool = True
    skip: bool = False
    n_heads: int = Field(default=0, ge=0)
    pooling: Literal["mean", "cls", "cls-and-mean"] = "mean"
    refine: bool = False
    top: int = Field(default=800, ge=1)
    power: float = Field(default=8.0, gt=0)
    parts: tuple["HeadSpec", ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _whole(self) -> "HeadSpec":
        if (self.kind == "several") != bool(self.parts):
            raise ValueError("kind several and parts go together: give both or none")
        if any(part.parts for part in self.parts) or len({part.cut for part in self.parts}) > 1:
            raise ValueError("parts are single heads, all on pooled features or all on tokens")
        return self

    @property
    def cut(self) -> Literal["pooled", "tokens"]:
        """Which features the head needs."""
        if self.parts:
            return self.parts[0].cut
        return "tokens" if self.kind in TOKEN_KINDS else "pooled"


class Head(nn.Module):
    """See `HeadSpec`. `mean` and `deviation` [in_dim] are buffers, so they are saved and never
    trained."""

    mean: Tensor
    deviation: Tensor

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
        """Take mean and deviation from training features [n, ..., in_dim] (of tokens where `mask`
        is True), in blocks of `rows` and in double precision; a constant feature keeps deviation 1.
        Features may be on another device."""
        if not (self.spec.standardise or any(part.standardise for part in self.spec.parts)):
            return
        count = 0
        total = torch.zeros(self.in_dim, dtype=torch.float64, device=features.device)
        for part in _blocks(features, mask, rows):
            count = count + len(part)
            total = total + part.sum(0)
        mean = total / max(1, count)
        squares = torch.zeros_like(mean)
        for part in _blocks(features, mask, rows):
            squares += (part - mean).square().sum(0)
        deviation = (squares / max(1, count)).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0))

    def standardised(self, features: Tensor) -> Tensor:
        """Input as the body sees it, dropped out in training."""
        dropped: Tensor = self.input_dropout((features.float() - self.mean) / self.deviation)
        return dropped


def _blocks(features: Tensor, mask: Tensor | None, rows: int) -> Iterator[Tensor]:
    """float64 [m, dim]: the features of `rows` rows at a time, of tokens those that are there."""
    for begin in range(0, len(features), rows):
        part = features[begin : begin + rows]
        yield (part.flatten(0, -2) if mask is None else part[mask[begin : begin + rows]]).double()


class SeveralHeads(Head):
    """Heads side by side: see `HeadSpec`."""

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
        """The same for every part that standardises."""
        super().fit_statistics(features, mask, rows)
        for part, described in zip(self.parts, self.spec.parts, strict=True):
            if described.standardise:
                part.load_state_dict({"mean": self.mean, "deviation": self.deviation}, strict=False)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = [part(features, mask) for part in self.parts]
        side_by_side: Tensor = torch.cat(parts, dim=-1) / len(parts) ** 0.5
        return side_by_side


def embed(head: Head, features: Tensor, lengths: Tensor | None = None, batch: int = 8192) -> Tensor:
    """Features of any number of rows -> float32 [n, out_dim], on the head's device, dropout off.

    `features`: [n, in_dim]; [n, tokens, in_dim] with `lengths` int [n] (None: all tokens are there)
    for a head on tokens; or [n, views, in_dim] for one on pooled features, whose embeddings are
    averaged over the views.
    """
    where = head.mean.device
    head.eval()
    if features.ndim == 3 and head.spec.cut == "pooled":
        views = features.shape[1]
        single = embed(head, features.flatten(0, 1), None, batch)
        return normalize(single.unflatten(0, (-1, views)).mean(1), dim=-1)
    with torch.inference_mode():
        parts = [
            head(
                part.to(where),
                None
                if lengths is None
                else mask_of(lengths[first : first + batch], part).to(where),
            )
            for first, part in zip(
                range(0, len(features), batch),
                features.split(batch),
                strict=False,
            )
            if len(part)
        ]
        return torch.cat(parts) if parts else torch.empty(0, head.out_dim, device=where)


def mask_of(lengths: Tensor, features: Tensor) -> Tensor:
    """bool [n, tokens]: which tokens of features [n, tokens, dim] are there."""
    there: Tensor = torch.arange(features.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    return there
