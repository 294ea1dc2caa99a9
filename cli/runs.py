"""What commands that take a run share: encoders that have moved, and images to open."""

from pathlib import Path
from typing import Annotated, Any

import typer

MovedImage = Annotated[
    str | None,
    typer.Option("--image", help="The image encoder's new place, if its folder has moved."),
]
MovedText = Annotated[
    str | None,
    typer.Option("--text", help="The text encoder's new place, if its folder has moved."),
]


def moved_encoders(run: Path, image: str | None, text: str | None) -> tuple[Any, Any]:
    """Return the recorded settings of the image and the text encoder under new names.

    None for an encoder without a new name: the run's own record holds for it.
    """
    if image is None and text is None:
        return None, None
    from apecache.runs.load import recorded_encoder

    names: tuple[tuple[Any, str | None], ...] = (("image", image), ("text", text))
    moved = [recorded_encoder(run, side).with_name(name) if name else None for side, name in names]
    return moved[0], moved[1]


def opener(root: str | None) -> Any:
    """Return a function that reads the image of a key below `root`; None without a root."""
    if root is None:
        return None
    from apecache.data.images import load_image
    from apecache.data.media import media_below

    media = media_below(root)
    return lambda key: load_image(key, media).image
