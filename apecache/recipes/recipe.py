"""A recipe: everything that a fit on cached features needs besides the features. One TOML file each, in `zoo/`."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apecache.errors import RecipeError, nearest
from apecache.heads.pooled import HeadSpec
from apecache.recipes.towers import TowersSpec, require_shorthand

FREEZE = "freeze/"
"""`freeze/Vuf-Tuu`: the recipe `freeze` with that shorthand."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossSpec(_Section):
    """Symmetric InfoNCE. `temperature` divides the cosines and is clamped to [min_temperature, max_temperature]."""

    temperature: float = Field(default=0.07, gt=0)
    min_temperature: float = Field(default=0.01, gt=0)
    max_temperature: float = Field(default=0.5, gt=0)
    learnable: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> "LossSpec":
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError("temperature must lie between min_temperature and max_temperature")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSpec(_Section):
    """AdamW; parameters with fewer than two dimensions are not decayed. `clip`: largest gradient norm, 0 for none."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    clip: float = Field(default=0.0, ge=0)


class ScheduleSpec(_Section):
    """Linear warm-up over a share of all steps, then cosine to `final` times the learning rate. In every epoch each
    image is seen once, with one of its captions drawn at random."""

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=1024, ge=2)
    warmup: float = Field(default=0.1, ge=0, le=1)
    final: float = Field(default=0.0, ge=0, le=1)


class AugmentationSpec(_Section):
    """In feature space. `noise`: standard deviation of Gaussian noise in units of each feature's own deviation."""

    noise: float = Field(default=0.0, ge=0)


class Recipe(_Section):
    """`source`: where the recipe comes from, and what of it is our choice."""

    name: str
    source: str = ""
    image: HeadSpec = HeadSpec()
    text: HeadSpec = HeadSpec()
    loss: LossSpec = LossSpec()
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    towers: TowersSpec = TowersSpec()

    @property
    def trains_towers(self) -> bool:
        """Whether anything within the towers may train."""
        return self.towers.may_train("image") or self.towers.may_train("text")

    @property
    def trains_heads_alone(self) -> bool:
        """Whether `fit-head` does all that the recipe says: no tower trains, and both heads do."""
        return not self.trains_towers and not self.towers.freezes_heads


def zoo_names() -> list[str]:
    """Names of the recipes on pooled features that come with apecache, sorted."""
    return _names("zoo")


def tower_zoo_names() -> list[str]:
    """Names of the recipes that name parts of the towers, sorted; `freeze/` stands before any shorthand."""
    return _names("tower_zoo")


def _names(folder: str) -> list[str]:
    paths = (files("apecache.recipes") / folder).iterdir()
    return sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml"))


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe of the zoo by name, or a TOML file; `settings` are `section.key=value` overrides.

    Raises:
        RecipeError: unknown name, not TOML, an unknown key (with the nearest one), a value of the wrong kind.
    """
    source = Path(name) if name.endswith(".toml") else _packaged("freeze" if name.startswith(FREEZE) else name)
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{name}: not TOML: {error}") from None
    if name.startswith(FREEZE) and not name.endswith(".toml"):
        values = _freeze(values, name.removeprefix(FREEZE))
    for setting in settings:
        values = _override(values, setting)
    return parse_recipe(values, name)


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Raises RecipeError as `load_recipe` does."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(_explain(item) for item in error.errors()[:3])}") from None


def _packaged(name: str) -> Any:
    """A file of one of the zoos. Raises RecipeError for an unknown name."""
    for folder in ("zoo", "tower_zoo"):
        if name in _names(folder):
            return files("apecache.recipes") / folder / f"{name}.toml"
    known = [*zoo_names(), *tower_zoo_names()]
    raise RecipeError(f"no recipe {name!r}; there are {', '.join(known)}, or give a file.toml{nearest(name, known)}")


def _freeze(values: dict[str, Any], shorthand: str) -> dict[str, Any]:
    plain = require_shorthand(shorthand)
    return {**values, "name": f"{FREEZE}{plain}", "towers": {**values["towers"], "freezing": plain}}


def _override(values: dict[str, Any], setting: str) -> dict[str, Any]:
    """A copy with `section.key=value` set; the value is read as TOML, or as a bare string."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {setting!r}: expected section.key=value, for example optimiser.lr=3e-4")
    try:
        value = tomllib.loads(f"x = {text.strip()}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    return _with(values, keys, value, setting)


def _with(values: Any, keys: list[str], value: Any, setting: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"--set {setting!r}: {keys[0]} is inside a plain value, not a section")
    inner = value if len(keys) == 1 else _with(values.get(keys[0], {}), keys[1:], value, setting)
    return {**values, keys[0]: inner}


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1])
        return f"unknown key {place!r}; there are {', '.join(known)}{nearest(str(item['loc'][-1]), known)}"
    return f"{place}: {item['msg'].removeprefix('Value error, ')} (found {str(item['input'])[:40]!r})"


def _keys_at(path: Sequence[Any]) -> list[str]:
    """Keys of the section at `path` of a recipe."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, str):  # an index into a list of sections stays with these sections
            annotation = model.model_fields[part].annotation
            models = (annotation, *get_args(annotation))
            model = next(found for found in models if isinstance(found, type) and issubclass(found, BaseModel))
    return list(model.model_fields)
