"""`apecache recipes`."""

from typing import Annotated

import typer

from .terminal import Json, ending, show_json, show_table


def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe, with its source; default: all of them.")] = None,
    image_dim: Annotated[int, typer.Option(min=1, help="Width of the image features, to count parameters for.")] = 768,
    text_dim: Annotated[int, typer.Option(min=1, help="Width of the text features, to count parameters for.")] = 768,
    json: Json = False,
) -> None:
    """List the recipes for `fit-head`: what must be cached, what trains, where it comes from.

    Example: apecache recipes --image-dim 1280 --text-dim 384

    Example: apecache recipes sail
    """
    with ending():
        from apecache.recipes.recipe import count_parameters, load_recipe, tower_zoo_names, zoo_names

        found = [load_recipe(each) for each in ([name] if name else zoo_names())]
        rows = [(r.name, r.cut, r.summary, count_parameters(r, image_dim, text_dim)) for r in found]
        if json:
            keys = ("name", "cut", "summary", "n_trained_parameters", "source")
            listed = [dict(zip(keys, (*row, r.source), strict=True)) for row, r in zip(rows, found, strict=True)]
            told = {"image_dim": image_dim, "text_dim": text_dim, "recipes": listed}
            show_json({**told, "encoder_recipes": tower_zoo_names()})
            return
        title = f"recipes; parameters for features of width {image_dim} (image) and {text_dim} (text)"
        show_table(title, ("recipe", "needs", "what it is", "parameters"), rows)
        if name:
            typer.echo(f"source: {found[0].source}")
        else:
            typer.echo(f"for fit-encoder (see apecache plan): {', '.join(tower_zoo_names())}, and freeze/Vuf-Tuu, …")
