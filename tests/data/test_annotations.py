"""Karpathy's and COCO's JSON: all captions of an image, where its file is, and `restval`."""

import json
from pathlib import Path
from typing import Any

import pytest

from apecache.data.pairs import Pair
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, OptionError


def write(folder: Path, content: Any) -> Path:
    path = folder / "x.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def karpathy(name: str, split: str, *captions: str, **fields: str) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split(), "sentid": 0} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 0, **fields}


def test_restval_is_train_or_left_out(tmp_path: Path) -> None:
    images = [
        karpathy("a.jpg", "train", "one", "two", filepath="train2014"),
        karpathy("b.jpg", "restval", "three", filepath="val2014"),
        karpathy("c.jpg", "test", filepath="val2014"),
    ]
    path = write(tmp_path, {"images": images, "dataset": "coco"})
    a, b, c = open_pairs(path)
    assert a == Pair(
        key="train2014/a.jpg",
        captions=("one", "two"),
        languages=("", ""),
        split="train",
    )
    assert b == Pair(key="val2014/b.jpg", captions=("three",), languages=("",), split="train")
    assert c == Pair(key="val2014/c.jpg", captions=(), languages=(), split="test")
    assert list(open_pairs(path, OpenSpec(restval=False))) == [a, c]


def test_leaving_restval_out_is_refused_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("image\tcaption\na.jpg\tone\n")
    with pytest.raises(OptionError, match="--no-restval is for Karpathy's JSON"):
        open_pairs(tmp_path / "pairs.tsv", OpenSpec(restval=False))


def test_coco_joins_by_id_and_keeps_images_without_captions(tmp_path: Path) -> None:
    content = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "a.jpg"},
            {"id": 3, "file_name": "b.jpg"},
            {"id": 5, "file_name": "c.jpg"},
        ],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "of b"},
            {"image_id": 7, "id": 2, "caption": "of a"},
            {"image_id": 3, "id": 3, "caption": "b again"},
        ],
    }
    assert list(open_pairs(write(tmp_path, content))) == [
        Pair(key="a.jpg", captions=("of a",), languages=("",)),
        Pair(key="b.jpg", captions=("of b", "b again"), languages=("", "")),
        Pair(key="c.jpg", captions=(), languages=()),
    ]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"filename": 3}, r"images\[1\]: filename is 3; expected str"),
        ({"filename": ""}, r"images\[1\]: filename is ''; expected str"),
        ({"sentences": "x"}, r"images\[1\]: sentences is 'x'; expected list"),
        ({"sentences": ["x"]}, r"images\[1\]: a sentence is a str; expected an object with 'raw'"),
        ({"sentences": [{}]}, r"images\[1\]: raw is nothing; expected str"),
        (
            {"filename": "http://example.org/b.jpg"},
            r"images\[1\]: image 'http://example.org/b.jpg' is a URL",
        ),
    ],
)
def test_a_wrong_record_is_named(image: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = {
        "images": [karpathy("a.jpg", "train", "x"), {**karpathy("b.jpg", "train", "x"), **image}]
    }
    with pytest.raises(ManifestError, match=said):
        open_pairs(write(tmp_path, content))


def test_a_wrong_record_of_coco_is_named(tmp_path: Path) -> None:
    content = {
        "images": [{"id": [1], "file_name": "a"}],
        "annotations": [{"image_id": 1, "caption": "x"}],
    }
    with pytest.raises(ManifestError, match=r"images\[0\]: id is \[1\]; expected a number or text"):
        open_pairs(write(tmp_path, content))
    content["images"][0] = {"id": 1}
    with pytest.raises(ManifestError, match=r"images\[0\]: file_name is nothing; expected str"):
        open_pairs(write(tmp_path, content))
    content = {
        "images": [{"id": 1, "file_name": "a"}],
        "annotations": [{"image_id": 1, "caption": ["x"]}],
    }
    with pytest.raises(ManifestError, match=r"annotations\[0\]: caption is a list; expected text"):
        open_pairs(write(tmp_path, content))
