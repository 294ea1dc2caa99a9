"""Serve the search page of an index on this machine, for `apecache serve`."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from apecache.arguments import AnyPath, as_path, require_spec
from apecache.data.media import Media
from apecache.data.recorded import recorded_media
from apecache.encoders.spec import EncoderSpec
from apecache.errors import MissingExtraError, OptionError
from apecache.report.search_page import SearchPage
from apecache.runs.load import load_run
from apecache.search.index import require_head
from apecache.search.query import SearchIndex


@dataclass(frozen=True)
class ServeSpec:
    """Choose an index and the address to serve it at."""

    index: AnyPath
    run: AnyPath | None = None
    """The index must be of this run's heads; None: it is not checked."""
    media: Media | None = None
    """Where pictures lie; None: where the index recorded them."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0: any free one."""
    expose: bool = False
    """Whether others may reach the page; a host other than this machine needs it."""
    image: EncoderSpec | None = None
    """The image encoder, if it has moved."""
    text: EncoderSpec | None = None
    """The text encoder, if it has moved."""
    device: str = "auto"


def serve(spec: ServeSpec, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until it is interrupted (Ctrl-C), which is a clean end.

    Args:
        ready: called with the address once the server listens.

    Raises:
        MissingExtraError: the web framework is not installed.
        OptionError: an address that others reach, without `expose`; or one that is not available.
        RunError: no index.
        MismatchError: an index of other heads than the run's, or an encoder that is not the one
            they were trained on.
    """
    require_spec(spec, ServeSpec, "spec")
    server, sockets, url = make_server(spec)
    ready(url)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(sockets[0]):
        server.run(sockets=sockets)


def make_server(spec: ServeSpec) -> tuple[Any, list[socket.socket], str]:
    """Return the server, its open socket, and the address for people.

    Errors are those of `serve`.
    """
    _require_extra()
    if not (spec.expose or is_loopback(spec.host)):
        raise OptionError(
            f"--host {spec.host} lets others reach this machine; add --expose if that is wanted"
        )
    # Before the encoders load, which takes a while: a port in use is an early error.
    bound = _bind(spec.host, spec.port)
    try:
        app = _app(spec)
    except BaseException:
        bound.close()
        raise
    import uvicorn

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=3,
        # Any visitor could send the headers of a proxy.
        proxy_headers=False,
    )
    port = bound.getsockname()[1]
    return uvicorn.Server(config), [bound], f"http://{_address(spec.host, port)}/"


def _address(host: str, port: int) -> str:
    """Return host and port as a URL has them: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _app(spec: ServeSpec) -> Any:
    from apecache.report.web import search_app

    folder = as_path(spec.index, "index")
    index = SearchIndex.open(folder, image=spec.image, text=spec.text, device=spec.device)
    if spec.run is not None:
        run = as_path(spec.run, "run")
        require_head(
            index.description,
            loaded=load_run(run, device="cpu", image=spec.image, text=spec.text),
            out=folder,
            run=run,
        )
    # An index of an earlier version has recorded only the folder of the images.
    former = {"root": index.description.get("place", "")}
    media = spec.media or recorded_media(index.description.get("source", former))
    page = SearchPage(index, media)
    page.warm()
    return search_app(page, [spec.host], spec.expose)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it the port of a server that has just ended stays taken for a minute.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # so that whoever is told the address finds it open
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise OptionError(
            f"{_address(host, port)} cannot be had ({why}); choose another --port or --host"
        ) from None
    return bound


def _require_extra() -> None:
    for module in ("starlette", "uvicorn", "python_multipart"):
        if find_spec(module) is None:
            raise MissingExtraError(module, "serve")
