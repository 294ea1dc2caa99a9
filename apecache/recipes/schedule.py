"""Define the sections `optimizer` and `schedule` of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from apecache.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
Epoch = Literal["images", "pairs"]
"""What an epoch goes through once, see `ScheduleSpec.epoch`."""


class OptimizerSpec(Settings):
    """Choose the optimizer."""

    kind: Literal["adamw", "adam", "lion", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Of parameters with two dimensions or more. `adam` adds it to the gradient."""
    decay_scalars: bool = False
    """Decay parameters without dimensions too: the temperature and the bias of the sigmoid loss."""
    undecayed: tuple[Literal["token_embedding", "position", "token_types"], ...] = ()
    """Embeddings within the towers that are not decayed, although they have two dimensions."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """`sgd`: the first is the momentum."""
    eps: float = Field(default=1e-6, gt=0)
    clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0: none."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an average of the weights, which is evaluated and kept; 0: no average."""


class ScheduleSpec(Settings):
    """Set steps, batches and the learning rate over time.

    The learning rate rises during the warm-up, then decays.
    """

    epoch: Epoch = "images"
    """What an epoch goes through once. `images`: every image, with captions drawn at random.
    `pairs`: every caption with its image, so that an image with five captions comes five times."""
    epochs: int = Field(default=30, ge=0)
    """0 (and `steps` 0): nothing trains, the heads stay as `init` makes them."""
    steps: int = Field(default=0, ge=0)
    """Above 0 they replace `epochs`."""
    batch_size: int = Field(default=1024, ge=2)
    """Images (or pairs, see `epoch`) in a batch; where there are fewer, all of them."""
    accumulate: int = Field(default=1, ge=1)
    """Batches in a step; they add no negatives."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of all steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Above 0 they replace `warmup`."""
    warmup_start: float = Field(default=0.0, ge=0, le=1)
    """Share of the learning rate at which the warm-up begins."""
    warmup_stairs: int = Field(default=0, ge=0)
    """Number of equal stairs of the warm-up, the first of which is `warmup_start`; 0: the rate
    rises in every step."""
    decay: Literal["cosine", "cosine-epochs", "constant"] = "cosine"
    """`cosine-epochs`: the rate stays within an epoch, and the cosine counts epochs; a warm-up
    ends with the first epoch at the latest. `constant`: the rate stays."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the learning rate at the end of the cosine."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a better one before the training stops; 0: it never stops early."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between two evaluations on dev."""
