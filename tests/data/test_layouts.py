"""Layouts that people have: each kind of input in several forms, made as its own tools make it."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import (
    CAPTIONS,
    NAMES,
    image_bytes,
    samples,
    struct_type,
    structs,
    write_images,
    write_parquet,
    write_table,
    write_tar,
)
from PIL import Image

from apecache.data.pairs import PairSource
from apecache.data.shards import split_name
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, OptionError, RowError

KEYS = [name.removesuffix(".png") for name in NAMES]


def captions_by_key(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {pair.key: pair.captions for pair in source}


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- tables of text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "filepath\ttitle\na.png\ta dog, brown\nb.png\ta cat\n"),
        ("t.csv", "filepath;title\na.png;a dog, brown\nb.png;a cat\n"),
        ("t.tsv", 'image,caption\na.png,"a dog, brown"\nb.png,a cat\n'),
        ("results.csv", "image_name| comment_number| comment\na.png| 0| a dog, brown\nb.png| 4 a cat\n"),
        ("captions.txt", 'image,caption\na.png,"a dog, brown"\nb.png,a cat\n'),
        ("Flickr8k.token.txt", "a.png#0\ta dog, brown\nb.png#0\ta cat\n"),
        ("results_20130124.token", "a.png#0\ta dog, brown\nb.png#0\ta cat\n"),
        ("no header.tsv", "a.png\ta dog, brown\nb.png\ta cat\n"),
        ("no header.csv", "a.png,a dog, brown\nb.png,a cat\n"),
        ("upper.csv", 'Image,Caption\na.png,"a dog, brown"\nb.png,a cat\n'),
        ("t.ndjson", '{"image": "a.png", "caption": "a dog, brown"}\n{"image": "b.png", "caption": "a cat"}'),
        ("lines.json", '{"image": "a.png", "caption": "a dog, brown"}\n{"image": "b.png", "caption": "a cat"}'),
        ("by name.json", '{"a.png": "a dog, brown", "b.png": ["a cat"]}'),
        ("list.json", '[{"image": "a.png", "caption": ["a dog, brown"]}, {"image": "b.png", "caption": "a cat"}]'),
    ],
)  # fmt: skip
def test_the_separator_and_the_header_are_seen_in_the_content(
    name: str,
    text: str,
    tmp_path: Path,
) -> None:
    source = open_pairs(write_text(tmp_path / name, text))
    assert captions_by_key(source) == {"a.png": ("a dog, brown",), "b.png": ("a cat",)}


def test_a_separator_can_be_named(tmp_path: Path) -> None:
    table = write_text(tmp_path / "t.csv", "image:caption\na.png:a dog, a cat\n")
    source = open_pairs(table, OpenSpec(separator=":"))
    assert captions_by_key(source) == {"a.png": ("a dog, a cat",)}
    with pytest.raises(OptionError, match="--separator 'ab': expected one character"):
        open_pairs(table, OpenSpec(separator="ab"))


@pytest.mark.parametrize(
    "captions",
    [
        ['"Big dogs asleep', "a boat", 'rain on a window"', "apples"],
        ['"', "a", "b", '"'],
        ['said "no"', '"quoted whole"', "plain", 'ends with "'],
        ['a ""double"" quote', '"x" and y', "plain", ""],
    ],
)
def test_quotes_of_a_tsv_whose_cells_were_joined_are_kept(
    captions: list[str],
    tmp_path: Path,
) -> None:
    rows = [["image", "caption"], *([f"{row}.jpg", text] for row, text in enumerate(captions))]
    table = write_text(tmp_path / "t.tsv", "\n".join(map("\t".join, rows)) + "\n")
    source = open_pairs(table)
    assert source.keys == [f"{row}.jpg" for row in range(len(captions))]
    assert source.captions == [text for text in captions if text]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quotes_of_a_csv_writer_are_removed_from_a_tsv(quoting: Any, tmp_path: Path) -> None:
    captions = ['said "no"', "a\ttab", '"quoted whole"', "plain"]
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        writer = csv.writer(file, "excel-tab", quoting=quoting)
        writer.writerow(["image", "caption"])
        writer.writerows([f"{row}.jpg", text] for row, text in enumerate(captions))
    assert open_pairs(tmp_path / "t.tsv").captions == captions


def test_a_line_break_in_a_cell_of_a_tsv_is_refused_unless_quotes_are_asked_for(
    tmp_path: Path,
) -> None:
    table = write_text(tmp_path / "t.tsv", 'image\tcaption\na.jpg\t"one\ntwo"\nb.jpg\tthree\n')
    with pytest.raises(ManifestError, match=r"line 3: .*--quoting csv"):
        open_pairs(table)
    assert open_pairs(table, OpenSpec(quoting="csv")).captions == ["one\ntwo", "three"]
    write_text(table, 'image\tcaption\na.jpg\t"one\ntwo\tthree"\nb.jpg\tfour\n')
    with pytest.raises(ManifestError, match=r"line 3: no image, after a quote .*--quoting csv"):
        open_pairs(table)


def test_a_quote_that_swallows_rows_of_a_csv_is_refused_and_can_be_read_as_text(
    tmp_path: Path,
) -> None:
    text = 'image,caption\na.jpg,"Big dogs\nb.jpg,a boat\nc.jpg,rain"\nd.jpg,x\n'
    table = write_text(tmp_path / "t.csv", text)
    with pytest.raises(
        ManifestError, match=r"line 2: a quoted cell goes over rows .*--quoting none"
    ):
        open_pairs(table)
    source = open_pairs(table, OpenSpec(quoting="none"))
    assert source.captions == ['"Big dogs', "a boat", 'rain"', "x"]


def test_the_fields_of_all_json_lines_count(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"image": "a.jpg"},
        {"image": "b.jpg", "split": "val", "label": "dog"},
        {"image": "c.jpg", "caption": "x", "lang": "en"},
    ]
    table = write_text(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))
    first, second, third = open_pairs(table)
    assert (first.captions, first.split) == ((), "")
    assert (second.split, second.label) == ("val", "dog")
    assert (third.captions, third.languages) == (("x",), ("en",))


NAN = float("nan")


def nan_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_text(folder / "t.jsonl", "\n".join(map(json.dumps, rows)))


def nan_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_text(folder / "t.json", json.dumps(rows))


def nan_tar(folder: Path, rows: list[dict[str, Any]]) -> Path:
    members: dict[str, bytes] = {}
    for row in rows:
        members[row["image"]] = image_bytes(0)
        members[Path(row["image"]).stem + ".json"] = json.dumps(row).encode()
    return write_tar(folder / "t.tar", members)


def nan_sidecar(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_images(folder / "files", [row["image"] for row in rows])
    for row in rows:
        write_text(folder / "files" / (Path(row["image"]).stem + ".json"), json.dumps(row))
    return folder / "files"


def nan_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("write", [nan_jsonl, nan_json, nan_tar, nan_sidecar, nan_parquet])
@pytest.mark.parametrize("missing", [NAN, None])
def test_nan_and_null_are_missing_in_every_role(
    write: Callable[[Path, list[dict[str, Any]]], Path],
    missing: float | None,
    tmp_path: Path,
) -> None:
    rows = [
        {"image": "a.png", "caption": missing, "split": missing, "label": missing, "lang": missing},
        {"image": "b.png", "caption": missing, "split": missing, "label": 3.0, "lang": missing},
    ]
    first, second = open_pairs(write(tmp_path, rows))
    assert (first.captions, first.split, first.label) == ((), "", "")
    assert (second.captions, second.label) == ((), "3")


@pytest.mark.parametrize(
    ("header", "spec"),
    [
        (["image", "caption_0", "caption_1", "caption_10"], None),
        (["image", "caption0", "caption1", "caption10"], None),
        (["image", "Caption 0", "Caption 1", "Caption 10"], None),
        (["image", "en a", "en b", "en c"], OpenSpec(caption_column="en *")),
        (["image", "x", "y", "z"], OpenSpec(caption_column=("x", "y", "z"))),
    ],
)
def test_several_columns_of_captions(
    header: list[str],
    spec: OpenSpec | None,
    tmp_path: Path,
) -> None:
    rows = [["a.png", "one", "two", "ten"], ["b.png", "one", "", ""]]
    source = open_pairs(write_table(tmp_path / "t.csv", header, rows), spec)
    assert captions_by_key(source) == {"a.png": ("one", "two", "ten"), "b.png": ("one",)}
    assert source.fields.unused == ()


def test_a_caption_can_be_made_of_several_columns(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "t.csv",
        ["sku", "image", "title", "description"],
        [["7-1", "a.png", "Shirt", "Red"], ["7-2", "a.png", "Shirt", ""], ["7-3", "b.png", "", ""]],
    )
    spec = OpenSpec(caption_template="{title}. {description}", key_column="sku")
    source = open_pairs(table, spec)
    assert captions_by_key(source) == {"7-1": ("Shirt. Red",), "7-2": ("Shirt.",), "7-3": ()}
    write_images(tmp_path)
    assert source.media.read("7-2") == image_bytes(0)
    assert source.media.exists("7-3")
    assert source.media.sizes(["7-1", "7-3"]) == [len(image_bytes(0)), len(image_bytes(1))]
    assert source.skipped == {"rows without a caption": 1}
    for template in ("{title.__class__}", "{0[1]}", "no braces", "{", "{}"):
        with pytest.raises(OptionError, match="--caption-template"):
            open_pairs(table, OpenSpec(caption_template=template))
    with pytest.raises(ManifestError, match=r"no column 'titel'.*did you mean title"):
        open_pairs(table, OpenSpec(caption_template="{titel}"))


def test_one_key_with_two_files_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", ["sku", "image"], [["1", "a.png"], ["1", "b.png"]])
    with pytest.raises(ManifestError, match=r"line 3: image '1' has file 'b.png' here"):
        open_pairs(table, OpenSpec(key_column="sku"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.txt"])
def test_tables_may_be_compressed(name: str, ending: str, tmp_path: Path) -> None:
    texts = {
        "t.csv": "image,caption\na.png,x\n",
        "t.tsv": "image\tcaption\na.png\tx\n",
        "t.jsonl": '{"image": "a.png", "caption": "x"}\n',
        "t.json": '[{"image": "a.png", "caption": "x"}]',
        "t.txt": "a.png#0\tx\n",
    }
    data = texts[name].encode()
    path = tmp_path / (name + ending)
    if ending == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        pa = pytest.importorskip("pyarrow")
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    assert captions_by_key(open_pairs(path)) == {"a.png": ("x",)}
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ManifestError, match="damaged"):
        open_pairs(path)


def test_long_cells_are_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    for name in ("t.csv", "t.tsv"):
        table = write_table(
            tmp_path / name, ["image", "caption"], [["a.png", long], ["b.png", "x"]]
        )
        assert open_pairs(table).captions == [long, "x"]


@pytest.mark.parametrize("column", ["captions", "raw", "caption"])
def test_lists_that_a_table_has_as_text_are_captions(column: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    lists = [['a dog, "big"', "it's a dog"], ["a cat"]]
    frame = pandas.DataFrame({"filename": ["a.png", "b.png"], column: lists})
    frame.to_csv(tmp_path / "python.csv", index=False)
    frame[column] = [json.dumps(captions) for captions in lists]
    frame.to_csv(tmp_path / "json.csv", index=False)
    for name in ("python.csv", "json.csv"):
        assert [list(pair.captions) for pair in open_pairs(tmp_path / name)] == lists
    frame[column] = ["['a list']", "and text"]
    frame.to_csv(tmp_path / "mixed.csv", index=False)
    assert open_pairs(tmp_path / "mixed.csv").captions == ["['a list']", "and text"]


def test_a_row_without_an_image_is_a_bad_row(tmp_path: Path) -> None:
    table = write_text(tmp_path / "t.csv", "image,caption\na.png,x\n,y\n")
    write_images(tmp_path)
    source = open_pairs(table)
    assert source.captions == ["x", "y"]
    with pytest.raises(RowError, match=r"^missing: \(no image on line 3\)"):
        source.media.read(source.keys[1])


def test_a_list_of_file_names_is_not_taken_for_captions(tmp_path: Path) -> None:
    lists = write_text(tmp_path / "Flickr_8k.trainImages.txt", "a.jpg\nb.jpg\n")
    with pytest.raises(ManifestError, match=r"names of images without captions.*--split-file"):
        open_pairs(lists)


def test_several_tables_are_one_source(tmp_path: Path) -> None:
    for number in range(3):
        rows = [[f"{number}.png", f"caption {number}"]]
        write_table(tmp_path / f"part-{number}.csv", ["image", "caption"], rows)
    expected = {f"{number}.png": (f"caption {number}",) for number in range(3)}
    for pattern in ("part-{0..2}.csv", "part-{0,1,2}.csv", "part-*.csv"):
        assert captions_by_key(open_pairs(str(tmp_path / pattern))) == expected
    with pytest.raises(ManifestError, match="no file matches"):
        open_pairs(str(tmp_path / "no-*.csv"))


# --- annotations ----------------------------------------------------------------------------------


def test_annotations_of_images_that_are_not_listed_are_bad_rows(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 1, "caption": "x"},
            {"image_id": 2, "caption": "y"},
            {"image_id": "three", "caption": "z"},
            {"image_id": 2, "caption": "again"},
        ],
    }
    write_images(tmp_path)
    source = open_pairs(write_text(tmp_path / "captions.json", json.dumps(content)))
    assert [pair.captions for pair in source] == [("x",), ("y", "again"), ("z",)]
    assert [source.media.exists(key) for key in source.keys] == [True, False, False]
    with pytest.raises(RowError, match=r"^missing: \(no image has the id 2\)"):
        source.media.read(source.keys[1])


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".caption", ".json", ".png.txt"])
def test_texts_beside_images_are_captions(ending: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    for name, caption in zip(NAMES[:4], CAPTIONS, strict=False):
        stem = name if ending == ".png.txt" else Path(name).stem
        text = json.dumps({"caption": caption, "label": "x"}) if ending == ".json" else caption
        write_text(tmp_path / (Path(stem).stem + ending), text + "\n")
    write_text(tmp_path / "notes.md", "left out")
    source = open_pairs(tmp_path)
    assert [pair.captions for pair in source] == [(text,) for text in CAPTIONS[:4]] + [()]
    assert source.skipped == {"rows without a caption": 1, "files .md": 1}
    if ending == ".json":
        assert {pair.label for pair in source} == {"x", ""}


def test_boxes_beside_images_are_not_captions(tmp_path: Path) -> None:
    write_images(tmp_path)
    for name in NAMES:
        write_text(tmp_path / f"{Path(name).stem}.txt", "0 0.5 0.5 0.1 0.2\n3 .1 .1 .2 .2\n")
    source = open_pairs(tmp_path)
    assert source.captions == []
    assert source.skipped["texts of numbers, no captions"] == 5


def test_img2dataset_files_have_captions_and_no_classes(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        shard = f"{number // 3:05d}"
        stem = f"{number:09d}"
        write_images(tmp_path / shard, [f"{stem}.jpg"])
        write_text(tmp_path / shard / f"{stem}.txt", CAPTIONS[number])
        record = {"key": stem, "caption": CAPTIONS[number], "url": name}
        write_text(tmp_path / shard / f"{stem}.json", json.dumps(record))
        write_text(tmp_path / f"{shard}_stats.json", "{}")
        (tmp_path / f"{shard}.parquet").write_bytes(b"not read")
    source = open_pairs(tmp_path)
    assert source.captions == list(CAPTIONS)
    assert {pair.label for pair in source} == {""}
    assert source.skipped == {"files .json": 2, "files .parquet": 2}
    urls = open_pairs(tmp_path, OpenSpec(caption_column="url", key_column="key"))
    assert captions_by_key(urls)["000000004"] == ("e.png",)
    assert urls.media.exists("000000004")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("CLS-LOC/train/n01/a.png", "CLS-LOC/train/n02/b.png", "CLS-LOC/val/c.png"),
            [("train", "n01"), ("train", "n02"), ("val", "")],
        ),
        (
            ("train/n01/images/a.png", "train/n02/images/b.png", "val/images/c.png"),
            [("train", "n01"), ("train", "n02"), ("val", "")],
        ),
        (
            ("101_Categories/cat/a.png", "101_Categories/dog/b.png", "101_Categories/dog/c.png"),
            [("", "cat"), ("", "dog"), ("", "dog")],
        ),
        (
            ("bottle/test/good/a.png", "bottle/train/bad/b.png", "cable/train/good/c.png"),
            [("test", "bottle"), ("train", "bottle"), ("train", "cable")],
        ),
        (
            ("dev/cat/a.png", "train/cat/b.png", "validation/dog/c.png"),
            [("dev", "cat"), ("train", "cat"), ("val", "dog")],
        ),
        (
            ("train2014/a.png", "train2017/b.png", "val2017/c.png"),
            [("train", ""), ("train", ""), ("val", "")],
        ),
        (
            ("test/a.png", "testing/b.png", "train/c.png"),
            [("test", ""), ("testing", ""), ("train", "")],
        ),
    ],
)
def test_deep_folders_say_split_and_class(
    names: tuple[str, ...],
    expected: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    source = open_pairs(write_images(tmp_path, names))
    assert [(pair.split, pair.label) for pair in source] == expected


def test_images_are_known_by_their_content_where_they_have_no_ending(tmp_path: Path) -> None:
    (tmp_path / "blob1").write_bytes(image_bytes(0))
    (tmp_path / "LICENSE").write_text("text")
    for suffix in (".jfif", ".jpe", ".JPEG", ".webp"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "WEBP" if suffix == ".webp" else "JPEG")
        (tmp_path / f"x{suffix}").write_bytes(buffer.getvalue())
    source = open_pairs(tmp_path)
    assert source.keys == ["blob1", "x.JPEG", "x.jfif", "x.jpe", "x.webp"]
    assert source.skipped == {"files without an ending": 1}


def test_images_that_metadata_does_not_name_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_images(tmp_path / ".hidden")
    write_table(tmp_path / "metadata.csv", ["file_name", "text"], [["a.png", "x"]])
    source = open_pairs(tmp_path)
    assert source.keys == ["a.png"]
    assert source.skipped == {
        "images that the table does not name": 4,
        "hidden files and folders": 1,
    }


# --- links ----------------------------------------------------------------------------------------


def hub_snapshot(folder: Path) -> Path:
    """A snapshot as huggingface_hub keeps it: every file is a link into `blobs`."""
    blobs = folder / "datasets--x--y" / "blobs"
    snapshot = folder / "datasets--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "train").mkdir(parents=True)
    metadata = "file_name,text\n" + "".join(f"{name},of {name}\n" for name in NAMES)
    for number, name in enumerate((*NAMES, "metadata.csv")):
        data = metadata.encode() if name == "metadata.csv" else image_bytes(number)
        (blobs / f"h{number}").write_bytes(data)
        (snapshot / "train" / name).symlink_to(f"../../../blobs/h{number}")
    return snapshot


@pytest.mark.parametrize("below", [".", "train"])
def test_a_snapshot_of_a_hub_is_read(below: str, tmp_path: Path) -> None:
    source = open_pairs(hub_snapshot(tmp_path) / below)
    assert source.captions == [f"of {name}" for name in NAMES]
    assert [source.media.read(key) for key in source.keys] == [*map(image_bytes, range(5))]


def test_a_text_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path / "given", ["a.png", "b.png"])
    write_text(tmp_path / "secret", "a secret")
    write_text(tmp_path / "given" / "b.txt", "a cat")
    (tmp_path / "given" / "a.txt").symlink_to(tmp_path / "secret")
    source = open_pairs(tmp_path / "given")
    assert source.captions == ["a cat"]
    (reason,) = set(source.skipped) - {"rows without a caption"}
    assert "--allow-root" in reason
    allowed = open_pairs(tmp_path / "given", OpenSpec(allow_root=(tmp_path,)))
    assert allowed.captions == ["a secret", "a cat"]


def test_a_table_beside_a_folder_of_images_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "Images")
    write_text(tmp_path / "LICENSE.txt", "Do what you like.\n")
    assert open_pairs(tmp_path).skipped == {"files .txt": 1}
    write_text(tmp_path / "captions.txt", "image,caption\na.png,x\n")
    with pytest.raises(ManifestError, match=r"captions\.txt\) beside them; give .*captions\.txt"):
        open_pairs(tmp_path)
    source = open_pairs(tmp_path / "captions.txt", OpenSpec(root=tmp_path / "Images"))
    assert source.media.read("a.png") == image_bytes(0)


def test_links_lead_out_of_the_folder_only_where_it_is_allowed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere" / "cat")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.png").symlink_to(tmp_path / "elsewhere" / "cat" / "a.png")
    source = open_pairs(tmp_path / "given")
    with pytest.raises(RowError, match=r"^outside-root: .*--allow-root"):
        source.media.read("a.png")
    allowed = OpenSpec(allow_root=(tmp_path / "elsewhere",))
    assert open_pairs(tmp_path / "given", allowed).media.read("a.png") == image_bytes(0)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked")
    write_images(tmp_path / "linked" / "dog", ["z.png"])
    assert open_pairs(tmp_path / "linked").skipped == {
        "links to folders outside (allow them with --allow-root)": 1,
        "links to folders that are read anyway": 1,
    }
    opened = open_pairs(tmp_path / "linked", allowed)
    assert [pair.label for pair in opened] == ["cat"] * 5 + ["dog"]
    assert opened.media.read("cat/b.png") == image_bytes(1)


# --- tars -----------------------------------------------------------------------------------------


def retrieval_tars(folder: Path) -> Path:
    """The layout of clip_benchmark's webdataset_builder for retrieval."""
    members: dict[str, bytes] = {}
    for number in range(3):
        members[f"s{number:07d}.webp"] = image_bytes(number)
        members[f"s{number:07d}.txt"] = f"one {number}\ntwo {number}\nthree {number}".encode()
    write_tar(folder / "test" / "0.tar", members)
    write_text(folder / "test" / "nshards.txt", "1\n")
    write_text(folder / "dataset_type.txt", "retrieval\n")
    return folder


@pytest.mark.parametrize("below", [".", "test", "test/0.tar", "test/{0..0}.tar", "test/*.tar"])
def test_lines_are_captions_where_clip_benchmark_says_so(below: str, tmp_path: Path) -> None:
    source = open_pairs(str(retrieval_tars(tmp_path) / below))
    assert [pair.captions for pair in source] == [
        (f"one {number}", f"two {number}", f"three {number}") for number in range(3)
    ]


def test_lines_are_one_caption_elsewhere_unless_they_are_asked_for(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": image_bytes(0), "a.txt": b"one\n\ntwo\n"})
    source = open_pairs(tar)
    assert source.captions == ["one\n\ntwo"]
    (reason,) = source.skipped
    assert "--caption-lines" in reason
    assert open_pairs(tar, OpenSpec(caption_lines=True)).captions == ["one", "two"]


def test_class_numbers_have_the_names_of_clip_benchmark(tmp_path: Path) -> None:
    write_tar(tmp_path / "test" / "0.tar", {"a.png": image_bytes(0), "a.cls": b"1"})
    write_text(tmp_path / "classnames.txt", "cat\ndog\n")
    assert [pair.label for pair in open_pairs(tmp_path)] == ["dog"]


def test_tars_in_split_folders_have_their_split_and_keys_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / split / "00000.tar", samples([0, 1]))
    source = open_pairs(tmp_path)
    assert source.keys == ["train/00000/a", "train/00000/b", "val/00000/a", "val/00000/b"]
    assert [pair.split for pair in source] == ["train", "train", "val", "val"]


def test_a_dot_in_a_name_follows_webdatasets_rule_and_nothing_is_lost(tmp_path: Path) -> None:
    members = {
        "photo v1.5.jpg": image_bytes(0),
        "photo v1.5.txt": b"a photo",
        "b.left.jpg": image_bytes(1),
        "b.right.jpg": image_bytes(2),
        "c.jpg": image_bytes(3),
        "c.mask.png": image_bytes(4),
        "d.npy": b"x",
        "plain": b"x",
    }
    source = open_pairs(write_tar(tmp_path / "x.tar", members))
    assert source.keys == ["photo v1", "b", "c"]
    assert source.captions == ["a photo"]
    assert source.media.read("photo v1") == image_bytes(0)
    assert source.media.read("c") == image_bytes(3)
    assert not source.media.exists("b")
    assert source.skipped == {
        "rows without a caption": 2,
        "members .npy": 1,
        "members without an ending": 1,
        "samples of several images, none of them KEY.jpg or the like (name --image-ext)": 1,
        "further images .mask.png": 1,
    }
    right = open_pairs(tmp_path / "x.tar", OpenSpec(image_ext="right.jpg"))
    assert right.media.read("b") == image_bytes(2)


@given(name=st.text(st.sampled_from("ab./ é"), min_size=1, max_size=9))
def test_members_are_split_as_webdataset_splits_them(name: str) -> None:
    iterators = pytest.importorskip("webdataset.tariterators")
    key, ending = iterators.base_plus_ext(name)
    if key:
        assert split_name(name) == (key, ending.lower())


def test_the_endings_of_image_and_caption_can_be_named(tmp_path: Path) -> None:
    members = {
        "k.input.jpg": image_bytes(0),
        "k.output.jpg": image_bytes(1),
        "k.prompt.txt": b"the prompt",
        "k.txt": b"another",
    }
    tar = write_tar(tmp_path / "x.tar", members)
    spec = OpenSpec(image_ext="output.jpg", caption_ext="prompt.txt")
    source = open_pairs(tar, spec)
    assert source.captions == ["the prompt"]
    assert source.media.read("k") == image_bytes(1)


# --- Parquet and data sets ------------------------------------------------------------------------


def parquet_parts(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
    (folder / "data").mkdir()
    for number, name in enumerate(names):
        columns = {"image": structs([None]), "text": [f"caption {number}"]}
        write_parquet(folder / "data" / f"{name}.parquet", columns, image=struct_type())
    write_text(folder / "README.md", "a card")
    return folder


@pytest.mark.parametrize("form", ["{}", "{}/data", "{}/data/*.parquet", "hf-datasets:{}"])
def test_parts_of_a_hubs_download_are_one_table(form: str, tmp_path: Path) -> None:
    source = open_pairs(form.format(parquet_parts(tmp_path)))
    assert source.captions == ["caption 0", "caption 1", "caption 2"]
    assert [pair.split for pair in source] == ["train", "train", "val"]
    assert source.keys[0] == "train-00000-of-00002/0"
    assert [source.media.read(key) for key in source.keys] == [image_bytes(0)] * 3
    assert all(size == len(image_bytes(0)) for size in source.media.sizes(source.keys))


def test_img2datasets_parquet_has_its_images_in_a_column_of_their_format(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for shard in range(2):
        columns = {
            "key": [f"{shard}{row}" for row in range(2)],
            "caption": [f"caption {shard}{row}" for row in range(2)],
            "url": ["http://x"] * 2,
            "jpg": [image_bytes(row) for row in range(2)],
        }
        write_parquet(tmp_path / f"{shard:05d}.parquet", columns, jpg=pa.binary())
        write_text(tmp_path / f"{shard:05d}_stats.json", "{}")
    source = open_pairs(tmp_path, OpenSpec(key_column="key"))
    assert source.keys == ["00", "01", "10", "11"]
    assert source.media.read("11") == image_bytes(1)
    assert source.fields.image == "jpg"
    assert source.skipped == {"files .json": 2}


@pytest.mark.parametrize("kind", ["structs", "bytes", "lists of structs", "lists of bytes"])
@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_every_column_of_images_is_read(kind: str, saved: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {
        "structs": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "bytes": datasets.Value("binary"),
        "lists of structs": datasets.List(datasets.Image()),
        "lists of bytes": datasets.List(datasets.Value("binary")),
    }
    one: Any = [image_bytes(row) for row in range(3)]
    if "structs" in kind:
        one = [{"bytes": data, "path": None} for data in one]
    if "lists" in kind:
        one = [[one[0], one[1]], [one[1]], []]
    dataset = datasets.Dataset.from_dict(
        {"pictures": one, "text": ["x", "y", "z"]},
        features=datasets.Features({"pictures": features[kind], "text": datasets.Value("string")}),
    )
    if saved == "parquet":
        dataset.to_parquet(tmp_path / "t.parquet")
        source = open_pairs(tmp_path / "t.parquet")
    else:
        dataset.save_to_disk(tmp_path / "saved")
        source = open_pairs(f"hf-datasets:{tmp_path / 'saved'}")
    assert source.captions == ["x", "y", "z"]
    assert source.media.read("0") == image_bytes(0)
    assert source.media.read("1") == image_bytes(1)
    if "lists" in kind:
        assert source.skipped == {"further images of a row": 1}
        with pytest.raises(RowError, match="missing"):
            source.media.read("2")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("validation", "dev"), ["val", "dev"]),
        (("test", "testing"), ["test", "testing"]),
        (("valid", "val"), ["valid", "val"]),
        (("train", "training", "dev"), ["train", "training", "val"]),
    ],
)
def test_splits_that_mean_the_same_stay_apart(
    names: tuple[str, ...],
    splits: list[str],
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    parts = {}
    for number, name in enumerate(names):
        image = {"bytes": image_bytes(number), "path": None}
        columns = {"image": [image], "text": [f"of {name}"]}
        parts[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for source in (
        open_pairs(f"hf-datasets:{tmp_path / 'saved'}"),
        open_pairs(datasets.DatasetDict(parts)),
    ):
        assert [pair.split for pair in source] == splits
        assert source.captions == [f"of {name}" for name in names]
        contents = [source.media.read(key) for key in source.keys]
        assert contents == [image_bytes(number) for number in range(len(names))]


@pytest.mark.parametrize("column", ["fine_label", "kind", "coarse"])
def test_the_names_of_classes_are_labels_or_captions(column: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"img": datasets.Image(), column: datasets.ClassLabel(names=["cat", "dog"])}
    images = [{"bytes": image_bytes(row), "path": None} for row in range(3)]
    dataset = datasets.Dataset.from_dict(
        {"img": images, column: [0, 1, -1]},
        features=datasets.Features(features),
    )
    dataset.to_parquet(tmp_path / "t.parquet")
    for source in (open_pairs(dataset), open_pairs(tmp_path / "t.parquet")):
        assert [pair.label for pair in source] == ["cat", "dog", ""]
    named = open_pairs(dataset, OpenSpec(caption_column=column))
    assert named.captions == ["cat", "dog"]


def test_two_columns_of_classes_need_a_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"img": datasets.Image(), "a": classes, "b": classes})
    image = {"bytes": image_bytes(0), "path": None}
    dataset = datasets.Dataset.from_dict({"img": [image], "a": [0], "b": [1]}, features=features)
    assert [pair.label for pair in open_pairs(dataset)] == [""]
    assert [pair.label for pair in open_pairs(dataset, OpenSpec(label_column="b"))] == ["dog"]
    with pytest.raises(ManifestError, match="--label-column"):
        open_pairs(dataset, OpenSpec(require=("label",)))


# --- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_a_frame_in_memory_is_a_source(library: str, tmp_path: Path) -> None:
    module = pytest.importorskip(library)
    columns = {"image": ["a.png", "b.png"], "caption": ["x", None], "label": [1, 2]}
    frame = module.table(columns) if library == "pyarrow" else module.DataFrame(columns)
    write_images(tmp_path)
    source = open_pairs(frame, OpenSpec(root=tmp_path))
    assert captions_by_key(source) == {"a.png": ("x",), "b.png": ()}
    assert [pair.label for pair in source] == ["1", "2"]
    assert source.media.read("b.png") == image_bytes(1)
    columns["image"] = [image_bytes(0), image_bytes(1)]  # type: ignore[list-item]
    frame = module.table(columns) if library == "pyarrow" else module.DataFrame(columns)
    source = open_pairs(frame)
    assert [source.media.read(key) for key in source.keys] == [image_bytes(0), image_bytes(1)]


# --- all writers ----------------------------------------------------------------------------------

WORD = st.text(st.sampled_from("ab\"',;|\té漢 "), min_size=1, max_size=8).filter(str.strip)
CAPTION = st.one_of(WORD, st.just(NAN))


@st.composite
def frames(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of images with captions, which may be missing, and splits."""
    records = []
    for number in range(draw(st.integers(1, 5))):
        split = draw(st.sampled_from(["train", "val"]))
        for _ in range(draw(st.integers(1, 3))):
            caption = draw(CAPTION)
            records.append({"image": f"{number}.png", "caption": caption, "split": split})
    return records


def none_for_nan(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: None if value != value else value for name, value in record.items()}
        for record in records
    ]


def by_pandas(records: list[dict[str, Any]], path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(records)
    match path.suffix:
        case ".csv" | ".tsv":
            frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".json":
            frame.to_json(path, orient="records")
        case _:
            frame.to_parquet(path)


def by_csv(records: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        writer = csv.DictWriter(file, list(records[0]), dialect=dialect)
        writer.writeheader()
        writer.writerows(none_for_nan(records))


def by_json(records: list[dict[str, Any]], path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def by_pyarrow(records: list[dict[str, Any]], path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    schema = pa.schema([(name, pa.string()) for name in records[0]])
    table = pa.Table.from_pylist(none_for_nan(records), schema=schema)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        arrow_csv.write_csv(table, path, arrow_csv.WriteOptions(delimiter=delimiter))


WRITERS = [
    *((by_pandas, suffix) for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")),
    *((by_csv, suffix) for suffix in (".csv", ".tsv")),
    *((by_json, suffix) for suffix in (".jsonl", ".json")),
    *((by_pyarrow, suffix) for suffix in (".csv", ".tsv", ".parquet")),
]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=frames())
def test_all_writers_give_the_same_pairs(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    expected: dict[str, list[str]] = {}
    for record in records:
        captions = expected.setdefault(record["image"], [])
        captions += [record["caption"]] if record["caption"] == record["caption"] else []
    for write, suffix in WRITERS:
        path = tmp_path / f"{write.__name__}{suffix}"
        write(records, path)
        source = open_pairs(path)
        found = {pair.key: list(pair.captions) for pair in source}
        assert found == expected, (write.__name__, suffix, path.read_bytes()[:300])
        splits = {record["image"]: record["split"] for record in records}
        assert {pair.key: pair.split for pair in source} == splits
        os.unlink(path)
