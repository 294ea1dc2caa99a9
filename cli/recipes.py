"""`apecache recipes`."""

import re
from json import dumps as to_json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .option_groups import Json
from .terminal import ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.recipes.recipe import Recipe

COLUMNS = ("recipe", "needs", "summary", "parameters")


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe and its source. Default: all recipes.")
    ] = None,
    image_dim: Annotated[
        int, typer.Option(min=1, help="Width of the image features, for the parameter counts.")
    ] = 768,
    text_dim: Annotated[
        int, typer.Option(min=1, help="Width of the text features, for the parameter counts.")
    ] = 768,
    json: Json = False,
) -> None:
    """List the recipes: what each one trains, what it needs and where it comes from.

    With a name, also print the settings as one recipe file, with those of the recipes it extends.

    Parameters of fit-head recipes are counted for the given feature widths. Parameters of
    fit-encoder recipes are counted for ViT-B/16 and BERT-base. Use apecache plan for other
    encoders.

    Example: apecache recipes --image-dim 1280 --text-dim 384

    Example: apecache recipes lilt-i
    """
    with ending():
        from apecache.recipes.recipe import freeze_names, load_recipe, tower_zoo_names, zoo_names

        names = [name] if name else zoo_names()
        loaded = [load_recipe(recipe_name) for recipe_name in names]
        rows = [_describe(recipe, image_dim, text_dim) for recipe in loaded]
        if name:
            rows[0]["settings"] = loaded[0].model_dump(mode="json")
        if json:
            values = {"image_dim": image_dim, "text_dim": text_dim, "recipes": rows}
            show_json({**values, "encoder_recipes": [*tower_zoo_names(), *freeze_names()]})
            return
        lines = [(row["name"], row["cut"], row["summary"], _count(row)) for row in rows]
        # The same in all rows: without a name they are recipes for fit-head.
        counted_with = rows[0]["counted_with"]
        # With a name, standard output is a recipe file: what is said of the recipe goes elsewhere.
        show_table(f"recipes; parameters for {counted_with}", COLUMNS, lines, err=bool(name))
        if name:
            if loaded[0].source:
                typer.echo(f"source: {loaded[0].source}\n", err=True)
            typer.echo("\n".join(_settings_lines(loaded[0])))
            return
        show_table(
            "recipes for fit-encoder; apecache recipes NAME shows the parameters",
            COLUMNS[:3],
            _encoder_lines(),
        )


def _describe(recipe: "Recipe", image_dim: int, text_dim: int) -> dict[str, Any]:
    """Return the JSON form of a recipe.

    Parameters of a recipe for fit-head are counted for features of these widths, those of any other
    for the reference encoders.
    """
    from apecache.recipes.recipe import count_parameters

    named = {"name": recipe.name, "summary": _summary(recipe), "source": recipe.source}
    if recipe.trains_heads_alone:
        count = count_parameters(recipe, image_dim, text_dim)
        widths = f"features of width {image_dim} (image) and {text_dim} (text)"
        return {**named, "cut": recipe.cut, "n_trained_parameters": count, "counted_with": widths}
    from apecache.encoders.reference import REFERENCE_NAMES, reference_towers
    from apecache.plan.needs import count_needs

    towers = reference_towers(recipe.towers.image_pooling, recipe.towers.text_pooling)
    needs = count_needs(recipe, *towers)
    encoders = " and ".join(REFERENCE_NAMES)
    return {
        **named,
        "cut": needs.summary,
        "n_trained_parameters": needs.n_trained,
        "counted_with": encoders,
    }


def _settings_lines(recipe: "Recipe") -> list[str]:
    """Return the settings that a recipe and its bases set, as lines of a TOML file."""
    settings = recipe.model_dump(mode="json", exclude_unset=True, exclude={"source"})
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            lines += [f"{key}.{name} = {_toml(inner)}" for name, inner in value.items()]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return lines


def _toml(value: Any) -> str:
    """Write a value of JSON as one of TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return to_json(value, ensure_ascii=False)


def _summary(recipe: "Recipe") -> str:
    """Return a recipe's summary; of a recipe without one, the first sentence of its source."""
    # Not "et al. ", which ends no sentence.
    return recipe.summary or re.split(r"(?<!et al)\. ", recipe.source)[0]


def _count(row: dict[str, Any]) -> object:
    count = row["n_trained_parameters"]
    return "depends on the teacher" if count is None else count


def _encoder_lines() -> list[tuple[str, str, str]]:
    """Return a row for each recipe of fit-encoder, and one for the family of freezing recipes."""
    from apecache.plan.needs import needs_of_sides
    from apecache.recipes.recipe import freeze_names, load_recipe, tower_zoo_names

    lines = []
    for recipe_name in tower_zoo_names():
        recipe = load_recipe(recipe_name)
        lines.append((recipe.name, needs_of_sides(recipe), _summary(recipe)))
    family = (
        f"{len(freeze_names())} combinations: u, f or c (CLS alone) for embeddings, u or f for "
        "blocks"
    )
    return [*lines, ("freeze/V[ufc][uf]-T[ufc][uf]", "by combination", family)]
