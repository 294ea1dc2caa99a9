"""Thumbnails, what counts as an image, and how queries and results are shown."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from apecache.report import Gallery, Page, QueryExample, Result, thumbnail

PREFIX = "data:image/jpeg;base64,"
PICTURE = thumbnail(Image.new("RGB", (8, 8), "red"))


def decode(uri):
    assert uri.startswith(PREFIX)
    return base64.b64decode(uri.removeprefix(PREFIX), validate=True)


def opened(uri):
    image = Image.open(io.BytesIO(decode(uri)))
    image.load()
    return image


def pixel(image, x, y):
    return np.asarray(image)[y, x].astype(int)


def noise(width, height):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


class TestThumbnail:
    @pytest.mark.parametrize(
        ("size", "side", "expected"),
        [
            ((400, 200), 160, (160, 80)),
            ((90, 300), 100, (30, 100)),
            ((40, 30), 160, (40, 30)),
            ((1, 5000), 50, (1, 50)),
        ],
    )
    def test_longer_side_is_bounded_and_never_enlarged(self, size, side, expected):
        assert opened(thumbnail(noise(*size), side)).size == expected

    @pytest.mark.parametrize(
        "mode",
        ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"],
    )
    def test_every_mode_becomes_an_rgb_jpeg(self, mode):
        image = opened(thumbnail(Image.new(mode, (20, 10))))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (20, 10))

    @pytest.mark.parametrize("mode", ["I;16", "I;16B"])
    def test_sixteen_bit_grays_keep_their_range(self, mode):
        image = opened(thumbnail(Image.new(mode, (16, 16), 0x8000)))
        assert np.abs(np.asarray(image).astype(int) - 128).max() <= 2

    def test_transparency_is_laid_on_white(self):
        image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
        image.paste((0, 0, 0, 0), (0, 0, 16, 16))
        shown = opened(thumbnail(image))
        assert pixel(shown, 3, 8).min() > 245
        assert pixel(shown, 28, 8)[0] > 240
        assert pixel(shown, 28, 8)[1] < 20

    def test_palette_transparency_is_laid_on_white(self):
        image = Image.new("P", (16, 16), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.info["transparency"] = 0
        assert pixel(opened(thumbnail(image)), 8, 8).min() > 245

    def test_exif_orientation_is_applied(self):
        image = Image.new("RGB", (40, 20), "white")
        image.getexif()[0x0112] = 6
        assert opened(thumbnail(image)).size == (20, 40)

    def test_no_metadata_survives(self):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x010E] = "SECRET-exif"
        xmp = b"<x:xmpmeta>SECRET-xmp</x:xmpmeta>"
        noise(64, 64).save(
            buffer,
            "JPEG",
            exif=exif,
            comment=b"SECRET-comment",
            xmp=xmp,
            icc_profile=b"SECRET-icc",
        )
        assert buffer.getvalue().count(b"SECRET") == 4
        source = Image.open(buffer)
        data = decode(thumbnail(source))
        assert b"SECRET" not in data
        image = Image.open(io.BytesIO(data))
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert not image.getexif()

    def test_png_text_does_not_survive(self):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("comment", "SECRET-text")
        buffer = io.BytesIO()
        noise(16, 16).save(buffer, "PNG", pnginfo=chunks)
        assert b"SECRET" not in decode(thumbnail(Image.open(buffer)))

    def test_a_small_jpeg_is_encoded_anew(self):
        buffer = io.BytesIO()
        noise(64, 64).save(buffer, "JPEG", quality=97)
        payload = buffer.getvalue() + b"TRAILING-PAYLOAD"
        data = decode(thumbnail(Image.open(io.BytesIO(payload))))
        assert data != payload
        assert b"TRAILING" not in data
        assert payload[200:400] not in data

    def test_the_argument_is_left_as_it_is(self):
        image = noise(300, 200)
        before = image.tobytes()
        thumbnail(image, 50)
        assert image.size == (300, 200)
        assert image.tobytes() == before

    def test_side_below_one_is_refused(self):
        with pytest.raises(ValueError, match="at least 1"):
            thumbnail(noise(4, 4), 0)


REFUSED = [
    "",
    "https://example.org/cat.jpg",
    "//example.org/cat.jpg",
    "cat.jpg",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "data:image/svg+xml;base64,PHN2Zz4=",
    "data:image/png;base64,AAAA",
    "data:text/html;base64,AAAA",
    "data:image/jpeg,AAAA",
    "DATA:image/jpeg;base64,AAAA",
    " " + PICTURE,
    PICTURE + "\n",
    PREFIX,
    PREFIX + 'AAAA" onerror="alert(1)',
    PREFIX + "AA=AA",
]


class TestImages:
    @pytest.mark.parametrize("uri", REFUSED)
    def test_only_jpeg_data_uris_are_images(self, uri):
        with pytest.raises(ValueError, match="an image must be"):
            Result(image=uri, text="caption", score=0.5, correct=True)
        with pytest.raises(ValueError, match="an image must be"):
            QueryExample(query_text=None, query_image=uri, results=(), rank=1)

    def test_thumbnails_are_images(self):
        assert Result(image=PICTURE, text="caption", score=0.5, correct=True).image == PICTURE
        assert (
            QueryExample(query_text=None, query_image=PICTURE, results=(), rank=1).query_image
            == PICTURE
        )

    def test_a_query_needs_a_text_or_an_image(self):
        with pytest.raises(ValueError, match="query text"):
            QueryExample(query_text=None, query_image=None, results=(), rank=1)

    @pytest.mark.parametrize("rank", [0, -3])
    def test_ranks_start_at_one(self, rank):
        with pytest.raises(ValueError, match="start at 1"):
            QueryExample(query_text="a cat", query_image=None, results=(), rank=rank)


RIGHT = Result(image=PICTURE, text="a red square", score=0.41239, correct=True)
WRONG = Result(image=None, text="a blue circle", score=-0.2, correct=False)


def gallery_page(*items):
    return Page(
        title="Title",
        galleries=(Gallery(title="Text to image", note="Drawn at random.", items=items),),
    )


class TestGallery:
    def test_right_and_wrong_differ_without_color(self, parse):
        shown = (
            parse(
                gallery_page(
                    QueryExample(query_text="red", query_image=None, results=(WRONG, RIGHT), rank=2)
                )
            )
            .all("ol")[0]
            .children
        )
        assert "✗" in shown[0].text
        assert "wrong" in shown[0].text
        assert "✓" in shown[1].text
        assert "correct" in shown[1].text

    @pytest.mark.parametrize(
        ("results", "rank", "mark", "words"),
        [
            ((RIGHT,), 1, "✓", "rank 1"),
            ((WRONG,), 12, "✗", "rank 12"),
            ((WRONG,), None, "✗", "no correct item"),
            ((RIGHT,), None, "✓", "rank unknown"),
            ((), 3, "✗", "rank 3"),
        ],
    )
    def test_the_query_says_whether_it_was_found(self, parse, results, rank, mark, words):
        text = (
            parse(
                gallery_page(
                    QueryExample(query_text="red", query_image=None, results=results, rank=rank)
                )
            )
            .all("div", "query")[0]
            .text
        )
        assert mark in text
        assert words in text

    def test_scores_have_three_decimals(self, parse):
        scores = [
            p.text
            for p in parse(
                gallery_page(
                    QueryExample(query_text="red", query_image=None, results=(RIGHT, WRONG), rank=1)
                )
            ).all("p", "score")
        ]
        assert scores[0].endswith("0.412")
        assert scores[1].endswith("-0.200")

    def test_images_are_inline_and_have_an_alternative_text(self, parse):
        images = parse(
            gallery_page(
                QueryExample(query_text=None, query_image=PICTURE, results=(RIGHT, WRONG), rank=1)
            )
        ).all("img")
        assert [image.attributes["src"] for image in images] == [PICTURE, PICTURE]
        assert all(image.attributes["alt"] for image in images)

    def test_title_note_and_texts_are_shown(self, parse):
        text = (
            parse(
                gallery_page(
                    QueryExample(query_text="red thing", query_image=None, results=(RIGHT,), rank=1)
                )
            )
            .all("section", "gallery")[0]
            .text
        )
        for words in ("Text to image", "Drawn at random.", "red thing", "a red square"):
            assert words in text
