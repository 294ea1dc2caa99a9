"""`apecache serve`: the search page of an index, on this machine."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from apecache.arguments import AnyPath, as_path, require_type
from apecache.data.media import Media, media_at
from apecache.encoders.spec import EncoderSpec
from apecache.errors import MissingExtraError, OptionError
from apecache.report.search_page import SearchPage
from apecache.runs.load import load_run
from apecache.search.index import require_head
from apecache.search.query import SearchIndex


@dataclass(frozen=True)
class ServeSpec:
    """`run`: the index must be of its heads. `media`: where pictures lie; None: where the index
    remembers them. `expose`: others may reach it, which an address other than this machine's own
    needs. `port` 0: any that is free. `image`, `text`: encoders that have moved."""

    index: AnyPath
    run: AnyPath | None = None
    media: Media | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    expose: bool = False
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"


def serve(spec: ServeSpec, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serve until it is interrupted (Ctrl-C), which is a clean end. `ready` is told the address.

    Raises:
        MissingExtraError: the web framework is not installed. OptionError: an address that is not
            this machine's own
        without `expose`, or one that cannot be had. RunError: no index. MismatchError: an index of
            other heads than the
        run's, or an encoder that is not the one they were trained on.
    """
    require_type(spec, ServeSpec, "spec")
    server, sockets, url = make_server(spec)
    ready(url)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(sockets[0]):
        server.run(sockets=sockets)


def make_server(spec: ServeSpec) -> tuple[Any, list[socket.socket], str]:
    """The server, its open socket, and the address for people. Raises as `serve` does."""
    _require_extra()
    if not (spec.expose or is_loopback(spec.host)):
        raise OptionError(
            f"--host {spec.host} lets others reach this machine; add --expose if that is wanted"
        )
    bound = _bind(spec.host, spec.port)
    try:
        app = _app(spec)
    except BaseException:
        bound.close()
        raise
    import uvicorn

    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    limits: dict[str, Any] = {
        "limit_concurrency": 64,
        "timeout_graceful_shutdown": 3,
        "proxy_headers": False,
    }
    config = uvicorn.Config(app, lifespan="off", ws="none", **quiet, **limits)
    name = f"[{spec.host}]" if ":" in spec.host else spec.host
    return uvicorn.Server(config), [bound], f"http://{name}:{bound.getsockname()[1]}/"


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
    page = SearchPage(index, spec.media or media_at(str(index.description.get("place", ""))))
    page.warm()
    return search_app(page, [spec.host], spec.expose)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # so that whoever is told the address finds it open
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise OptionError(
            f"{host}:{port} cannot be had ({why}); choose another --port or --host"
        ) from None
    return bound


def _require_extra() -> None:
    for module in ("starlette", "uvicorn", "python_multipart"):
        if find_spec(module) is None:
            raise MissingExtraError(module, "serve")
