"""Heat maps: well-formed, every value in its cell, darker for more, and inert."""

from xml.etree import ElementTree

import pytest

from apecache.evaluate.scout import ScoutReport, ScoutRow
from apecache.metrics.geometry import FeatureSimilarity
from apecache.report.charts.heatmap import HeatMap, render_heat_maps, scout_maps

SVG = "{http://www.w3.org/2000/svg}"


def shades(svg: str) -> list[int]:
    cells = ElementTree.fromstring(svg).findall(f"{SVG}rect")[1:]
    return [sum(bytes.fromhex(cell.attrib["fill"][1:])) for cell in cells]


def test_every_value_stands_in_its_cell_and_more_is_darker() -> None:
    one = HeatMap(
        title="first",
        rows=("a", "b"),
        columns=("x", "y", "z"),
        values=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    )
    svg = render_heat_maps(
        [one, HeatMap(title="second", rows=("a",), columns=("x",), values=((0.1234,),), digits=3)]
    )
    words = [text.text for text in ElementTree.fromstring(svg).findall(f"{SVG}text")]
    assert words == [
        "first",
        *"xyz",
        "a",
        "1.0",
        "2.0",
        "3.0",
        "b",
        "4.0",
        "5.0",
        "6.0",
        "second",
        "x",
        "a",
        "0.123",
    ]
    assert shades(svg)[:6] == sorted(shades(svg)[:6], reverse=True)
    assert len(set(shades(svg)[:6])) == 6


def test_the_picture_holds_all_that_is_in_it() -> None:
    svg = ElementTree.fromstring(
        render_heat_maps(
            [HeatMap(title="t", rows=("a" * 40,), columns=("b" * 40,) * 9, values=((1.0,) * 9,))]
            * 3
        )
    )
    for cell in svg.findall(f"{SVG}rect")[1:]:
        assert float(cell.attrib["x"]) + float(cell.attrib["width"]) <= float(svg.attrib["width"])
        assert float(cell.attrib["y"]) + float(cell.attrib["height"]) <= float(svg.attrib["height"])
    assert all(float(text.attrib["y"]) > 0 for text in svg.findall(f"{SVG}text"))


@pytest.mark.parametrize(
    "word",
    ["<script>alert(1)</script>", '" onload="x', "a\x00\x1b[31mb", "\ud800", "]]>&amp;"],
)
def test_names_are_inert(word: str) -> None:
    svg = render_heat_maps([HeatMap(title=word, rows=(word,), columns=(word,), values=((1.0,),))])
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(svg).iter()}
    assert tags == {"svg", "rect", "text"}
    svg.encode()


def test_digits_that_are_no_decimals_sort_as_text() -> None:
    rows = [
        ScoutRow(
            image=image,
            text="bert",
            likeness=FeatureSimilarity(
                cka=0.1,
                mutual_knn=0.1,
                image_to_text=1.0,
                text_to_image=1.0,
            ),
        )
        for image in ("²10", "²2")
    ]
    recall, *_ = scout_maps(
        ScoutReport(
            rows=tuple(rows),
            n_fit=12,
            n_measured=12,
            n_unreadable=0,
            chance=8.3,
            chance_mutual_knn=0.1,
        )
    )
    assert recall.rows == ["²2", "²10"]


def test_a_scout_is_drawn_once_for_each_measure_with_layers_in_their_order() -> None:
    images = ("vit-mean-layer10", "vit-mean-layer2", "vit")
    texts = ("bert-mean-layer1", "bert")
    rows = [
        ScoutRow(image=image, text=text, likeness=FeatureSimilarity(cka=i / 10, mutual_knn=t / 10, image_to_text=i, text_to_image=10 * t))
        for i, image in enumerate(images) for t, text in enumerate(texts)
    ]  # fmt: skip
    recall, cka, knn = scout_maps(
        ScoutReport(
            rows=tuple(rows),
            n_fit=12,
            n_measured=12,
            n_unreadable=0,
            chance=8.3,
            chance_mutual_knn=0.1,
        )
    )
    assert recall.rows == ["vit", "vit-mean-layer2", "vit-mean-layer10"]
    assert recall.columns == ["bert", "bert-mean-layer1"]
    assert recall.values == [[6.0, 1.0], [5.5, 0.5], [5.0, 0.0]]
    assert [row[0] for row in cka.values] == [0.2, 0.1, 0.0]
    assert knn.values[0] == [0.1, 0.0]
