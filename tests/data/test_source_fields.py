"""What a source says about its columns: which was taken as what, and which were not used."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from tiny import draw_shape

from apecache.data.pairs import SourceFields
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec


def fields(path: str | Path, **options: object) -> SourceFields:
    return open_pairs(path, OpenSpec(**options)).fields  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_names_its_columns_and_the_unused_ones(suffix: str, tmp_path: Path) -> None:
    row = {
        "id": "7",
        "filepath": "a.png",
        "title": "a dog",
        "split": "train",
        "url": "u",
        "label": "x",
        "lang": "en",
    }
    path = tmp_path / f"pairs.{suffix}"
    match suffix:
        case "csv":
            path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
        case "jsonl":
            path.write_text(json.dumps(row) + "\n")
        case _:
            arrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.table({name: [value] for name, value in row.items()}), path)
    taken = fields(path)
    assert str(taken) == (
        "columns: image=filepath, caption=title, split=split, label=label, language=lang; not "
        "used: id, url"
    )
    assert fields(path, image_column="url").unused == ("id", "filepath")


def test_a_column_of_splits_is_not_used_where_shares_are_dealt_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption,split\na.png,a dog,train\n")
    taken = fields(tmp_path / "pairs.csv", split_fraction=(("train", 1.0),))
    assert (taken.split, taken.unused) == ("--split-fraction", ("split",))


def test_folders_of_splits_and_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "circle").mkdir(parents=True)
        draw_shape("red", "circle").save(tmp_path / split / "circle" / "a.png")
    assert fields(tmp_path) == SourceFields(image="file", split="folder", label="folder")


def test_a_folder_with_metadata_takes_splits_from_its_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text,extra\na.png,a dog,1\n")
    draw_shape("red", "circle").save(tmp_path / "train" / "a.png")
    expected = SourceFields(
        image="file_name",
        caption="text",
        split="folder",
        unused=("extra",),
        columns=("file_name", "text", "extra"),
    )
    assert fields(tmp_path) == expected


def test_tars_name_endings_and_fields_of_their_json(tmp_path: Path) -> None:
    described = {"caption": "x", "url": "u", "split": "train"}
    members = {
        "0.jpg": b"x",
        "0.txt": b"a dog",
        "0.cls": b"dog",
        "0.json": json.dumps(described).encode(),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    expected = SourceFields(
        image="jpg",
        caption="txt",
        split="json.split",
        label="cls",
        unused=("json.caption", "json.url"),
        columns=("caption", "url", "split"),
    )
    assert fields(tmp_path / "a.tar") == expected
    assert fields(tmp_path / "a.tar", caption_column="caption").caption == "json.caption"


def test_annotations_and_plain_captions(tmp_path: Path) -> None:
    karpathy = {
        "images": [{"filename": "a", "split": "val", "cocoid": 1, "sentences": [{"raw": "a dog"}]}]
    }
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    assert str(fields(tmp_path / "k.json")) == (
        "columns: image=filename, caption=sentences.raw, split=split; not used: cocoid"
    )
    coco = {
        "images": [{"id": 1, "file_name": "a"}],
        "annotations": [{"image_id": 1, "caption": "a dog"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    assert fields(tmp_path / "c.json") == SourceFields(
        image="file_name",
        caption="annotations.caption",
    )
    (tmp_path / "t.txt").write_text("a dog\n")
    assert fields(tmp_path / "t.txt") == SourceFields(caption="line")


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [draw_shape("red", "circle")], "text": ["a dog"], "license": ["x"]}
    data = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    expected = SourceFields(
        image="picture",
        caption="text",
        split="the data set's own splits",
        unused=("license",),
        columns=("picture", "text", "license"),
    )
    assert fields(f"hf-datasets:{tmp_path / 'saved'}") == expected
