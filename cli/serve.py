"""`apecache serve`."""

from pathlib import Path
from typing import Annotated

import typer

from .inputs import Root
from .report import media_of
from .runs import moved_encoders
from .terminal import Device, Json, ending, show_json, warn


def serve(
    index: Annotated[Path, typer.Argument(help="An index folder.")],
    run: Annotated[
        Path | None, typer.Option(help="The run it must be of. Default: the one in the index.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need --expose.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    expose: Annotated[
        bool, typer.Option("--expose", help="Let others reach it. There is no password.")
    ] = False,
    root: Root = None,
    source: Annotated[
        str | None,
        typer.Option(help="Where the images lie, if not in a folder: what extract was given."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The image encoder's new place, if its folder has moved.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The text encoder's new place, if its folder has moved.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Open a search page in the browser: words in any language, an image, or “like this”. Ctrl-C
    ends it.

    Nothing is loaded from elsewhere, and the page has no scripts.

    Example: apecache serve index --run run
    """
    with ending():
        from apecache.report.serve import ServeSpec, is_loopback
        from apecache.report.serve import serve as start

        image_encoder, text_encoder = moved_encoders(index, image, text)
        spec = ServeSpec(
            index,
            run=run,
            media=media_of(root, source),
            host=host,
            port=port,
            expose=expose,
            image=image_encoder,
            text=text_encoder,
            device=device,
        )
        if expose and not is_loopback(host):
            warn(
                f"everybody who reaches {host} can search this index and see its images; "
                "there is no password"
            )

        def ready(url: str) -> None:
            if json:
                show_json({"url": url})
            else:
                typer.echo(f"{url}    (Ctrl-C ends it)")

        start(spec, ready)
