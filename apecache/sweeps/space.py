"""What a sweep may choose: a TOML file with one line for each setting of a recipe.

"optimizer.lr" = {log = [1e-4, 1e-2]}
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
"""A point of the space by the names of settings; `recipe` is one where a sweep has several."""


class Dimension(Settings):
    """Describe the values of one setting: exactly one of `log`, `float`, `int` and `choice`.

    Ranges are [low, high], both ends included.
    """

    log: tuple[float, float] | None = None
    """A range whose logarithms are equally likely."""
    float_: tuple[float, float] | None = Field(default=None, alias="float")
    int_: tuple[int, int] | None = Field(default=None, alias="int")
    choice: tuple[Value, ...] | None = Field(default=None, min_length=1)
    only_if: dict[str, Value] = Field(default={}, alias="if")
    """The setting is chosen only where all these settings have this value, or one of a list of
    values. They must stand above, or in the recipe."""
    steps: int = Field(default=3, ge=2)
    """How many values of a range a grid takes."""

    @model_validator(mode="after")
    def _one(self) -> "Dimension":
        forms = (self.log, self.float_, self.int_, self.choice)
        present = [form for form in forms if form is not None]
        if len(present) != 1:
            raise ValueError("give exactly one of log, float, int and choice")
        if self.choice is None:
            low, high = present[0]
            if low > high:
                raise ValueError("a range is [low, high]")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError("a log range begins above 0")
        return self

    def draw(self, numbers: random.Random) -> Value:
        """Draw a value; all values are equally likely, with `log` all logarithms."""
        if self.log is not None:
            log_low = math.log(self.log[0])
            log_high = math.log(self.log[1])
            return math.exp(numbers.uniform(log_low, log_high))
        if self.float_ is not None:
            low, high = self.float_
            return numbers.uniform(low, high)
        if self.choice is not None:
            return numbers.choice(self.choice)
        first, last = self.range_of_int
        return numbers.randint(first, last)

    @property
    def range_of_int(self) -> tuple[int, int]:
        """Return the `int` range of a dimension that has one."""
        assert self.int_ is not None
        return self.int_

    def grid(self) -> list[Value]:
        """Return the values that a grid takes; of a range `steps`, both ends included."""
        if self.choice is not None:
            return list(self.choice)
        shares = [i / (self.steps - 1) for i in range(self.steps)]
        if self.log is not None:
            low, high = self.log
            return [low * (high / low) ** share for share in shares]
        if self.float_ is not None:
            low, high = self.float_
            return [low + (high - low) * share for share in shares]
        first, last = self.range_of_int
        # A set: a short range of integers has fewer values than `steps`.
        return sorted({round(first + (last - first) * share) for share in shares})


class Space:
    """Hold the dimensions of a sweep in their order, over one or several recipes.

    Args:
        dimensions: By the names of settings, as `--set` takes them.
        recipes: Names or files. Several of them are the first dimension, `recipe`.
        first: Points that the random sampler tries before it draws, such as a recipe as it is.
    """

    def __init__(
        self,
        dimensions: Mapping[str, Dimension],
        recipes: Sequence[str],
        first: Sequence[Values] = (),
    ) -> None:
        self.recipes = list(recipes)
        self.first = [dict(values) for values in first]
        several = {"recipe": Dimension(choice=tuple(recipes))} if len(self.recipes) > 1 else {}
        self.dimensions = {**several, **dimensions}
        self._bases = {name: load_recipe(name).model_dump(mode="json") for name in self.recipes}

    def choose(self, suggest: Callable[[str, Dimension], Value]) -> Values:
        """Choose a point; `suggest` chooses each setting whose condition holds."""
        values: Values = {}
        for name, dimension in self.dimensions.items():
            if self._holds(dimension, values):
                values[name] = suggest(name, dimension)
        return values

    def draw(self, seed: int, number: int) -> Values:
        """Draw the random point of this number; it does not depend on earlier draws."""
        if number < len(self.first):
            return dict(self.first[number])
        numbers = random.Random(f"{seed}/{number}")
        return self.choose(lambda _, dimension: dimension.draw(numbers))

    def grid(self) -> Iterator[Values]:
        """Yield every point; the last setting changes fastest."""
        yield from self._grid({}, list(self.dimensions))

    def _grid(self, values: Values, names: list[str]) -> Iterator[Values]:
        """Yield the points that continue `values` by the settings `names`."""
        if not names:
            yield values
            return
        name, *later_names = names
        dimension = self.dimensions[name]
        if not self._holds(dimension, values):
            yield from self._grid(values, later_names)
            return
        for value in dimension.grid():
            yield from self._grid({**values, name: value}, later_names)

    def _holds(self, dimension: Dimension, values: Values) -> bool:
        """Return whether the condition of a dimension holds at a point."""
        for name, condition in dimension.only_if.items():
            accepted = condition if isinstance(condition, list) else [condition]
            if self._value(name, values) not in accepted:
                return False
        return True

    def _value(self, name: str, values: Values) -> Value:
        """Return a setting's value at a point, or in the recipe; None where neither has it."""
        if name in values:
            return values[name]
        value: Any = self._bases[self.recipe_name(values)]
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def recipe_name(self, values: Values) -> str:
        """Return the name of the recipe at a point."""
        return str(values.get("recipe", self.recipes[0]))

    def settings(self, values: Values) -> tuple[str, ...]:
        """Return the settings of a point as `--set` takes them."""
        settings = []
        for name, value in values.items():
            if name != "recipe":
                settings.append(f"{name}={json.dumps(value)}")
        return tuple(settings)

    def recipe(self, values: Values) -> Recipe:
        """Return the recipe of a point.

        Raises:
            RecipeError: The point makes no recipe.
        """
        return load_recipe(self.recipe_name(values), self.settings(values))


def load_space(path: AnyPath, recipes: Sequence[str]) -> Space:
    """Read a space from a TOML file.

    Args:
        path: The file; the module shows its lines.
        recipes: Names or files of the recipes to choose among.

    Raises:
        RecipeError: The file is not of this form, a condition names a setting that stands below, or
            a recipe cannot be loaded.
    """
    path = as_path(path, "path")
    recipes = as_texts(recipes, "recipes")
    try:
        lines = tomllib.loads(path.read_text(encoding="utf-8"))
        dimensions = {name: Dimension.model_validate(line) for name, line in lines.items()}
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        shown_input = str(first["input"])[:60]
        raise RecipeError(f"{path}: {message}: {shown_input}") from None
    # RecursionError: tomllib recurses into nested arrays.
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    names = list(dimensions)
    for i, name in enumerate(names):
        # From i on: a setting cannot depend on itself either.
        later_names = set(dimensions[name].only_if) & set(names[i:])
        if later_names:
            raise RecipeError(
                f"{path}: {name} depends on {min(later_names)}, which must stand above it"
            )
    if not dimensions and len(recipes) < 2:
        raise RecipeError(
            f'{path}: nothing to choose; expected lines such as "optimizer.lr" = {{log = '
            f"[1e-4, 1e-2]}}"
        )
    return Space(dimensions, recipes)
