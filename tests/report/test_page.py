"""What a rendered page promises: inert texts, nothing loaded, readable numbers and charts, whole
files."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from pages import HOSTILE, PICTURE, page_of, shown

from apecache.report import Chart, Curve, Page, Table, render_page, write_page
from apecache.report.page import ticks


def chart_page(*curves, marker=None, **changes):
    fields = {"title": "Loss", "x_label": "epoch", "y_label": "loss"} | changes
    return Page(title="Title", charts=(Chart(curves=curves, marker=marker, **fields),))


def ordinary_page():
    return page_of("ordinary")


class TestTexts:
    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_texts_stay_inert(self, parse, text):
        document = parse(page_of(text))
        harmless = parse(ordinary_page())
        assert [e.tag for e in document.elements] == [e.tag for e in harmless.elements]
        assert not document.all("script")
        for element, expected in zip(document.elements, harmless.elements, strict=True):
            assert list(element.attributes) == list(expected.attributes)
            assert not any(name.startswith("on") for name in element.attributes)

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_texts_are_shown_verbatim(self, parse, text):
        document = parse(page_of(text))
        expected = shown(text)
        for tag, css_class, count in [
            ("title", None, 2),
            ("h1", None, 1),
            ("h2", "long", 3),
            ("p", "subtitle", 1),
            ("code", None, 2),
            ("thead", None, 1),
            ("tbody", None, 1),
            ("p", "note", 2),
            ("ul", "legend", 1),
            ("bdi", None, 1),
            ("p", "axis", 2),
            ("div", "query", 2),
            ("ol", None, 2),
            ("footer", None, 1),
        ]:
            elements = document.all(tag, css_class)
            assert len(elements) == count
            assert all(expected in element.text for element in elements)

    @pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_texts_can_be_written(self, tmp_path, text):
        written = write_page(page_of(text), tmp_path / "report.html").read_bytes().decode("utf-8")
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", written)

    def test_surrogates_become_replacement_characters(self, parse):
        assert parse(Page(title="a\ud800b")).all("h1")[0].text == "a\ufffdb"

    def test_directions_are_isolated(self, parse):
        document = parse(page_of("\u202eevil"))
        assert document.all("h1")[0].attributes["dir"] == "auto"
        for element in document.all("p", "long") + document.all("div", "long"):
            assert element.attributes["dir"] == "auto"


class TestDocument:
    def test_policy_forbids_everything_but_inline_styles_and_images(self, parse):
        policies = [m for m in parse(ordinary_page()).all("meta") if "http-equiv" in m.attributes]
        assert [policy.attributes["http-equiv"] for policy in policies] == [
            "Content-Security-Policy"
        ]
        assert (
            policies[0].attributes["content"]
            == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        )

    def test_policy_comes_before_anything_it_governs(self, parse):
        tags = [element.tag for element in parse(ordinary_page()).elements]
        assert tags[:4] == ["html", "head", "meta", "meta"]

    def test_nothing_is_loaded(self, parse):
        document = parse(ordinary_page())
        loading = {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "a",
            "form",
            "audio",
            "video",
            "use",
            "image",
        }
        assert not loading & {element.tag for element in document.elements}
        for element in document.elements:
            for name, value in element.attributes.items():
                assert name not in {"href", "srcset", "data", "action", "xlink:href", "background"}
                assert name != "src" or value.startswith("data:image/jpeg;base64,")
        without_images = document.source.replace(PICTURE, "")
        for reference in ("http:", "https:", "//", "url(", "@import", "javascript:"):
            assert reference not in without_images

    def test_head_states_language_charset_and_viewport(self, parse):
        document = parse(ordinary_page())
        assert document.source.startswith("<!DOCTYPE html>")
        assert document.all("html")[0].attributes["lang"] == "en"
        metas = [element.attributes for element in document.all("meta")]
        assert {"charset": "utf-8"} in metas
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas

    def test_styles_cover_dark_print_and_narrow_windows(self, parse):
        style = parse(ordinary_page()).all("style")[0].text
        for query in ("(prefers-color-scheme: dark)", "@media print", "(max-width:"):
            assert query in style

    def test_a_bare_page_has_no_empty_parts(self, parse):
        document = parse(Page(title="Title"))
        for tag in ("table", "svg", "section", "footer", "pre", "p"):
            assert not document.all(tag)

    def test_the_templates_are_found_from_any_folder(self, tmp_path):
        code = "from apecache.report import Page, render_page; render_page(Page(title='x'))"
        path = os.pathsep.join(sys.path)
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"PYTHONPATH": path},
        )


def cells(document, tag="tbody"):
    return [child for row in document.all(tag)[0].children for child in row.children]


class TestTable:
    def table(self, parse, *rows, **options):
        columns = tuple(f"c{i}" for i in range(len(rows[0])))
        return parse(
            Page(
                title="Title",
                tables=(Table(title="Recall", columns=columns, rows=rows, **options),),
            )
        )

    @pytest.mark.parametrize(
        ("value", "decimals", "text"),
        [
            (73.26, 1, "73.3"),
            (73.0, 1, "73.0"),
            (0.12345, 3, "0.123"),
            (12.6, 0, "13"),
            (-0.04, 1, "0.0"),
            (1000000, 1, "1,000,000"),
            (7, 3, "7"),
            (None, 1, "\u2013"),
            (math.nan, 1, "nan"),
            (-math.inf, 1, "-inf"),
            (1.5e300, 1, "1.5e+300"),
            (np.float64(2.25), 2, "2.25"),
            (np.float32(0.5), 2, "0.50"),
        ],
    )
    def test_cells(self, parse, value, decimals, text):
        assert cells(self.table(parse, (value,), decimals=decimals))[0].text == text

    def test_numbers_and_their_headings_are_right_aligned(self, parse):
        document = self.table(parse, ("a", 1.5, None, "x"), ("b", 2, 3, 4))
        assert ["number" in cell.classes for cell in cells(document)] == [
            *(False, True, True, False),
            *(False, True, True, True),
        ]
        assert ["number" in cell.classes for cell in cells(document, "thead")] == [
            False,
            True,
            True,
            False,
        ]
        assert re.search(r"\.number \{ text-align: right", document.source)

    def test_first_text_column_heads_its_row(self, parse):
        assert [cell.tag for cell in cells(self.table(parse, ("a", 1), (2, "b")))] == [
            "th",
            "td",
            "td",
            "td",
        ]

    def test_wide_tables_scroll_in_a_box_reachable_by_keyboard(self, parse):
        document = self.table(parse, ("a",) * 40)
        box = document.all("div", "scroll")[0]
        assert box.children[0].tag == "table"
        assert box.attributes["tabindex"] == "0"
        labels = [
            e
            for e in document.elements
            if e.attributes.get("id") == box.attributes["aria-labelledby"]
        ]
        assert [label.text for label in labels] == ["Recall"]

    def test_a_table_without_rows_is_drawn(self, parse):
        document = parse(
            Page(title="Title", tables=(Table(title="Recall", columns=("a", "b"), rows=()),))
        )
        assert [cell.text for cell in cells(document, "thead")] == ["a", "b"]

    def test_rows_must_fit_the_columns(self):
        with pytest.raises(ValueError, match="row 2 has 1 cells for 2 columns"):
            Table(title="Recall", columns=("a", "b"), rows=(("x", 1), ("y",)))

    def test_decimals_must_not_be_negative(self):
        with pytest.raises(ValueError, match="decimals"):
            Table(title="Recall", columns=(), rows=(), decimals=-1)


class TestTicks:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
            (0, 10, (0, 2, 4, 6, 8, 10)),
            (0.13, 0.72, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
            (-3, 41, (-10, 0, 10, 20, 30, 40, 50)),
            (0, 0.6, (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
            (0.1, 0.3, (0.1, 0.15, 0.2, 0.25, 0.3)),
            (980, 1020, (980, 990, 1000, 1010, 1020)),
        ],
    )
    def test_round_steps_enclose_the_range(self, low, high, expected):
        assert ticks(low, high) == pytest.approx(expected)

    def test_whole_ticks_are_integers(self):
        assert ticks(1, 3, whole=True) == (1, 2, 3)
        assert ticks(0.5, 1.5, whole=True) == (0, 1, 2)

    @pytest.mark.parametrize("seed", range(40))
    def test_any_range_gets_few_even_enclosing_ticks(self, seed):
        rng = np.random.default_rng(seed)
        low = float(rng.normal() * 10.0 ** rng.integers(-200, 200))
        high = low + abs(low) * float(10.0 ** rng.uniform(-5, 5))
        values = ticks(low, high)
        steps = np.diff(values)
        slack = 1e-5 * steps[0]
        assert 2 <= len(values) <= 8
        assert values[0] <= low + slack
        assert values[-1] >= high - slack
        assert steps == pytest.approx(steps[0], rel=1e-6, abs=0)
        mantissa = float(f"{steps[0]:.6e}".split("e")[0])
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


def svg_of(document):
    return document.all("svg", "chart")[0]


def numbers_in(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def dots(document):
    return [(float(c.attributes["cx"]), float(c.attributes["cy"])) for c in document.all("circle")]


def labels(document, css_class):
    return [element.text for element in document.all("text", css_class)]


EPOCHS = tuple((float(x), 2.0 / x) for x in range(1, 11))


class TestChart:
    def test_image_role_and_title(self, parse):
        svg = svg_of(parse(chart_page(Curve(name="train", points=EPOCHS))))
        assert svg.attributes["role"] == "img"
        assert svg.children[0].tag == "title"
        assert svg.children[0].text == "Loss"

    def test_points_lie_where_the_ticks_say(self, parse):
        document = parse(chart_page(Curve(name="train", points=((0, 0.0), (5, 0.5), (10, 1.0)))))
        assert labels(document, "x-tick") == ["0", "2", "4", "6", "8", "10"]
        assert labels(document, "y-tick") == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        xs = [float(t.attributes["x"]) for t in document.all("text", "x-tick")]
        ys = [float(t.attributes["y"]) for t in document.all("text", "y-tick")]
        middle = ((xs[0] + xs[-1]) / 2, (ys[0] + ys[-1]) / 2)
        assert dots(document) == [(xs[0], ys[0]), pytest.approx(middle, abs=0.11), (xs[-1], ys[-1])]
        assert ys[0] > ys[-1]
        line = document.all("path", "line")[-1].attributes["d"]
        assert numbers_in(line) == [number for dot in dots(document) for number in dot]

    def test_everything_is_drawn_inside_the_viewbox(self, parse):
        document = parse(
            chart_page(
                Curve(name="a", points=EPOCHS),
                Curve(name="b", points=((-1e5, -4e5), (3, 7e5))),
                marker=3e5,
            )
        )
        _, _, width, height = numbers_in(svg_of(document).attributes["viewbox"])
        for x, y in dots(document):
            assert 0 < x < width
            assert 0 < y < height

    def test_epochs_get_whole_ticks(self, parse):
        assert labels(
            parse(chart_page(Curve(name="a", points=((1, 0.2), (2, 0.3), (3, 0.1))))),
            "x-tick",
        ) == ["1", "2", "3"]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ((0, 5e6), ["0", "1e+06", "2e+06", "3e+06", "4e+06", "5e+06"]),
            ((0, 5000), ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]),
            ((1e-5, 5e-5), ["1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
            ((0.25, 0.27), ["0.250", "0.255", "0.260", "0.265", "0.270"]),
            ((-0.2, 0.2), ["-0.2", "-0.1", "0.0", "0.1", "0.2"]),
        ],
    )
    def test_labels_tell_neighbors_apart(self, parse, values, expected):
        assert (
            labels(parse(chart_page(Curve(name="a", points=tuple(enumerate(values))))), "y-tick")
            == expected
        )

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_points_leave_a_gap(self, parse, bad):
        points = ((0, 1), (1, 2), (2, bad), (3, 2), (4, 1), (bad, 1))
        document = parse(chart_page(Curve(name="a", points=points)))
        assert len(dots(document)) == 4
        assert document.all("path", "line")[-1].attributes["d"].count("M") == 2
        assert not re.search(r"\b(nan|inf)\b", document.source.split("<body>")[1])

    @pytest.mark.parametrize(
        "points",
        [
            (),
            ((1, 2.5),),
            ((0, 0),),
            ((1, 3), (2, 3)),
            ((1, 1), (1, 2)),
            ((math.nan, math.nan),),
            ((0, 1e308), (1, -1e308)),
            ((0, 0.0), (1, 5e-324)),
            ((0, 1.0), (1, 1.0 + 1e-15)),
            ((1e9, 1), (1e9 + 1, 2)),
            ((-1e300, -1e300), (1e300, 1e300)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("marker", [None, 1, 0.5, math.nan, math.inf, 1e9])
    def test_degenerate_curves_are_drawn(self, parse, points, marker):
        document = parse(chart_page(Curve(name="a", points=points), marker=marker))
        drawable = [p for p in points if all(math.isfinite(v) and abs(v) <= 1e300 for v in p)]
        assert len(dots(document)) == len(drawable)
        for path in document.all("path"):
            assert not re.search("nan|inf", path.attributes["d"])
        ticks_shown = labels(document, "y-tick")
        assert len(set(ticks_shown)) == len(ticks_shown)

    def test_no_curves_or_no_points_say_so(self, parse):
        for page in (
            chart_page(),
            chart_page(Curve(name="a", points=())),
            chart_page(Curve(name="a", points=((0, math.nan),)), marker=2),
        ):
            document = parse(page)
            assert "No finite points" in svg_of(document).text
            assert not svg_of(document).text.count("nan")

    def test_marker_is_a_dashed_vertical_line_at_its_x(self, parse):
        document = parse(
            chart_page(Curve(name="a", points=EPOCHS), marker=4, marker_label="best epoch")
        )
        _, line = document.all("path", "marker")
        x_from, y_from, x_to, y_to = numbers_in(line.attributes["d"])
        assert x_from == x_to == dots(document)[3][0]
        assert y_from != y_to
        assert re.search(r"\.marker \{[^}]*stroke-dasharray", document.source)
        assert "best epoch: 4" in document.all("ul", "legend")[0].text

    def test_marker_beyond_the_points_widens_the_axis(self, parse):
        document = parse(chart_page(Curve(name="a", points=EPOCHS), marker=20))
        x = numbers_in(document.all("path", "marker")[1].attributes["d"])[0]
        axis_end = numbers_in(document.all("path", "base")[0].attributes["d"])[2]
        assert max(x for x, _ in dots(document)) < x < axis_end

    def test_no_marker_no_line(self, parse):
        assert not parse(chart_page(Curve(name="a", points=EPOCHS))).all("path", "marker")

    def test_legend_key_and_line_agree_and_curves_differ_without_color(self, parse):
        curves = [Curve(name=f"curve {i}", points=EPOCHS) for i in range(12)]
        document = parse(chart_page(*curves))
        legend = document.all("ul", "legend")[0]
        assert [item.text.strip() for item in legend.children] == [curve.name for curve in curves]
        styles = [tuple(path.classes) for path in document.all("path", "line")]
        assert styles[:12] == styles[12:]
        assert len(set(styles)) == 12
        assert len({next(c for c in style if c.startswith("dash")) for style in styles[:4]}) == 4

    def test_long_curves_have_no_dots_but_lone_points_do(self, parse):
        points = [(x, math.sin(x)) for x in range(200)]
        assert not dots(parse(chart_page(Curve(name="a", points=tuple(points)))))
        points[99] = (99, math.nan)
        points[101] = (101, math.nan)
        assert len(dots(parse(chart_page(Curve(name="a", points=tuple(points)))))) == 1


def contrast(first, second):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


class TestColors:
    @pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
    def test_texts_and_lines_stand_out_from_the_paper(self, parse, scheme):
        style = parse(Page(title="Title")).all("style")[0].text
        block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name in ("ink", "quiet", "right", "wrong"):
            assert contrast(colors[name], colors["paper"]) >= 4.5
        for index in range(6):
            assert contrast(colors[f"c{index}"], colors["paper"]) >= 3


class TestWrite:
    def test_returns_the_path_of_the_rendered_page(self, tmp_path):
        path = write_page(Page(title="Tïtle"), str(tmp_path / "report.html"))
        assert path == tmp_path / "report.html"
        assert path.read_bytes() == render_page(Page(title="Tïtle")).encode()

    def test_rendering_is_deterministic(self):
        assert render_page(ordinary_page()) == render_page(ordinary_page())

    def test_replaces_in_one_step_from_the_same_folder(self, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        seen = []
        replace = os.replace
        path.write_text("earlier")

        def watch(source, target):
            seen.append((os.path.dirname(source), os.path.getsize(source), path.read_text()))
            replace(source, target)

        monkeypatch.setattr(os, "replace", watch)
        write_page(Page(title="Title"), path)
        assert seen == [(str(tmp_path), path.stat().st_size, "earlier")]
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]

    def test_failure_leaves_the_earlier_file_and_no_other(self, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        path.write_text("earlier")

        def fail(source, target):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_page(Page(title="Title"), path)
        assert path.read_text() == "earlier"
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]

    def test_file_mode_follows_the_umask(self, tmp_path):
        (tmp_path / "plain").write_text("")
        mode = write_page(Page(title="Title"), tmp_path / "report.html").stat().st_mode
        assert mode == (tmp_path / "plain").stat().st_mode

    def test_folder_must_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            write_page(Page(title="Title"), tmp_path / "missing" / "report.html")
