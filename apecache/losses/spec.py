"""The `loss` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from apecache.losses.geometry import Divergence
from apecache.settings import Settings


class LossSpec(Settings):
    """`infonce`: symmetric, over the batch; `sigmoid`: every pair by itself, `bias` added to the
    logits at the start.

    `temperature` divides the cosines and is clamped to [min_temperature, max_temperature];
    `learnable` goes for the bias too. `captions`: so many different captions of each image stand in
    a batch; none is the other's negative. `structure`: weight of the divergence between who
    resembles whom before and after the head (STRUCTURE), grown linearly over the first
    `structure_warmup` steps.
    """

    kind: Literal["infonce", "sigmoid"] = "infonce"
    temperature: float = Field(default=0.07, gt=0)
    min_temperature: float = Field(default=0.01, gt=0)
    max_temperature: float = Field(default=0.5, gt=0)
    learnable: bool = True
    bias: float = -10.0
    captions: int = Field(default=1, ge=1, le=64)
    structure: float = Field(default=0.0, ge=0)
    structure_temperature: float = Field(default=0.05, gt=0)
    structure_divergence: Divergence = "jensen-shannon"
    structure_warmup: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "LossSpec":
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError("temperature must lie between min_temperature and max_temperature")
        return self
