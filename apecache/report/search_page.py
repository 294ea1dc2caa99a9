"""Answer queries of the search page, without HTTP: read them, search, and render the results.

The page has no script, and no request names a file.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from PIL import Image

from apecache.data.images import decode_image, load_image
from apecache.data.media import Media, NoMedia
from apecache.errors import ApecacheError, DataError, OptionError, RowError, counted
from apecache.report.gallery import small_jpeg, thumbnail
from apecache.report.page import environment
from apecache.search.query import Hit, Query, SearchIndex, Target

USUAL = 24
"""Results if a query gives no number."""
MOST = 200
"""Results at most."""
LONGEST = 2000
"""Characters of words, at most."""
SIDE = 320
"""Pixels of a picture's longer side."""
DECODERS = 2
"""Pictures that are decoded at once; each may take 150 MB."""
TERMS = 8
"""Images of the index in one query, at most."""


class PageError(Exception):
    """Report a request that cannot be answered, by an HTTP status and a sentence for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Hold what a request asks for."""

    words: str = ""
    """What results are like."""
    without: str = ""
    """What results are unlike."""
    like: tuple[int, ...] = ()
    """Rows of images of the index that results are like."""
    k: int | None = None
    """Number of results; None: the usual number, or all if there are fewer."""
    target: str = ""
    """`images` or `captions`; empty: captions for pictures alone, images for words."""
    picture: Image.Image | None = field(default=None, repr=False)
    """An image that was sent, which results are like."""

    @property
    def empty(self) -> bool:
        """Tell whether there is nothing to search for."""
        return not (self.words.strip() or self.like or self.picture)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hold one result, with the row of its image in the index."""

    hit: Hit
    row: int


def parse(fields: Mapping[str, Sequence[str]], picture: bytes = b"") -> SearchRequest:
    """Read what a request asks for.

    Args:
        fields: of the form or the address; each may be given several times.
        picture: the bytes of an image that was sent; empty: none was.

    Raises:
        PageError: the request makes no sense, or the image cannot be read.
    """

    def last_value(name: str) -> str:
        return (fields.get(name) or [""])[-1]

    words = last_value("q")
    without = last_value("not")
    target = last_value("target")
    if max(len(words), len(without)) > LONGEST:
        raise PageError(400, f"The words are too long: {LONGEST:,} characters at most.")
    if target not in ("", "images", "captions"):
        raise PageError(400, "What to find is either images or captions.")
    like_rows = [_number(text, "An image's number", 0) for text in fields.get("like", ())]
    # Each row once, in the order in which they were given.
    likes = list(dict.fromkeys(like_rows))
    if len(likes) > TERMS:
        raise PageError(400, f"At most {TERMS} images of the index in one query.")
    k_text = last_value("k")
    k = _number(k_text, "The number of results", 1) if k_text else None
    return SearchRequest(
        words=words,
        without=without,
        like=tuple(likes),
        k=k,
        target=target,
        picture=_decoded(picture) if picture else None,
    )


def _number(text: str, label: str, minimum: int) -> int:
    # Limited to nine digits before it is converted: int() of a very long text fails, and is slow.
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not (is_number and int(text) >= minimum):
        raise PageError(400, f"{label} is a whole number from {minimum} on.")
    return int(text)


def _decoded(data: bytes) -> Image.Image:
    try:
        return decode_image(data, "the image that was sent")
    except RowError as error:
        raise PageError(422, f"The image cannot be read: {error.detail}.") from None


class SearchPage:
    """Answer queries on one index.

    Encoders are loaded once; one query at a time uses them. A request names pictures by their row
    in the index, never by a file's name, and they are encoded anew.
    """

    def __init__(self, index: SearchIndex, media: Media) -> None:
        self.index = index
        self.media = media
        self.rows = index.image_rows
        self.lock = threading.Lock()
        self.decoding = threading.BoundedSemaphore(DECODERS)
        # A cache of this page alone: one of the class would keep pages alive.
        self.jpeg = lru_cache(maxsize=512)(self._jpeg)
        n_captions = int(index.description.get("n_texts", 0))
        self.counts = {"images": len(self.rows), "captions": n_captions}

    def warm(self) -> None:
        """Load both encoders now, so that the first query does not wait for them.

        Errors are those of opening the encoders.
        """
        blank = Image.new("RGB", (64, 64), "white")
        query = Query(("words",), images=(blank,), files=False)
        with self.lock:
            self.index.embed(query)

    def find(self, request: SearchRequest) -> list[SearchResult]:
        """Search for what is asked.

        Raises:
            PageError: the query makes no sense, or the search failed.
        """
        if request.empty:
            raise PageError(
                400,
                "The query is empty: type words, choose an image, or take “like this” of a result.",
            )
        query = self._query(request)
        target_name = request.target or self.index.target_of(query)
        target: Target = "captions" if target_name == "captions" else "images"
        if not self.counts[target]:
            raise PageError(400, f"The index holds no {target}.")
        limit = min(self.counts[target], MOST)
        k = request.k or min(USUAL, limit)
        if k > limit:
            held = f"the index has {self.counts[target]:,} {target}"
            raise PageError(
                400,
                f"{k:,} results are too many: {held}, and a page shows {MOST} at most.",
            )
        try:
            with self.lock:
                hits = self.index.find(query, k, target)
        except OptionError as error:
            raise PageError(400, _sentence(error)) from None
        except DataError as error:
            raise PageError(422, _sentence(error)) from None
        except ApecacheError as error:
            raise PageError(500, _sentence(error)) from None
        return [SearchResult(hit=hit, row=self.index.row_of_key[hit.key]) for hit in hits]

    def _query(self, request: SearchRequest) -> Query:
        keys = tuple(self.key(row) for row in request.like)
        images = () if request.picture is None else (request.picture,)
        words = (request.words,) if request.words.strip() else ()
        without = (request.without,) if request.without.strip() else ()
        # Without files: a word that is also the path of an image stays a word.
        return Query(words, unlike=without, keys=keys, images=images, files=False)

    def key(self, row: int) -> str:
        """Return the key of an image of the index.

        Raises:
            PageError: there is no such row.
        """
        if row >= len(self.rows):
            raise PageError(
                404,
                f"The index has no image number {row}: it has {counted(len(self.rows), 'image')}.",
            )
        return self.rows[row]["key"]

    def _jpeg(self, row: int) -> bytes:
        """Return a small picture of an image of the index.

        Raises:
            PageError: the image is gone or cannot be read.
        """
        key = self.key(row)
        try:
            with self.decoding:
                return small_jpeg(load_image(key, self.media).image, SIDE)
        except RowError as error:
            raise PageError(404, f"The picture cannot be read: {error.reason}.") from None

    def render(
        self,
        asked: SearchRequest,
        found: Sequence[SearchResult] | None = None,
        problem: str = "",
    ) -> str:
        """Return the whole page.

        Args:
            found: None: nothing was asked yet, or the query failed.
            problem: what went wrong, for people.
        """
        k = asked.k or min(USUAL, *(count for count in self.counts.values() if count))
        # A row that does not exist is the problem that this page may have to report.
        likes = [(row, self.rows[row]) for row in asked.like if row < len(self.rows)]
        template = environment().get_template("search.html")
        return template.render(
            asked=asked,
            found=found,
            problem=problem,
            counts=self.counts,
            most=MOST,
            k=k,
            likes=likes,
            sent=None if asked.picture is None else thumbnail(asked.picture),
            pictures=not isinstance(self.media, NoMedia),
        )

    def answer(self, request: SearchRequest) -> tuple[int, str]:
        """Search, and return the HTTP status and the page."""
        try:
            return 200, self.render(request, self.find(request))
        except PageError as error:
            # Without the picture, which may be what cannot be used.
            return error.status, self.render(replace(request, picture=None), None, error.message)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
