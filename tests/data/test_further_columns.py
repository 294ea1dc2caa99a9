"""Further columns have the values of the table, whatever kind of source it is."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inputs import CAPTIONS, LABELS, NAMES, image_bytes, structs, write_images, write_tar

from apecache.data import sources
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError

SHOPS = ("north", "south", "", "north", "west")
SIZES = ("1", "2", "3", "4", "5")
ROWS = [
    {"image": name, "caption": caption, "label": label, "shop": shop, "size": size}
    for name, caption, label, shop, size in zip(NAMES, CAPTIONS, LABELS, SHOPS, SIZES, strict=True)
]


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def csv_table(folder: Path) -> Any:
    return write_csv(write_images(folder) / "table.csv")


def json_lines(folder: Path) -> Any:
    path = write_images(folder) / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def metadata(folder: Path) -> Any:
    rows = [{**row, "file_name": row["image"]} for row in ROWS]
    path = write_images(folder) / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def several_tables(folder: Path) -> Any:
    write_images(folder)
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"part{number}.jsonl").write_text(text, encoding="utf-8")
    return f"{folder}/part*.jsonl"


def parquet_of_paths(folder: Path) -> Any:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), write_images(folder) / "table.parquet")
    return folder / "table.parquet"


def parquet_of_images(folder: Path) -> Any:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "image": image} for row, image in zip(ROWS, structs(), strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return folder / "table.parquet"


def tar_with_classes(folder: Path) -> Any:
    """A tar whose samples have a `.cls`, a `.txt` and a `.json`."""
    members: dict[str, bytes] = {}
    for number, row in enumerate(ROWS):
        key = row["image"].removesuffix(".png")
        members[f"{key}.png"] = image_bytes(number)
        members[f"{key}.txt"] = row["caption"].encode()
        members[f"{key}.cls"] = b"7"
        members[f"{key}.json"] = json.dumps(row).encode()
    return write_tar(folder / "shard.tar", members)


def class_folders(folder: Path) -> Any:
    """Folders of classes, with a `.json` beside each image."""
    names = [f"{label}/{name}" for label, name in zip(LABELS, NAMES, strict=True)]
    write_images(folder, names)
    for name, row in zip(names, ROWS, strict=True):
        (folder / name).with_suffix(".json").write_text(json.dumps(row), encoding="utf-8")
    return folder


def frame(folder: Path) -> Any:
    pandas = pytest.importorskip("pandas")
    write_images(folder)
    return pandas.DataFrame([{**row, "image": str(folder / row["image"])} for row in ROWS])


def data_set(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    columns: dict[str, Any] = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    return datasets.Dataset.from_dict({**columns, "image": structs()}).cast_column(
        "image", datasets.Image()
    )


MADE: list[Callable[[Path], Any]] = [
    csv_table,
    json_lines,
    metadata,
    several_tables,
    parquet_of_paths,
    parquet_of_images,
    tar_with_classes,
    class_folders,
    frame,
    data_set,
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_further_columns_have_the_values_of_the_table(
    made: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    uri = made(tmp_path)
    source = open_pairs(uri, OpenSpec(columns=("shop", "size")))
    assert list(source.columns) == ["shop", "size"]
    # Images in folders of classes are sorted by their paths.
    keys = sorted(source.keys, key=lambda key: key.rpartition("/")[2])
    assert [source.columns["shop"][key] for key in keys] == list(SHOPS)
    assert [source.columns["size"][key] for key in keys] == list(SIZES)
    assert {"shop", "size"} <= set(source.fields.columns)
    assert not {"shop", "size", "json.shop", "json.size"} & set(source.fields.unused)
    # They change nothing else.
    plain = open_pairs(uri)
    assert plain.pairs == source.pairs
    assert not plain.columns
    with pytest.raises(ManifestError, match=r"'shops'.*shop.*--column takes one of them"):
        open_pairs(uri, OpenSpec(columns=("shops",)))


def test_a_source_is_read_once_for_all_columns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []
    read = sources.open_table

    def counted(path: Path, spec: OpenSpec) -> Any:
        opened.append(path)
        return read(path, spec)

    monkeypatch.setattr(sources, "open_table", counted)
    open_pairs(csv_table(tmp_path), OpenSpec(columns=("shop", "size")))
    assert len(opened) == 1
