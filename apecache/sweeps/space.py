"""What a sweep may choose: a TOML file with one line for each setting of a recipe.

"optimiser.lr" = {log = [1e-4, 1e-2]}
"image.depth" = {int = [1, 6], if = {"image.kind" = "mlp"}}
"image.dropout" = {float = [0.0, 0.5]}
"image.kind" = {choice = ["linear", "mlp"]}
"""

import json
import math
import random
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator

from apecache.arguments import AnyPath, as_path, as_texts
from apecache.errors import RecipeError
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.settings import Settings

Value = Any
Values = dict[str, Value]
"""By the setting's name; `recipe` is one of them where a sweep has several."""


class Dimension(Settings):
    """Exactly one of: `log`, `float` [low, high] and `int` [low, high], both ends included, or
    `choice`. `if`: only where all these settings have this value (or one of a list of values); they
    must stand above, or in the recipe. `steps`: how many values of a range a grid takes."""

    log: tuple[float, float] | None = None
    float_: tuple[float, float] | None = Field(default=None, alias="float")
    int_: tuple[int, int] | None = Field(default=None, alias="int")
    choice: tuple[Value, ...] | None = Field(default=None, min_length=1)
    only_if: dict[str, Value] = Field(default={}, alias="if")
    steps: int = Field(default=3, ge=2)

    @model_validator(mode="after")
    def _one(self) -> "Dimension":
        given = [x for x in (self.log, self.float_, self.int_, self.choice) if x is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log, float, int and choice")
        if self.choice is None and given[0][0] > given[0][1]:
            raise ValueError("a range is [low, high]")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError("a log range begins above 0")
        return self

    def draw(self, numbers: random.Random) -> Value:
        if self.log is not None:
            return math.exp(numbers.uniform(math.log(self.log[0]), math.log(self.log[1])))
        if self.float_ is not None:
            return numbers.uniform(*self.float_)
        return (
            numbers.choice(self.choice)
            if self.choice is not None
            else numbers.randint(*self.range_of_int)
        )

    @property
    def range_of_int(self) -> tuple[int, int]:
        assert self.int_ is not None
        return self.int_

    def grid(self) -> list[Value]:
        shares = [i / (self.steps - 1) for i in range(self.steps)]
        if self.log is not None:
            low, high = self.log
            return [low * (high / low) ** share for share in shares]
        if self.float_ is not None:
            return [self.float_[0] + (self.float_[1] - self.float_[0]) * share for share in shares]
        if self.choice is not None:
            return list(self.choice)
        low, high = self.range_of_int
        return sorted({round(low + (high - low) * share) for share in shares})


class Space:
    """Dimensions in their order, over one or several recipes."""

    def __init__(self, dimensions: Mapping[str, Dimension], recipes: Sequence[str]) -> None:
        self.recipes = list(recipes)
        several = {"recipe": Dimension(choice=tuple(recipes))} if len(self.recipes) > 1 else {}
        self.dimensions = {**several, **dimensions}
        self._bases = {name: load_recipe(name).model_dump(mode="json") for name in self.recipes}

    def choose(self, suggest: Callable[[str, Dimension], Value]) -> Values:
        """One point; `suggest` is asked for the settings whose condition holds."""
        values: Values = {}
        for name, dimension in self.dimensions.items():
            if self._holds(dimension, values):
                values[name] = suggest(name, dimension)
        return values

    def draw(self, seed: int, number: int) -> Values:
        """The random point of this number: the same whatever was drawn before."""
        numbers = random.Random(f"{seed}/{number}")
        return self.choose(lambda _, dimension: dimension.draw(numbers))

    def grid(self) -> Iterator[Values]:
        """Every point; the last setting changes fastest."""
        yield from self._grid({}, list(self.dimensions))

    def _grid(self, values: Values, names: list[str]) -> Iterator[Values]:
        if not names:
            yield values
        elif not self._holds(self.dimensions[names[0]], values):
            yield from self._grid(values, names[1:])
        else:
            for value in self.dimensions[names[0]].grid():
                yield from self._grid({**values, names[0]: value}, names[1:])

    def _holds(self, dimension: Dimension, values: Values) -> bool:
        return all(
            self._value(name, values) in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in dimension.only_if.items()
        )

    def _value(self, name: str, values: Values) -> Value:
        if name in values:
            return values[name]
        found: Any = self._bases[self.recipe_name(values)]
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def recipe_name(self, values: Values) -> str:
        return str(values.get("recipe", self.recipes[0]))

    def settings(self, values: Values) -> tuple[str, ...]:
        """As `--set` takes them."""
        return tuple(
            f"{name}={json.dumps(value)}" for name, value in values.items() if name != "recipe"
        )

    def recipe(self, values: Values) -> Recipe:
        """Raises RecipeError for a point that makes no recipe."""
        return load_recipe(self.recipe_name(values), self.settings(values))


def load_space(path: AnyPath, recipes: Sequence[str]) -> Space:
    """Raises RecipeError: not such a file, a condition on what stands below, a recipe that cannot
    be loaded."""
    path = as_path(path, "path")
    recipes = as_texts(recipes, "recipes")
    try:
        lines = tomllib.loads(path.read_text(encoding="utf-8"))
        dimensions = {name: Dimension.model_validate(line) for name, line in lines.items()}
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{path}: {first['msg'].removeprefix('Value error, ')}: {str(first['input'])[:60]}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    names = list(dimensions)
    for place, name in enumerate(names):
        late = set(dimensions[name].only_if) & set(names[place:])
        if late:
            raise RecipeError(f"{path}: {name} depends on {min(late)}, which must stand above it")
    if not dimensions and len(recipes) < 2:
        raise RecipeError(
            f'{path}: nothing to choose; expected lines such as "optimiser.lr" = {{log = '
            f"[1e-4, 1e-2]}}"
        )
    return Space(dimensions, recipes)
