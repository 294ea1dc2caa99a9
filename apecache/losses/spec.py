"""Define the `loss` section of a recipe."""

from typing import Literal

from pydantic import Field, model_validator

from apecache.losses.contrastive import TemperatureParameter
from apecache.losses.geometry import Divergence
from apecache.settings import Settings


class LossSpec(Settings):
    """Set the loss of a training."""

    kind: Literal["infonce", "sigmoid", "custom"] = "infonce"
    """`infonce`: symmetric, over the batch. `sigmoid`: every pair by itself. `custom`: a loss of
    one's own (see `apecache.register_loss`)."""
    custom: str = ""
    """Name of a registered loss, for kind `custom`."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides the cosines, at the start."""
    min_temperature: float = Field(default=0.01, gt=0)
    """The temperature is clamped to this and `max_temperature` after every step."""
    max_temperature: float = Field(default=0.5, gt=0)
    temperature_parameter: TemperatureParameter = "log_scale"
    """What the optimizer changes: `log_scale`, the logarithm of 1 / temperature (CLIP), or
    `temperature` itself (LilT, FuseMix). At equal learning rates the second moves much faster."""
    learnable: bool = True
    """Whether temperature and bias are trained."""
    bias: float = -10.0
    """Added to the logits of `sigmoid`, at the start."""
    captions: int = Field(default=1, ge=1, le=64)
    """Different captions of each image in a batch. They are never each other's negatives."""
    matryoshka: tuple[int, ...] = ()
    """Widths, smaller than the embedding: the loss is the mean of those of the first m values of
    each embedding, L2-normalized again, for every such m and for the whole. The first values then
    serve as a shorter embedding (Kusupati et al. 2022, Matryoshka representation learning)."""
    structure: float = Field(default=0.0, ge=0)
    """Weight of the divergence between the similarities before and after the head (STRUCTURE)."""
    structure_temperature: float = Field(default=0.05, gt=0)
    """Divides the similarities of that divergence."""
    structure_divergence: Divergence = "jensen-shannon"
    structure_warmup: int = Field(default=0, ge=0)
    """Steps over which the weight `structure` grows linearly from 0."""

    @model_validator(mode="after")
    def _ordered(self) -> "LossSpec":
        if (self.kind == "custom") != bool(self.custom):
            raise ValueError(
                "kind custom and custom (the loss's name) go together: give both or none"
            )
        widths = self.matryoshka
        if list(widths) != sorted(set(widths)) or any(width < 1 for width in widths):
            raise ValueError("matryoshka: widths must rise, from 1")
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError("temperature must lie between min_temperature and max_temperature")
        return self
