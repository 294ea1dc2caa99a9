"""Read and check recipes: all settings of a fit, in one TOML file each in `zoo/`, `tower_zoo/`."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from apecache.arguments import AnyPath, as_texts, wrong_type
from apecache.errors import RecipeError, nearest
from apecache.heads.build import build_heads
from apecache.heads.head import Head, HeadSpec
from apecache.heads.pooled import N_COMPLEMENTS
from apecache.losses.spec import LossSpec
from apecache.recipes.extend import RecipeLayer, is_file, merged_layers, require_no_cycle
from apecache.recipes.former_keys import NEW_KEYS, NEW_KINDS
from apecache.recipes.schedule import OptimizerSpec, ScheduleSpec
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
"""Before a shorthand: `freeze/Vuf-Tuu` is the recipe `freeze` with that shorthand."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]


class ImageAugmentationSpec(Settings):
    """Show another view of each image in every epoch, where the image tower is live."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Range of a random crop's share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the ratio of the crop's sides."""
    flip: bool = False
    """Mirror the crop half of the time."""
    jitter: float = Field(default=0.0, ge=0, le=1)
    """Change brightness, contrast and saturation by factors up to this far from 1."""
    operations: int = Field(default=0, ge=0)
    """Of RandAugment, drawn after the crop; each is applied half of the time."""
    magnitude: float = Field(default=7.0, ge=0, le=10)
    """Of these operations."""

    @model_validator(mode="after")
    def _ranges(self) -> "ImageAugmentationSpec":
        least_scale, most_scale = self.scale
        least_ratio, most_ratio = self.ratio
        if not (0 < least_scale <= most_scale <= 1 and 0 < least_ratio <= most_ratio):
            raise ValueError("scale and ratio are ranges with 0 < first <= second, scale up to 1")
        return self


class AugmentationSpec(Settings):
    """Change features, and live images, at random in training.

    Where the store has several views of an image, every epoch takes a random one.
    """

    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise, in units of each feature's deviation."""
    mixup: float = Field(default=0.0, ge=0)
    """Mix one half of a batch with the other, both modalities with one coefficient from
    Beta(mixup, mixup) (FuseMix; it halves the batch); 0: do not mix."""
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of tokens that are hidden, never the first."""
    image: ImageAugmentationSpec | None = None
    """Of the images themselves, not in feature space."""


class ClosedFormSpec(Settings):
    """List candidates of what a closed form leaves open; dev decides on the best combination."""

    ridge: tuple[Positive, ...] = Field(default=(0.01, 0.03, 0.1, 0.3, 1.0), min_length=1)
    """In units of the mean eigenvalue."""
    rank: tuple[Count, ...] = Field(default=(64, 128, 256, 512), min_length=1)
    """Of `cca`; ignored where a head has a `dim`."""
    power: tuple[NotNegative, ...] = Field(default=(1.0,), min_length=1)
    """Of the canonical correlations."""


class Recipe(Settings):
    """Hold all settings of a fit."""

    name: str
    source: str = ""
    """Where the recipe comes from, and which settings are this project's choice."""
    summary: str = ""
    """One line."""
    init: Literal["random", "cca", "ridge", "procrustes", "asif", "pretrained"] = "random"
    """`random`, or a closed form that the heads begin with: `cca` (both sides linear, or with
    `skip`), `ridge` and `procrustes` (text linear, or with `skip`; image `identity`), `asif` (both
    sides a `dictionary` of the training pairs; nothing trains). With `schedule.epochs` 0 the closed
    form is the whole fit. `pretrained`: the encoders are both sides of one image-text model (CLIP,
    SigLIP), both heads are `identity`, and temperature, bias and so the kind of the loss are the
    model's own."""
    image: HeadSpec = HeadSpec()
    text: HeadSpec = HeadSpec()
    closed_form: ClosedFormSpec = ClosedFormSpec()
    loss: LossSpec = LossSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    towers: TowersSpec = TowersSpec()
    shared: SharedSpec | None = None
    distillation: DistillationSpec | None = None

    @property
    def trains_towers(self) -> bool:
        """Tell whether anything within the towers may train."""
        return self.towers.may_train("image") or self.towers.may_train("text")

    @property
    def trains_heads_alone(self) -> bool:
        """Tell whether `fit-head` can run the recipe: no tower trains, and both heads do."""
        return not self.trains_towers and not self.towers.freezes_heads

    @property
    def has_steps(self) -> bool:
        """Tell whether anything is fitted in steps; if not, a closed form is the whole fit."""
        return self.schedule.epochs > 0 or self.schedule.steps > 0

    @model_validator(mode="after")
    def _works_together(self) -> "Recipe":
        if not self.has_steps and self.init == "random":
            raise ValueError(
                "schedule.epochs is 0 and init is random: nothing would be fitted; give one of them"
            )
        heads = (self.image, *self.image.parts, self.text, *self.text.parts)
        has_dictionary = any(head.kind == "dictionary" for head in heads)
        if has_dictionary != (self.init == "asif"):
            raise ValueError("init asif and heads of kind dictionary go together, and only so")
        is_identity = all(head.kind == "identity" and not head.standardize for head in heads)
        if self.init == "pretrained" and not is_identity:
            raise ValueError(
                "init pretrained takes the model's own features: set kind identity and "
                "standardize false for image and text"
            )
        canonical = [head.kind == "canonical" for head in heads]
        if any(canonical) and (not all(canonical) or self.init != "cca" or self.has_steps):
            raise ValueError(
                "heads of kind canonical come on both sides, with init cca and schedule.epochs 0"
            )
        if self.init == "asif" and self.has_steps:
            raise ValueError("init asif trains nothing: set schedule.epochs to 0")
        if self.schedule.epoch == "pairs" and self.loss.captions > 1:
            raise ValueError(
                "an epoch of pairs takes one caption at a time: set loss.captions to 1, or "
                "schedule.epoch to images"
            )
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
        self._require_nested_widths()
        return self

    def _require_nested_widths(self) -> None:
        """Raise ValueError where the widths of `loss.matryoshka` do not suit the heads."""
        widths = self.loss.matryoshka
        if not widths:
            return
        if self.image.parts or self.text.parts or self.shared:
            raise ValueError(
                "loss.matryoshka is for a single head on each side: an ensemble or a shared block "
                "has no order among its values"
            )
        dims = [dim for dim in (self.image.dim, self.text.dim) if dim is not None]
        if dims and widths[-1] >= min(dims):
            raise ValueError(
                f"loss.matryoshka {widths[-1]} is not smaller than the width {min(dims)} of the "
                "embedding, which is always trained"
            )

    @property
    def cut(self) -> str:
        """Return what must be cached: `pooled`, `tokens`, or both (image first) if they differ."""
        image_cut = self.image.cut
        text_cut = self.text.cut
        return image_cut if image_cut == text_cut else f"{image_cut}, {text_cut}"


def count_parameters(recipe: Recipe, image_dim: int, text_dim: int) -> int:
    """Count the trained parameters of both heads and the loss without allocating them.

    Args:
        image_dim: width of the image features.
        text_dim: width of the text features.

    Raises:
        RecipeError: the widths do not work.
    """
    heads = build_meta_heads(recipe, image_dim, text_dim)
    if not recipe.has_steps:
        return 0
    # The temperature, and the bias that only the sigmoid loss has.
    n_scalars = 2 if recipe.loss.kind == "sigmoid" else 1
    in_heads = sum(parameter.numel() for head in heads for parameter in head.parameters())
    return in_heads + recipe.loss.learnable * n_scalars


def build_meta_heads(recipe: Recipe, image_dim: int, text_dim: int) -> tuple[Head, Head]:
    """Build both heads on the meta device.

    A closed form that leaves its width open takes its largest rank.

    Raises:
        RecipeError: the widths do not work.
    """
    # A dictionary is as wide as there are training pairs, which a recipe does not know.
    image, text = (
        _with_dim(side, 1) if side.kind == "dictionary" else side
        for side in (recipe.image, recipe.text)
    )
    # Setting one side is enough: the other takes the same width.
    if recipe.init == "cca" and image.dim is None and text.dim is None:
        # No rank exceeds the width of the features it is found in.
        rank = min(image_dim, text_dim, max(recipe.closed_form.rank))
        if text.kind == "canonical":
            rank += N_COMPLEMENTS
        image = _with_dim(image, rank)
    try:
        with torch.device("meta"):
            return build_heads(image, text=text, image_dim=image_dim, text_dim=text_dim)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None


def _with_dim(spec: HeadSpec, dim: int) -> HeadSpec:
    return spec.model_copy(update={"dim": dim})


def recipe_names() -> list[str]:
    """Return the names of all packaged recipes: those of heads, then those of towers."""
    towers = [name for name in tower_zoo_names() if name != FREEZE.rstrip("/")]
    return [*zoo_names(), *towers, *freeze_names()]


def zoo_names() -> list[str]:
    """Return the names of the recipes in `zoo/`, which train no towers, sorted."""
    return _names("zoo")


def tower_zoo_names() -> list[str]:
    """Return the names of the recipes in `tower_zoo/`, which may train towers, sorted.

    The recipe `freeze` stands for those of `freeze_names`.
    """
    return _names("tower_zoo")


def freeze_names() -> list[str]:
    """Return the names of the 36 recipes that are made of `freeze` and a shorthand, sorted."""
    return sorted(f"{FREEZE}{shorthand}" for shorthand in shorthand_names())


def _names(folder: str) -> list[str]:
    paths = (files("apecache.recipes") / folder).iterdir()
    return sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml"))


def load_recipe(name: AnyPath, settings: Sequence[str] = ()) -> Recipe:
    """Load a recipe.

    Args:
        name: of a recipe that comes with apecache, or the path of a TOML file, which ends in .toml.
        settings: overrides of the form `section.key=value`, applied in their order.

    Raises:
        OptionError: arguments of another type.
        RecipeError: unknown name, not TOML, an unknown key (with the nearest one), a value of the
            wrong type, a base that cannot be read, recipes that extend one another in a circle.
    """
    if not isinstance(name, str | os.PathLike):
        raise wrong_type(name, "the name of a recipe or a path of a .toml file", "name")
    name = os.fspath(name)
    settings = as_texts(settings, "settings")
    layers = _read_layers(name)
    values = merged_layers(layers)
    for setting in settings:
        values = _override(values, setting)
    # A wrong key may stand in any of the files.
    recipe_names = " extending ".join(layer.name for layer in layers) if is_file(name) else name
    return parse_recipe(values, recipe_names)


def _read_layers(name: str) -> list[RecipeLayer]:
    """Read a recipe and those that it extends, each before its base.

    Raises:
        RecipeError: as `load_recipe`, or the recipes extend one another in a circle.
    """
    layers = [RecipeLayer(name=name, values=_read_values(name))]
    while (base := layers[-1].base()) is not None:
        require_no_cycle(layers, base)
        try:
            values = _read_values(base)
        except RecipeError as error:
            raise RecipeError(f"{layers[-1].name}: extends: {error}") from None
        layers.append(RecipeLayer(name=base, values=values))
    return layers


def _read_values(name: str) -> dict[str, Any]:
    """Read one recipe's own values.

    Raises:
        RecipeError: unknown name, or not TOML.
    """
    is_freeze = name.startswith(FREEZE) and not is_file(name)
    source = Path(name) if is_file(name) else _packaged("freeze" if is_freeze else name)
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{name}: not TOML: {error}") from None
    return _freeze(values, name.removeprefix(FREEZE)) if is_freeze else values


def as_recipe(recipe: object) -> Recipe:
    """Return a recipe that is given itself, by its name, or as a file.

    Raises:
        OptionError: an argument of another type.
        RecipeError: as `load_recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | os.PathLike):
        return load_recipe(recipe)
    raise wrong_type(recipe, "a Recipe, or the name of one", "recipe")


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Check the values of a recipe.

    Args:
        where: the name or path that an error begins with.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        # Three at most: a file that is not a recipe may make dozens.
        problems = "; ".join(_explain(item) for item in error.errors()[:3])
        raise RecipeError(f"{where}: {problems}") from None


def _packaged(name: str) -> Traversable:
    """Return a file of one of the zoos.

    Raises:
        RecipeError: an unknown name.
    """
    for folder in ("zoo", "tower_zoo"):
        if name in _names(folder):
            return files("apecache.recipes") / folder / f"{name}.toml"
    packaged = [*zoo_names(), *tower_zoo_names()]
    hint = nearest(name, [*packaged, *freeze_names()])
    if is_shorthand(name):
        hint = f"; did you mean {FREEZE}{require_shorthand(name)}?"
    # The nearest name comes first: a reader may not reach the end of the list.
    beginning = f"no recipe {name!r}{hint} There are" if hint else f"no recipe {name!r}; there are"
    raise RecipeError(
        f"{beginning} {', '.join(packaged)}, {FREEZE}Vuf-Tuu and its sisters, or give a file.toml"
    )


def _freeze(values: dict[str, Any], shorthand: str) -> dict[str, Any]:
    """Return the values of the recipe `freeze` with a shorthand, which may be in either form."""
    ascii_shorthand = require_shorthand(shorthand)
    towers = {**values["towers"], "freezing": ascii_shorthand}
    named = {**values, "name": f"{FREEZE}{ascii_shorthand}", "towers": towers}
    if ascii_shorthand.startswith("Vff"):
        # A frozen image tower is read from the cache, which holds no crops.
        del named["augmentation"]
    return named


def _override(values: dict[str, Any], setting: str) -> dict[str, Any]:
    """Return a copy with `section.key=value` set.

    Raises:
        RecipeError: the setting is not of that form, or goes into a value that is no section.
    """
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {setting!r}: expected section.key=value, for example optimizer.lr=3e-4"
        )
    if keys[0] == "extends":
        raise RecipeError(f"--set {setting!r}: only a recipe file extends another; write one")
    try:
        value = tomllib.loads(f"x = {text.strip()}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        # A bare string: quotes would have to be escaped in a shell.
        value = text.strip()
    return _with(values, keys=keys, value=value, setting=setting)


def _with(values: Any, keys: list[str], value: Any, setting: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"--set {setting!r}: {keys[0]} is inside a plain value, not a section")
    first_key, *inner_keys = keys
    if not inner_keys:
        return {**values, first_key: value}
    # A section that is not there is made: whether the recipe knows it is checked afterwards.
    section = values.get(first_key, {})
    changed = _with(section, keys=inner_keys, value=value, setting=setting)
    return {**values, first_key: changed}


def _explain(item: Any) -> str:
    """Say one of pydantic's errors in a line, with the nearest key or value."""
    key_path = ".".join(str(key) for key in item["loc"])
    if item["type"] == "extra_forbidden":
        *section_path, unknown_key = item["loc"]
        if unknown_key in NEW_KEYS:
            return f"{key_path!r} is called {NEW_KEYS[unknown_key]!r} now"
        keys = _keys_at(section_path)
        hint = nearest(str(unknown_key), keys)
        return f"unknown key {key_path!r}; there are {', '.join(keys)}{hint}"
    hint = ""
    if item["type"] == "literal_error" and str(item["input"]) in NEW_KINDS:
        hint = f"; it is called {NEW_KINDS[item['input']]!r} now"
    elif item["type"] == "literal_error":
        # pydantic has the values of a Literal only in words: 'a', 'b' or 'c'.
        expected = item.get("ctx", {}).get("expected", "").replace(" or ", ", ")
        choices = [choice.strip("'") for choice in expected.split(", ")]
        hint = nearest(str(item["input"]), choices)
    if key_path == "schedule.epoch":
        hint = "; the number of epochs is schedule.epochs"
    # pydantic puts this before the messages of the validators above.
    message: str = item["msg"].removeprefix("Value error, ")
    if not key_path:
        return message
    if key_path == "name" and item["type"] == "missing":
        return 'the recipe has no name; add a line like name = "mine" (names are not inherited)'
    return f"{key_path}: {message} (found {str(item['input'])[:40]!r}){hint}"


def _keys_at(path: Sequence[Any]) -> list[str]:
    """Return the keys of the section at `path` of a recipe."""
    model: Any = Recipe
    for key in path:
        if not isinstance(key, str):
            continue  # a number stands for one of several heads or sections
        annotation = model.model_fields[key].annotation
        # A section may be `Spec` alone, or one of a union or tuple as in `Spec | None`.
        candidates = (annotation, *get_args(annotation))
        sections = (
            candidate
            for candidate in candidates
            if isinstance(candidate, type) and issubclass(candidate, BaseModel)
        )
        model = HeadSpec if key == "parts" else next(sections)
    return list(model.model_fields)
