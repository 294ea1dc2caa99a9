"""Make the page of `apecache curate`: findings as tables, and the likeliest with their pictures."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from apecache.arguments import AnyPath, as_path, require_type
from apecache.auto.curate import CurateReport, NearCopy, WrongCaption
from apecache.errors import RowError, counted
from apecache.report.gallery import Gallery, QueryExample, Result, thumbnail
from apecache.report.page import Page, Table, write_page

MAX_PICTURES = 24
"""Findings of a kind that are shown with pictures."""
MAX_ROWS = 50
"""Findings of a kind that are listed."""
PictureOf = Callable[[str], Image.Image]
"""Open the image of a key. Raises RowError for one that cannot be read."""


def write_curate_page(
    report: CurateReport,
    path: AnyPath,
    open_image: PictureOf | None = None,
    commands: tuple[str, ...] = (),
) -> Path:
    """Write the page of a report.

    Args:
        report: Findings.
        path: File to write.
        open_image: Opens the image of a key; None: the page has no pictures.
        commands: Command lines to show.
    """
    require_type(report, CurateReport, "report")
    page = Page(
        title="Pairs that need a look",
        subtitle=(
            f"{counted(report.n_images, 'training image')}, {counted(report.n_captions, 'caption')}"
        ),
        commands=commands,
        tables=_tables(report),
        galleries=_galleries(report, open_image),
        notes=(
            "A caption is scored by heads that were fitted without its image. Its probability is "
            "an estimate: rare subjects and unusual words look wrong to heads that never saw them. "
            "Look before you delete.",
        ),
    )
    return write_page(page, as_path(path, "path"))


def _tables(report: CurateReport) -> tuple[Table, ...]:
    summary = Table(
        title="Summary",
        columns=("finding", "value"),
        rows=(
            ("captions that find their image first within a fold, %", report.found),
            ("estimated share of wrong captions, %", 100 * report.share_wrong),
            ("captions left out of the keep list", report.n_dropped),
            ("images whose captions are all likely wrong", len(report.undescribed)),
            ("near copies of images across splits", len(report.near_images)),
            ("near copies of captions across splits", len(report.near_captions)),
        ),
    )
    groups = Table(
        title="Groups of similar images, least found first",
        columns=("training images", "other images", "found first, %", "typical images"),
        rows=tuple(
            (group.n_train, group.n_other, group.found, ", ".join(group.examples[:2]))
            for group in report.groups
        ),
        note="A group with many other images and few training images is a gap.",
    )
    tables = [summary, groups]
    for title, copies in (
        ("Near copies of images in two splits", report.near_images),
        ("Near copies of captions in two splits", report.near_captions),
    ):
        if copies:
            tables.append(_copies_table(title, copies))
    return tuple(tables)


def _copies_table(title: str, copies: tuple[NearCopy, ...]) -> Table:
    return Table(
        title=title,
        columns=("cosine", "split", "item", "split", "item"),
        rows=tuple(
            (copy.similarity, copy.first_split, copy.first, copy.second_split, copy.second)
            for copy in copies[:MAX_ROWS]
        ),
        note="Results on a split are too good where it repeats what was trained on.",
        decimals=3,
    )


def _galleries(report: CurateReport, open_image: PictureOf | None) -> tuple[Gallery, ...]:
    # A page of many pictures would be too large to open: the JSON has all findings.
    captions = report.wrong_captions[:MAX_PICTURES]
    undescribed = report.undescribed[:MAX_PICTURES]
    galleries: list[Gallery] = []
    if captions:
        gallery = Gallery(
            title="Captions that are likely wrong",
            note="Each with its own image, and with the image that is closest to it.",
            items=tuple(_wrong_example(caption, open_image) for caption in captions),
        )
        galleries.append(gallery)
    if undescribed:
        examples: list[QueryExample] = []
        for image in undescribed:
            example = QueryExample(
                query_text=f"{image.key}: {' / '.join(image.captions)}",
                query_image=_picture(image.key, open_image),
                results=(),
                rank=None,
            )
            examples.append(example)
        gallery = Gallery(
            title="Images that no caption describes",
            note="Every caption of these images is likely wrong.",
            items=tuple(examples),
        )
        galleries.append(gallery)
    return tuple(galleries)


def _wrong_example(caption: WrongCaption, open_image: PictureOf | None) -> QueryExample:
    nearest = Result(
        image=_picture(caption.nearest_key, open_image),
        text=f"closest: {caption.nearest_key}",
        score=caption.probability,
        correct=caption.nearest_key == caption.key,
    )
    return QueryExample(
        query_text=f"{caption.key}: {caption.caption}",
        query_image=_picture(caption.key, open_image),
        results=(nearest,),
        rank=None,
    )


def _picture(key: str, open_image: PictureOf | None) -> str | None:
    """Return a small picture; None where the page has none, or the image cannot be read."""
    if open_image is None:
        return None
    try:
        return thumbnail(open_image(key))
    except RowError:
        return None
