"""Serve the search page over HTTP. This is the only module that imports Starlette.

Every answer forbids scripts, foreign contents, framing and guessing of types. A request must name a
host of this server: a page of another site whose name suddenly leads to this machine (DNS
rebinding) is refused.
"""

import ipaddress
import json
from collections.abc import Iterable
from importlib.metadata import version
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apecache.report.api import (
    EMBED_PATH,
    MOST_EMBEDDED,
    OPENAPI_PATH,
    SEARCH_PATH,
    SearchApi,
    openapi,
    parse_embed,
    parse_search,
)
from apecache.report.page import environment
from apecache.report.search_page import PageError, SearchPage, SearchRequest, parse

MOST_BYTES = 32 * 2**20
"""Of a request at most: an image and a few fields."""
FIELDS = 32
"""Of a form, at most."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def search_app(page: SearchPage, names: Iterable[str] = (), remote: bool = False) -> ASGIApp:
    """Return the application.

    Args:
        page: answers the queries.
        names: hosts by which the server may be called, beside addresses of this machine.
        remote: whether it may be called by any address, as others reach it.
    """

    async def home(request: Request) -> Response:
        fields = {name: request.query_params.getlist(name) for name in request.query_params}
        if not fields:
            return HTMLResponse(page.render(SearchRequest()))
        return await _answered(page, fields, b"")

    async def search(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=FIELDS) as form:
            sent = form.get("image")
            picture = await sent.read() if isinstance(sent, UploadFile) else b""
            fields: dict[str, list[str]] = {}
            for name in form:
                fields[name] = [text for text in form.getlist(name) if isinstance(text, str)]
        if not picture:
            # Redirected, so that the query has an address that can be kept and gone back to.
            return RedirectResponse(f"/?{urlencode(_filled(fields))}", 303)
        return await _answered(page, fields, picture)

    async def picture(request: Request) -> Response:
        data = await run_in_threadpool(page.jpeg, request.path_params["row"])
        return Response(data, media_type="image/jpeg")

    async def style(_: Request) -> Response:
        return Response(stylesheet(), media_type="text/css")

    def failed(request: Request, error: Exception) -> Response:
        status = 500
        message = "Something went wrong here; the terminal of apecache serve says what."
        if isinstance(error, PageError):
            status = error.status
            message = error.message
        elif isinstance(error, HTTPException):
            status = error.status_code
            message = f"{error.detail}."
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": message}, status)
        return HTMLResponse(page.render(SearchRequest(), None, message), status)

    routes = [
        Route("/", home, methods=["GET"]),
        Route("/search", search, methods=["POST"], max_body_size=MOST_BYTES),
        Route("/image/{row:int}", picture, methods=["GET"]),
        Route("/style.css", style, methods=["GET"]),
        *api_routes(SearchApi(page)),
    ]
    handlers = {PageError: failed, HTTPException: failed, Exception: failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), names, remote)


def api_routes(api: SearchApi) -> list[Route]:
    """Return the routes of the JSON interface."""

    async def search(request: Request) -> Response:
        value, pictures = await _sent(request)
        if len(pictures) > 1:
            raise PageError(400, "Send one image at most.")
        picture = pictures[0] if pictures else b""
        query = parse_search(value)
        return JSONResponse(await run_in_threadpool(lambda: api.search(query, picture)))

    async def embed(request: Request) -> Response:
        value, pictures = await _sent(request)
        embed_request = parse_embed(value)
        return JSONResponse(await run_in_threadpool(lambda: api.embed(embed_request, pictures)))

    async def described(_: Request) -> Response:
        return JSONResponse(openapi(version("apecache")))

    return [
        Route(SEARCH_PATH, search, methods=["POST"], max_body_size=MOST_BYTES),
        Route(EMBED_PATH, embed, methods=["POST"], max_body_size=MOST_BYTES),
        Route(OPENAPI_PATH, described, methods=["GET"]),
    ]


async def _sent(request: Request) -> tuple[object, list[bytes]]:
    """Return the JSON and the images of a request, which is JSON or a form with a field `json`.

    Raises:
        PageError: not JSON.
    """
    pictures: list[bytes] = []
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=MOST_EMBEDDED, max_fields=FIELDS) as form:
            text = form.get("json")
            for sent in form.getlist("image"):
                if isinstance(sent, UploadFile):
                    pictures.append(await sent.read())
        raw: str | bytes = text if isinstance(text, str) else "{}"
    else:
        raw = await request.body()
    try:
        return json.loads(raw), pictures
    except (ValueError, RecursionError):
        raise PageError(400, "The request is not JSON.") from None


async def _answered(page: SearchPage, fields: dict[str, list[str]], picture: bytes) -> Response:
    # In a thread: encoders would block every other request meanwhile.
    status, text = await run_in_threadpool(lambda: page.answer(parse(fields, picture)))
    return HTMLResponse(text, status)


def _filled(fields: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return the fields that are not empty."""
    filled = []
    for name, values in fields.items():
        for value in values:
            # Empty words stay: without any field the address would be that of the first page.
            if value or name == "q":
                filled.append((name, value))
    return filled


def stylesheet() -> str:
    """Return the style sheet of the search page."""
    return environment().get_template("search.css").render()


class Guard:
    """Refuse foreign and large requests before the application sees them, and add the headers."""

    def __init__(self, app: ASGIApp, names: Iterable[str], remote: bool) -> None:
        self.app = app
        self.remote = remote
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = self._problem(scope["method"], Headers(scope=scope))
        if problem is None:
            await self.app(scope, receive, with_headers)
            return
        status, message = problem
        if status == 413:
            await _drain(receive)
        response = Response(message, status, {"Connection": "close"}, "text/plain")
        await response(scope, receive, with_headers)

    def _problem(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the message for a request that is refused, None for others."""
        hosts = headers.getlist("host")
        # RFC 9112, section 3.2: 400 for HTTP/1.1 without exactly one Host. HTTP/1.0 may leave it
        # out, but then the request does not say that it is for this server.
        if len(hosts) != 1:
            return 400, "A request needs exactly one Host header, with the address of this server."
        host = hosts[0]
        if not self.allows(host):
            message = (
                "This address does not belong to this server; use the one that apecache serve "
                "has printed."
            )
            return 421, message
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and origin != f"http://{host}":
            return 403, "The form was sent from another site."
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > MOST_BYTES:
            return 413, f"The image is too large: {MOST_BYTES // 2**20} MB at most."
        return None

    def allows(self, host: str) -> bool:
        """Tell whether a Host header names this server.

        Allowed are the server's names, addresses of this machine, and any address if others may
        reach the server.
        """
        # An IPv6 address stands in brackets, as it has colons itself; a port may follow.
        if host.startswith("["):
            name = host.rpartition("]")[0].lstrip("[")
        else:
            name = host.partition(":")[0]
        if name.lower() in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.remote or address.is_loopback


async def _drain(receive: Receive) -> None:
    """Read and drop the rest of a request, within bounds."""
    # A browser that cannot finish sending shows no answer.
    n_bytes = 0
    while n_bytes < 4 * MOST_BYTES:
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return
