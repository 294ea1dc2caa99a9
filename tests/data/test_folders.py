"""Folders of images: splits, classes and metadata tables at every place that they may stand."""

from pathlib import Path

import pytest
from inputs import NAMES, image_bytes, write_images, write_table

from apecache.data.pairs import Pair
from apecache.data.sources import open_pairs
from apecache.errors import ManifestError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.png", "B.JPG"), [("B.JPG", "", ""), ("a.png", "", "")]),
        (("cat/a.png", "dog/b.png"), [("cat/a.png", "", "cat"), ("dog/b.png", "", "dog")]),
        (("cat/tabby/a.png",), [("cat/tabby/a.png", "", "cat")]),
        (
            ("train/a.png", "validation/b.png"),
            [("train/a.png", "train", ""), ("validation/b.png", "val", "")],
        ),
        (
            ("train/cat/a.png", "test/dog/b.png"),
            [("test/dog/b.png", "test", "dog"), ("train/cat/a.png", "train", "cat")],
        ),
        (("train/a.png", "bus/b.png"), [("bus/b.png", "", "bus"), ("train/a.png", "", "train")]),
        ((".hidden/a.png", "b.png", ".c.png"), [("b.png", "", "")]),
    ],
)
def test_folders_say_split_and_class(
    names: tuple[str, ...],
    expected: list[tuple[str, str, str]],
    tmp_path: Path,
) -> None:
    source = open_pairs(write_images(tmp_path, names))
    assert list(source) == [
        Pair(key=key, captions=(), languages=(), split=split, label=label)
        for key, split, label in expected
    ]
    assert source.media.read(expected[0][0]) == image_bytes(names.index(expected[0][0]))


def test_metadata_one_level_down_says_the_split(tmp_path: Path) -> None:
    for folder, names in (("train", NAMES[:3]), ("validation", NAMES[3:])):
        write_images(tmp_path / folder, names)
        write_table(
            tmp_path / folder / "metadata.csv",
            ["file_name", "text"],
            [[name, f"of {name}"] for name in names],
        )
    source = open_pairs(tmp_path)
    assert source.keys == [
        *(f"train/{name}" for name in NAMES[:3]),
        *(f"validation/{name}" for name in NAMES[3:]),
    ]
    assert [pair.split for pair in source] == ["train"] * 3 + ["val"] * 2
    assert source.captions == [f"of {name}" for name in NAMES]
    assert all(map(source.media.exists, source.keys))


@pytest.mark.parametrize("labeled", ["train", "validation"])
def test_the_fields_of_all_split_folders_are_kept(labeled: str, tmp_path: Path) -> None:
    for folder in ("train", "validation"):
        write_images(tmp_path / folder, ["a.png"])
        more = ["label"] if folder == labeled else ["note"]
        write_table(
            tmp_path / folder / "metadata.csv",
            ["file_name", "text", *more],
            [["a.png", "x", "y"]],
        )
    fields = open_pairs(tmp_path).fields
    assert fields.taken == {
        "image": "file_name",
        "caption": "text",
        "label": "label",
        "split": "folder",
    }
    assert fields.unused == ("note",)


@pytest.mark.parametrize(
    ("header", "split"),
    [(["file_name"], "test"), (["file_name", "split"], "mine")],
)
def test_metadata_at_the_top_takes_the_split_from_its_column_or_its_paths(
    header: list[str],
    split: str,
    tmp_path: Path,
) -> None:
    write_images(tmp_path, ["test/a.png"])
    write_table(tmp_path / "metadata.csv", header, [["test/a.png", "mine"][: len(header)]])
    assert list(open_pairs(tmp_path)) == [
        Pair(key="test/a.png", captions=(), languages=(), split=split)
    ]


def test_an_image_that_metadata_names_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, ["out.png", "in/a.png"])
    write_table(tmp_path / "in" / "metadata.csv", ["file_name"], [["../out.png"], ["a.png"]])
    source = open_pairs(tmp_path / "in")
    assert [source.media.exists(key) for key in source.keys] == [False, True]


def test_an_error_in_metadata_names_the_table_and_the_line(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.csv", ["file_name", "text"], [["a.png", "x"], ["b.png"]])
    with pytest.raises(ManifestError, match=r"metadata\.csv, line 3: 1 column"):
        open_pairs(tmp_path)


def test_a_table_beside_classes_does_not_disturb_them(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/a.png", "dog/b.png"])
    (tmp_path / "labels.tsv").write_text("not read")
    assert [pair.label for pair in open_pairs(tmp_path)] == ["cat", "dog"]
