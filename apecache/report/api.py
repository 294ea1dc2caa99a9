"""Answer the JSON requests of `apecache serve`, without HTTP: check them, search and embed.

The limits are those of the search page. No request names a file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, ValidationError

from apecache.data.images import decode_image
from apecache.errors import ApecacheError, DataError, OptionError, RowError
from apecache.report.search_page import LONGEST, MOST, TERMS, USUAL, PageError, SearchPage
from apecache.search.query import Query
from apecache.settings import Settings

MOST_EMBEDDED = 64
"""Texts or images of one request to embed, at most."""
SEARCH_PATH = "/api/search"
EMBED_PATH = "/api/embed"
OPENAPI_PATH = "/api/openapi.json"


class ApiSearch(Settings):
    """Say what to find. One of text, keys and an uploaded image is needed."""

    text: str = Field(default="", max_length=LONGEST)
    """Words that results are like."""
    unlike: str = Field(default="", max_length=LONGEST)
    """Words that results are unlike."""
    keys: tuple[str, ...] = Field(default=(), max_length=TERMS)
    """Keys of images of the index that results are like."""
    k: int = Field(default=USUAL, ge=1, le=MOST)
    """Number of results; there may be fewer."""
    target: Literal["images", "captions"] | None = None
    """What is found; by default captions by an image alone, and images by words."""
    where: str | None = Field(default=None, max_length=LONGEST)
    """Conditions on the rows, such as `split=val and label=dog`."""
    min_score: float | None = None
    """Only results that score as high."""
    csls: bool = False
    """Whether to rank by CSLS."""


class ApiEmbed(Settings):
    """Name texts to embed; images are uploaded as files of the name `image`."""

    texts: tuple[str, ...] = Field(default=(), max_length=MOST_EMBEDDED)


class SearchApi:
    """Answer on the index of a search page, one request at a time."""

    def __init__(self, page: SearchPage) -> None:
        self.page = page

    def search(self, request: ApiSearch, picture: bytes = b"") -> dict[str, Any]:
        """Return the results of a query as JSON.

        Args:
            request: the query.
            picture: the bytes of an image that results are like; empty: none was sent.

        Raises:
            PageError: the query makes no sense, or the image cannot be read.
        """
        index = self.page.index
        images = (_decoded(picture),) if picture else ()
        query = Query(
            (request.text,) if request.text.strip() else (),
            unlike=(request.unlike,) if request.unlike.strip() else (),
            keys=request.keys,
            images=images,
        )
        # One query at a time: encoders and FAISS take all cores by themselves.
        with _answering(), self.page.lock:
            target = request.target or index.target_of(query)
            hits = index.find(
                query,
                k=request.k,
                target=target,
                csls=request.csls,
                where=request.where,
                min_score=request.min_score,
            )
            threshold = index.nothing_found(target)
        listed = [{**vars(hit), "row": index.row_of_key[hit.key]} for hit in hits]
        return {"target": target, "nothing_found": threshold, "hits": listed}

    def embed(self, request: ApiEmbed, pictures: Sequence[bytes] = ()) -> dict[str, Any]:
        """Return the embeddings of texts, then of pictures, as JSON.

        Raises:
            PageError: nothing to embed, too much of it, or an image that cannot be read.
        """
        n_inputs = len(request.texts) + len(pictures)
        if not 0 < n_inputs <= MOST_EMBEDDED:
            raise PageError(400, f"Give 1 to {MOST_EMBEDDED} texts or images; found {n_inputs}.")
        queries = [Query((text,)) for text in request.texts]
        queries += [Query(images=(_decoded(picture),)) for picture in pictures]
        with _answering(), self.page.lock:
            embedded = [self.page.index.embed(query)[0].tolist() for query in queries]
        return {"dim": len(embedded[0]), "embeddings": embedded}


@contextmanager
def _answering() -> Iterator[None]:
    """Turn errors of a search into those of a request."""
    try:
        yield
    except OptionError as error:
        raise PageError(400, str(error)) from None
    except DataError as error:
        raise PageError(422, str(error)) from None
    except ApecacheError as error:
        raise PageError(500, str(error)) from None


def parse_search(value: object) -> ApiSearch:
    """Check the JSON of a search. Raises PageError."""
    try:
        return ApiSearch.model_validate(value)
    except ValidationError as error:
        raise _refused(error) from None


def parse_embed(value: object) -> ApiEmbed:
    """Check the JSON of a request to embed. Raises PageError."""
    try:
        return ApiEmbed.model_validate(value)
    except ValidationError as error:
        raise _refused(error) from None


def openapi(version: str) -> dict[str, Any]:
    """Return the description of the interface, OpenAPI 3.1.

    Args:
        version: of apecache.
    """
    hit = {
        "type": "object",
        "properties": {
            "rank": {"type": "integer"},
            "key": {"type": "string"},
            "caption": {"type": "string"},
            "score": {"type": "number"},
            "row": {"type": "integer", "description": "`/image/ROW` is the picture."},
        },
    }
    search_answer = {
        "type": "object",
        "properties": {
            "target": {"type": "string"},
            "nothing_found": {"type": ["number", "null"]},
            "hits": {"type": "array", "items": hit},
        },
    }
    vector = {"type": "array", "items": {"type": "number"}}
    embed_answer = {
        "type": "object",
        "properties": {
            "dim": {"type": "integer"},
            "embeddings": {"type": "array", "items": vector},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "apecache", "version": version},
        "paths": {
            SEARCH_PATH: {"post": _operation("Search the index.", ApiSearch, search_answer)},
            EMBED_PATH: {"post": _operation("Embed texts and images.", ApiEmbed, embed_answer)},
        },
    }


def _operation(
    summary: str,
    request: type[Settings],
    response: dict[str, Any],
) -> dict[str, Any]:
    schema = request.model_json_schema()
    problem = {"type": "object", "properties": {"error": {"type": "string"}}}
    form = {
        "type": "object",
        "properties": {
            "json": {"type": "string", "description": "The fields of the JSON form, as a text."},
            "image": {"type": "string", "format": "binary"},
        },
    }
    refused = {
        status: {"description": why, "content": {"application/json": {"schema": problem}}}
        for status, why in (("400", "It makes no sense."), ("422", "It cannot be used."))
    }
    answer = {"description": "Done.", "content": {"application/json": {"schema": response}}}
    return {
        "summary": summary,
        "requestBody": {
            "content": {
                "application/json": {"schema": schema},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {"200": answer, **refused},
    }


def _refused(error: ValidationError) -> PageError:
    first = error.errors()[0]
    field_name = ".".join(map(str, first["loc"])) or "request"
    return PageError(400, f"{field_name}: {first['msg']}")


def _decoded(data: bytes) -> Any:
    try:
        return decode_image(data, "the image that was sent")
    except RowError as error:
        raise PageError(422, f"The image cannot be read: {error.detail}.") from None
