"""`apecache serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .option_groups import Device, ImagesFrom, Json, OptionGroup, Root, takes_groups
from .report import media_of
from .runs import MovedEncoders
from .terminal import ending, show_json, warn

NETWORK = "Network"


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """Hold where the server listens."""

    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on. Addresses other than this machine's own need --expose.",
            rich_help_panel=NETWORK,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="0 chooses a free port.")
    ] = 8080
    expose: Annotated[
        bool,
        typer.Option(
            "--expose",
            help="Allow other machines to connect. There is no password.",
            rich_help_panel=NETWORK,
        ),
    ] = False


@takes_groups
def serve(
    index: Annotated[Path, typer.Argument(help="An index folder.")],
    network: NetworkOptions,
    encoders: MovedEncoders,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Run that the index must have been built from. Default: no check.",
        ),
    ] = None,
    root: Root = None,
    source: ImagesFrom = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Serve a search page for an index. Stop it with Ctrl-C.

    Search by words, by an uploaded image, or by an image of the index. The page has no scripts and
    loads nothing from other sites.

    Example: apecache serve index --run run
    """
    with ending():
        from apecache.report.serve import ServeSpec, is_loopback
        from apecache.report.serve import serve as start

        image_encoder, text_encoder = encoders.recorded_in(index)
        spec = ServeSpec(
            index,
            run=run,
            media=media_of(root, source),
            host=network.host,
            port=network.port,
            expose=network.expose,
            image=image_encoder,
            text=text_encoder,
            device=device,
        )
        if network.expose and not is_loopback(network.host):
            warn(
                f"everyone who can connect to {network.host} can search this index and see its "
                "images; there is no password"
            )

        def ready(url: str) -> None:
            if json:
                show_json({"url": url})
            else:
                typer.echo(f"{url}    (stop with Ctrl-C)")

        start(spec, ready)
