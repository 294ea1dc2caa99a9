"""The search page without the web: what was asked, what is found, and how it is shown. No script,
no file names."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from PIL import Image

from apecache.data.images import decode_image, load_image
from apecache.data.media import Media, NoMedia
from apecache.errors import ApecacheError, DataError, OptionError, RowError
from apecache.report.gallery import small_jpeg, thumbnail
from apecache.report.page import environment
from apecache.search.query import Hit, Query, SearchIndex, Target

USUAL = 24
MOST = 200
"""Results unless it is said, and at most."""
LONGEST = 2000
"""Characters of words."""
SIDE = 320
"""Pixels of a picture's longer side."""
DECODERS = 2
"""Pictures that are decoded at once; each may take 150 MB."""
TERMS = 8
"""Images of the index in one query."""


class PageError(Exception):
    """Cannot be answered: an HTTP status, and a sentence for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`words`, `without`: what results are like, and unlike; `like`: rows of images of the index;
    `picture`: one that was sent. `k` None: as many as are usual, or there are. `target` empty:
    captions for pictures alone, images for words."""

    words: str = ""
    without: str = ""
    like: tuple[int, ...] = ()
    k: int | None = None
    target: str = ""
    picture: Image.Image | None = field(default=None, repr=False)

    @property
    def empty(self) -> bool:
        return not (self.words.strip() or self.like or self.picture)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result, with the row of its image in the index."""

    hit: Hit
    row: int


def parse(fields: Mapping[str, Sequence[str]], picture: bytes = b"") -> Asked:
    """What a request asks for. Raises PageError for what makes no sense."""

    def one(name: str) -> str:
        return (fields.get(name) or [""])[-1]

    words = one("q")
    without = one("not")
    target = one("target")
    if max(len(words), len(without)) > LONGEST:
        raise PageError(400, f"The words are too long: {LONGEST:,} characters at most.")
    if target not in ("", "images", "captions"):
        raise PageError(400, "What to find is either images or captions.")
    likes = list(
        dict.fromkeys(_number(text, "An image's number", 0) for text in fields.get("like", ()))
    )
    if len(likes) > TERMS:
        raise PageError(400, f"At most {TERMS} images of the index in one query.")
    k = _number(one("k"), "The number of results", 1) if one("k") else None
    return Asked(
        words=words,
        without=without,
        like=tuple(likes),
        k=k,
        target=target,
        picture=_decoded(picture) if picture else None,
    )


def _number(text: str, what: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise PageError(400, f"{what} is a whole number from {least} on.")
    return int(text)


def _decoded(data: bytes) -> Image.Image:
    try:
        return decode_image(data, "the image that was sent")
    except RowError as error:
        raise PageError(422, f"The image cannot be read: {error.detail}.") from None


class SearchPage:
    """Encoders are loaded once; one query at a time uses them. Pictures are read by row of the
    index, never by a name that a request gives, and are encoded anew."""

    def __init__(self, index: SearchIndex, media: Media) -> None:
        self.index = index
        self.media = media
        self.rows = index.image_rows
        self.lock = threading.Lock()
        self.decoding = threading.BoundedSemaphore(DECODERS)
        self.jpeg = lru_cache(maxsize=512)(self._jpeg)
        about: dict[str, Any] = index.description
        self.counts = {"images": len(self.rows), "captions": int(about.get("n_texts", 0))}

    def warm(self) -> None:
        """Load both encoders now. Raises what opening them raises."""
        with self.lock:
            self.index.embed(
                Query(("words",), images=(Image.new("RGB", (64, 64), "white"),), files=False)
            )

    def find(self, asked: Asked) -> list[Found]:
        """Raises PageError."""
        if asked.empty:
            raise PageError(
                400,
                "The query is empty: type words, choose an image, or take “like this” of a result.",
            )
        query = self._query(asked)
        target: Target = (
            "captions" if (asked.target or self.index.target_of(query)) == "captions" else "images"
        )
        if not self.counts[target]:
            raise PageError(400, f"The index holds no {target}.")
        most = min(self.counts[target], MOST)
        k = asked.k or min(USUAL, most)
        if k > most:
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
        return [Found(hit=hit, row=self.index.row_of_key[hit.key]) for hit in hits]

    def _query(self, asked: Asked) -> Query:
        keys = tuple(self.key(row) for row in asked.like)
        images = () if asked.picture is None else (asked.picture,)
        words, without = (
            tuple(text for text in (side,) if text.strip()) for side in (asked.words, asked.without)
        )
        return Query(words, unlike=without, keys=keys, images=images, files=False)

    def key(self, row: int) -> str:
        if row >= len(self.rows):
            raise PageError(
                404,
                f"The index has no image number {row}: it has {len(self.rows):,} images.",
            )
        return self.rows[row]["key"]

    def _jpeg(self, row: int) -> bytes:
        """Raises PageError where the image is gone or cannot be read."""
        key = self.key(row)
        try:
            with self.decoding:
                return small_jpeg(load_image(key, self.media).image, SIDE)
        except RowError as error:
            raise PageError(404, f"The picture cannot be read: {error.reason}.") from None

    def render(self, asked: Asked, found: Sequence[Found] | None = None, problem: str = "") -> str:
        """The whole page. `found` None: nothing was asked yet."""
        about = {
            "asked": asked,
            "found": found,
            "problem": problem,
            "counts": self.counts,
            "most": MOST,
        }
        k = asked.k or min(USUAL, *(count for count in self.counts.values() if count))
        likes = [(row, self.rows[row]) for row in asked.like if row < len(self.rows)]
        sent = None if asked.picture is None else thumbnail(asked.picture)
        pictures = not isinstance(self.media, NoMedia)
        return (
            environment()
            .get_template("search.html")
            .render(**about, k=k, likes=likes, sent=sent, pictures=pictures)
        )

    def answer(self, asked: Asked) -> tuple[int, str]:
        """Status and page."""
        try:
            return 200, self.render(asked, self.find(asked))
        except PageError as error:
            return error.status, self.render(replace(asked, picture=None), None, error.message)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
