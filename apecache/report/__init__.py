"""Write self-contained HTML pages that show the result of a training or an evaluation."""

from apecache.report.gallery import Gallery, QueryExample, Result, thumbnail
from apecache.report.page import Chart, Curve, Page, Table, render_page, write_page

__all__ = [
    "Chart",
    "Curve",
    "Gallery",
    "QueryExample",
    "Page",
    "Result",
    "Table",
    "render_page",
    "thumbnail",
    "write_page",
]
