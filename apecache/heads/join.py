"""Join the standardized features of several encoders, or of several layers of one encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apecache.heads.head import HeadSpec


class EncoderGate(nn.Module):
    """Scale the features of each encoder by a gate between 0 and 2 that depends on the sample.

    All gates are 1 at first, so that a fit begins with the concatenation.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.score = nn.Linear(sum(widths), len(self.widths))
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        gates = 2 * torch.sigmoid(self.score(x))
        blocks = x.split(self.widths, dim=-1)
        scaled = [block * gates[..., i : i + 1] for i, block in enumerate(blocks)]
        return torch.cat(scaled, dim=-1)


class LayerMix(nn.Module):
    """Average features of one width with learned weights that sum to 1 (ELMo's scalar mix).

    Source: Peters et al. 2018, section 3.2. The weights are equal at first. ELMo's scale is left
    out: the layer that follows has one.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.n_layers = len(widths)
        self.logits = nn.Parameter(torch.zeros(self.n_layers))

    def forward(self, x: Tensor) -> Tensor:
        layers = x.unflatten(-1, (self.n_layers, -1))
        weights = self.logits.softmax(0).unsqueeze(-1)
        mixed: Tensor = (layers * weights).sum(-2)
        return mixed


def joined_dim(spec: HeadSpec, in_dim: int) -> int:
    """Return the width of the joined features.

    Raises:
        ValueError: the widths are not known, do not add up to `in_dim`, or cannot be averaged.
    """
    if spec.join == "concat":
        return in_dim
    if len(spec.widths) < 2:
        raise ValueError(
            f"join {spec.join} needs the features of several encoders or layers; name them with "
            "commas between, as in --image-features A,B"
        )
    if sum(spec.widths) != in_dim:
        raise ValueError(f"widths add up to {sum(spec.widths)}; the features have {in_dim}")
    if spec.join == "gate":
        return in_dim
    if len(set(spec.widths)) > 1:
        listed = ", ".join(map(str, spec.widths))
        raise ValueError(f"join mix averages features of one width; found {listed}; use concat")
    return spec.widths[0]


def build_join(spec: HeadSpec) -> nn.Module | None:
    """Return what joins features of these widths; None for the plain concatenation."""
    match spec.join:
        case "concat":
            return None
        case "gate":
            return EncoderGate(spec.widths)
        case "mix":
            return LayerMix(spec.widths)
