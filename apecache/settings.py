"""Define the base of all settings that come from outside: recipes, spaces, specifications."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Check settings once, where they enter.

    Unknown keys and numbers that are not finite are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
