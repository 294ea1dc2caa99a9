"""A recipe: everything that a fit on cached features needs besides the features. One TOML file
each, in `zoo/`."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from apecache.arguments import AnyPath, as_texts, wrong_type
from apecache.errors import RecipeError, nearest
from apecache.heads.build import build_heads
from apecache.heads.head import Head, HeadSpec
from apecache.losses.spec import LossSpec
from apecache.recipes.sections import (
    DistillationSpec,
    SharedSpec,
    TowersSpec,
    is_shorthand,
    require_shorthand,
    shorthand_names,
)
from apecache.settings import Settings

FREEZE = "freeze/"
"""`freeze/Vuf-Tuu`: the recipe `freeze` with that shorthand."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSpec(Settings):
    """Parameters with fewer than two dimensions are not decayed. `adam`: decay as a part of the
    gradient; `sgd`: betas[0] is the momentum. `clip`: largest gradient norm, 0 for none. `ema`:
    decay of an average of the weights, which is what is evaluated and kept; 0 for none."""

    kind: Literal["adamw", "adam", "lion", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    clip: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)


class ScheduleSpec(Settings):
    """Linear warm-up over a share of all steps, or over `warmup_steps`; then the rate falls along a
    cosine to `final` times itself, or stays (`constant`). In every epoch each image is seen once,
    with captions drawn at random.

    `epochs` 0: nothing trains, the heads stay as `init` makes them. `steps` above 0 replaces
    `epochs`. `batch_size`: images in a batch (more than there are: all). `accumulate`: batches per
    step; they add no negatives. `patience`: evaluations without a better one before it stops, 0:
    never. Dev is evaluated every `evaluate_every` epochs.
    """

    epochs: int = Field(default=30, ge=0)
    steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=1024, ge=2)
    accumulate: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["cosine", "constant"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)
    patience: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=1, ge=1)


class ImageAugmentationSpec(Settings):
    """Of the images of a live image side, another view in every epoch: a random crop of `scale`
    (share of the area) and `ratio` (of the sides), mirrored half of the time, then `operations` of
    RandAugment at `magnitude` (0 to 10)."""

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    operations: int = Field(default=0, ge=0)
    magnitude: float = Field(default=7.0, ge=0, le=10)

    @model_validator(mode="after")
    def _ranges(self) -> "ImageAugmentationSpec":
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError("scale and ratio are ranges with 0 < first <= second, scale up to 1")
        return self


class AugmentationSpec(Settings):
    """In feature space, but for `image`. `noise`: standard deviation of Gaussian noise in units of
    each feature's own deviation. `mixup`: one half of a batch is mixed with the other, both
    modalities with one coefficient from Beta(mixup, mixup) (FuseMix; it halves the batch).
    `token_dropout`: share of tokens hidden, never the first. Of features with several views, each
    image shows a random one in every epoch."""

    noise: float = Field(default=0.0, ge=0)
    mixup: float = Field(default=0.0, ge=0)
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    image: ImageAugmentationSpec | None = None


class ClosedFormSpec(Settings):
    """Candidates of what a closed form leaves open; the best combination is chosen on dev. `ridge`
    is in units of the mean eigenvalue; `rank` (of `cca`; a head's own `dim` goes before) and
    `power` of the canonical correlations."""

    ridge: tuple[Positive, ...] = Field(default=(0.01, 0.03, 0.1, 0.3, 1.0), min_length=1)
    rank: tuple[Count, ...] = Field(default=(64, 128, 256, 512), min_length=1)
    power: tuple[NotNegative, ...] = Field(default=(1.0,), min_length=1)


class Recipe(Settings):
    """`source`: where the recipe comes from, and what of it is our choice; `summary`: one line.

    `init`: `random`, or a closed form that the heads begin with: `cca` (both sides linear, or with
    `skip`), `ridge` and `procrustes` (text linear, or with `skip`; image `identity`), `asif` (both
    sides a `dictionary` of the training pairs; nothing trains). With `schedule.epochs` 0 that is
    the whole fit.
    """

    name: str
    source: str = ""
    summary: str = ""
    init: Literal["random", "cca", "ridge", "procrustes", "asif"] = "random"
    image: HeadSpec = HeadSpec()
    text: HeadSpec = HeadSpec()
    closed_form: ClosedFormSpec = ClosedFormSpec()
    loss: LossSpec = LossSpec()
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    towers: TowersSpec = TowersSpec()
    shared: SharedSpec | None = None
    distillation: DistillationSpec | None = None

    @property
    def trains_towers(self) -> bool:
        """Whether anything within the towers may train."""
        return self.towers.may_train("image") or self.towers.may_train("text")

    @property
    def trains_heads_alone(self) -> bool:
        """Whether `fit-head` does all that the recipe says: no tower trains, and both heads do."""
        return not self.trains_towers and not self.towers.freezes_heads

    @property
    def has_steps(self) -> bool:
        """Whether anything is fitted in steps; else a closed form is all."""
        return self.schedule.epochs > 0 or self.schedule.steps > 0

    @model_validator(mode="after")
    def _works_together(self) -> "Recipe":
        fixed = not self.has_steps
        if fixed and self.init == "random":
            raise ValueError(
                "schedule.epochs is 0 and init is random: nothing would be fitted; give one of them"
            )
        kinds = {part.kind for side in (self.image, self.text) for part in (side, *side.parts)}
        if ("dictionary" in kinds) != (self.init == "asif"):
            raise ValueError("init asif and heads of kind dictionary go together, and only so")
        if self.init == "asif" and not fixed:
            raise ValueError("init asif trains nothing: set schedule.epochs to 0")
        if self.distillation and not self.shared:
            raise ValueError("distillation teaches a shared encoder: give a section shared too")
        if self.shared and not (self.towers.may_train("image") and self.towers.may_train("text")):
            raise ValueError(
                "below a shared block both towers train: set towers.freezing to Vuu-Tuu"
            )
        if self.augmentation.image and not self.towers.may_train("image"):
            raise ValueError(
                "augmentation.image is for recipes whose image tower trains; others: extract "
                "--views (augmentation={})"
            )
        if self.augmentation.mixup and "tokens" in (self.image.cut, self.text.cut):
            raise ValueError("augmentation.mixup mixes pooled features; these heads take tokens")
        return self

    @property
    def cut(self) -> str:
        """What must be cached: `pooled` or `tokens`, or both named where the sides differ (image
        before text)."""
        sides = (self.image.cut, self.text.cut)
        return sides[0] if sides[0] == sides[1] else f"{sides[0]}, {sides[1]}"


def count_parameters(recipe: Recipe, image_dim: int, text_dim: int) -> int:
    """Trained parameters of both heads and the loss, for features of these widths; nothing is
    allocated.

    Raises:
        RecipeError: the widths do not work.
    """
    heads = build_meta_heads(recipe, image_dim, text_dim)
    if not recipe.has_steps:
        return 0
    scalars = recipe.loss.learnable * (2 if recipe.loss.kind == "sigmoid" else 1)
    return sum(p.numel() for head in heads for p in head.parameters()) + scalars


def build_meta_heads(recipe: Recipe, image_dim: int, text_dim: int) -> tuple[Head, Head]:
    """Build both heads on the meta device; a closed form that leaves its width open takes its
    largest rank.

    Raises:
        RecipeError: the widths do not work.
    """
    image, text = (
        _with_dim(side, 1) if side.kind == "dictionary" else side
        for side in (recipe.image, recipe.text)
    )
    if recipe.init == "cca" and image.dim is None and text.dim is None:
        image = _with_dim(image, min(image_dim, text_dim, max(recipe.closed_form.rank)))
    try:
        with torch.device("meta"):
            return build_heads(image, text=text, image_dim=image_dim, text_dim=text_dim)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None


def _with_dim(spec: HeadSpec, dim: int) -> HeadSpec:
    return spec.model_copy(update={"dim": dim})


def zoo_names() -> list[str]:
    """Names of the recipes on pooled features that come with apecache, sorted."""
    return _names("zoo")


def tower_zoo_names() -> list[str]:
    """Names of the recipes that name parts of the towers, sorted; `freeze/` stands before any
    shorthand."""
    return _names("tower_zoo")


def freeze_names() -> list[str]:
    """Names of the 36 recipes that are made of `freeze` and a shorthand, sorted."""
    return sorted(f"{FREEZE}{shorthand}" for shorthand in shorthand_names())


def _names(folder: str) -> list[str]:
    paths = (files("apecache.recipes") / folder).iterdir()
    return sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml"))


def load_recipe(name: AnyPath, settings: Sequence[str] = ()) -> Recipe:
    """A recipe of the zoo by name, or a TOML file; `settings` are `section.key=value` overrides.

    Raises:
        RecipeError: unknown name, not TOML, an unknown key (with the nearest one), a value of the
            wrong kind.
    """
    if not isinstance(name, str | os.PathLike):
        raise wrong_type(name, "the name of a recipe or a path of a .toml file", "name")
    name = os.fspath(name)
    settings = as_texts(settings, "settings")
    source = (
        Path(name)
        if name.endswith(".toml")
        else _packaged("freeze" if name.startswith(FREEZE) else name)
    )
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


def as_recipe(recipe: object) -> Recipe:
    """An argument that is a recipe: itself, or loaded by its name or file. Raises OptionError for
    another type, else as `load_recipe` does."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | os.PathLike):
        return load_recipe(recipe)
    raise wrong_type(recipe, "a Recipe, or the name of one", "recipe")


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Raises RecipeError as `load_recipe` does."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            f"{where}: {'; '.join(_explain(item) for item in error.errors()[:3])}"
        ) from None


def _packaged(name: str) -> Any:
    """A file of one of the zoos. Raises RecipeError for an unknown name."""
    for folder in ("zoo", "tower_zoo"):
        if name in _names(folder):
            return files("apecache.recipes") / folder / f"{name}.toml"
    packaged = [*zoo_names(), *tower_zoo_names()]
    hint = nearest(name.replace("_", "-"), [*packaged, *freeze_names()])
    if is_shorthand(name):
        hint = f"; did you mean {FREEZE}{require_shorthand(name)}?"
    raise RecipeError(
        f"no recipe {name!r}; there are {', '.join(packaged)}, {FREEZE}Vuf-Tuu and its sisters, "
        f"or give a file.toml{hint}"
    )


def _freeze(values: dict[str, Any], shorthand: str) -> dict[str, Any]:
    plain = require_shorthand(shorthand)
    return {**values, "name": f"{FREEZE}{plain}", "towers": {**values["towers"], "freezing": plain}}


def _override(values: dict[str, Any], setting: str) -> dict[str, Any]:
    """A copy with `section.key=value` set; the value is read as TOML, or as a bare string."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {setting!r}: expected section.key=value, for example optimiser.lr=3e-4"
        )
    try:
        value = tomllib.loads(f"x = {text.strip()}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    return _with(values, keys=keys, value=value, setting=setting)


def _with(values: Any, keys: list[str], value: Any, setting: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"--set {setting!r}: {keys[0]} is inside a plain value, not a section")
    inner = (
        value
        if len(keys) == 1
        else _with(values.get(keys[0], {}), keys=keys[1:], value=value, setting=setting)
    )
    return {**values, keys[0]: inner}


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1])
        return (
            f"unknown key {place!r}; there are "
            f"{', '.join(known)}{nearest(str(item['loc'][-1]), known)}"
        )
    known = [
        part.strip("'")
        for part in item.get("ctx", {}).get("expected", "").replace(" or ", ", ").split(", ")
    ]
    hint = nearest(str(item["input"]), known) if item["type"] == "literal_error" else ""
    message: str = item["msg"].removeprefix("Value error, ")
    if not place:
        return message
    return f"{place}: {message} (found {str(item['input'])[:40]!r}){hint}"


def _keys_at(path: Sequence[Any]) -> list[str]:
    """Keys of the section at `path` of a recipe."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, str):  # a number stands for one of several heads or sections
            annotation = model.model_fields[part].annotation
            models = (annotation, *get_args(annotation))
            found = (one for one in models if isinstance(one, type) and issubclass(one, BaseModel))
            model = HeadSpec if part == "parts" else next(found)
    return list(model.model_fields)
