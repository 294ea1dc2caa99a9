"""Refusals of a source name an option that the command has."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from apecache_cli.app import app
from inputs import image_bytes, write_images, write_table, write_tar
from typer.main import get_command

from apecache.data.media import Media
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, OptionError, RowError

OPTION = re.compile(r"--[a-z][a-z-]+")
EXTRACT = get_command(app).commands["extract"]  # type: ignore[attr-defined]
OPTIONS = {name for parameter in EXTRACT.params for name in parameter.opts}


def written(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return write


def only_images(folder: Path) -> Path:
    return write_images(folder)


def only_text_in_tar(folder: Path) -> Path:
    return write_tar(folder / "x.tar", {"a.txt": b"x"})


REFUSED: dict[str, tuple[Callable[[Path], Path], OpenSpec, list[str]]] = {
    "no image column": (
        written("t.csv", "picture,caption\na,b\n"),
        OpenSpec(),
        ["picture, caption", "--image-column"],
    ),
    "no caption column": (
        written("t.csv", "image,words\na,b\n"),
        OpenSpec(require=("caption",)),
        ["image, words", "--caption-column"],
    ),
    "two caption columns": (
        written("t.csv", "image,title,text\na,b,c\n"),
        OpenSpec(),
        ["'title' and 'text'", "--caption-column"],
    ),
    "no label column": (
        written("t.csv", "image,class\na,b\n"),
        OpenSpec(require=("label",)),
        ["image, class", "--label-column"],
    ),
    "no key column": (
        written("t.csv", "image,id\na,b\n"),
        OpenSpec(key_column="sku"),
        ["image, id", "--key-column"],
    ),
    "ragged CSV": (
        written("t.csv", "image,caption\na,b,c\n"),
        OpenSpec(),
        ["3 columns, the header has 2", "--separator"],
    ),
    "ragged TSV": (
        written("t.tsv", "image\tcaption\na\n"),
        OpenSpec(),
        ["1 column, the header has 2", "--quoting"],
    ),
    "quotes that end nowhere": (
        written("t.csv", 'image,caption\na,"b\n'),
        OpenSpec(),
        ["line 2", "--quoting"],
    ),
    "images without captions": (
        only_images,
        OpenSpec(require=("caption",)),
        ["has no captions, only images", ".txt beside each image", "--caption-column"],
    ),
    "images without labels": (
        only_images,
        OpenSpec(require=("label",)),
        ["has no labels, only images", "folder per class", "--label-column"],
    ),
    "tar without images": (only_text_in_tar, OpenSpec(), ["samples without an image", "--image-ext"]),
    "names of images": (
        written("t.txt", "a.jpg\nb.jpg\n"),
        OpenSpec(),
        ["names of images without captions", "--split-file"],
    ),
    "list for Karpathy": (
        written("t.json", json.dumps([{"image": "a"}])),
        OpenSpec(restval=False),
        ["a table", "--no-restval"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_was_found_and_an_option_of_extract(case: str, tmp_path: Path) -> None:
    make, spec, expected = REFUSED[case]
    with pytest.raises((ManifestError, OptionError)) as caught:
        open_pairs(make(tmp_path), spec)
    message = str(caught.value)
    assert [text for text in expected if text not in message] == [], message
    named = OPTION.findall(message)
    assert named, message
    assert set(named) <= OPTIONS


def read_all(media: Media, keys: list[str]) -> list[RowError]:
    errors = []
    for key in keys:
        try:
            media.read(key)
        except RowError as error:
            errors.append(error)
    return errors


def test_a_bad_row_names_an_option_of_extract(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "out.png").write_bytes(image_bytes(0))
    (tmp_path / "given" / "link.png").symlink_to(tmp_path / "out.png")
    rows = [["link.png"], [str(tmp_path / "out.png")]]
    source = open_pairs(write_table(tmp_path / "given" / "t.csv", ["image"], rows))
    errors = read_all(source.media, source.keys)
    named = [OPTION.findall(error.detail) for error in errors]
    assert named == [["--allow-root"], ["--root"]]
    assert {"--allow-root", "--root", "--scale", "--max-pixels", "--max-bad"} <= OPTIONS
