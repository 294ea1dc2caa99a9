"""The base of every group of settings that crosses a border: recipes, spaces, specifications."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Check settings once, where they enter; unknown keys and values that are not finite are
    refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
