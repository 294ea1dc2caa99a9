"""Parquet: what becomes a key, which images are there, and what is read of a file at all."""

import sys
from pathlib import Path
from typing import Any

import pytest
from inputs import CAPTIONS, NAMES, image_bytes, struct_type, structs, write_images, write_parquet

from apecache.data import parquet as parquet_module
from apecache.data import row_groups
from apecache.data.media import FolderMedia
from apecache.data.sources import open_pairs
from apecache.errors import ManifestError, MissingExtraError, RowError

pa = pytest.importorskip("pyarrow")


def table(folder: Path, images: list[Any], group: int = 2, **columns: Any) -> Path:
    return write_parquet(
        folder / "t.parquet",
        {"image": images, **columns},
        group,
        image=struct_type(),
    )


def test_captions_of_one_image_in_several_rows_are_joined(tmp_path: Path) -> None:
    source = open_pairs(table(tmp_path, [structs()[0]] * 3 + [structs()[1]], caption=CAPTIONS[:4]))
    assert (source.keys, source.image_rows) == (["a.png", "b.png"], [0, 0, 0, 1])


@pytest.mark.parametrize("paths", [["x.png"] * 5, [None, *NAMES[1:]], ["", *NAMES[1:]]])
def test_paths_that_do_not_name_the_images_give_way_to_row_numbers(
    paths: list[str | None],
    tmp_path: Path,
) -> None:
    source = open_pairs(table(tmp_path, structs(paths), caption=CAPTIONS))
    assert source.keys == ["0", "1", "2", "3", "4"]
    assert [source.media.read(key) for key in source.keys] == [image_bytes(row) for row in range(5)]


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_a_column_of_bytes_alone(kind: str, tmp_path: Path) -> None:
    images = [image_bytes(0), None, image_bytes(2)]
    source = open_pairs(
        write_parquet(tmp_path / "t.parquet", {"image": images}, 2, image=getattr(pa, kind)())
    )
    assert source.keys == ["0", "1", "2"]
    assert source.media.read("2") == image_bytes(2)
    with pytest.raises(RowError, match=r"^missing: 1: its row has no image"):
        source.media.read("1")


def test_rows_without_an_image_stay_and_are_bad_rows(tmp_path: Path) -> None:
    images = structs()
    images[1] = {"bytes": None, "path": "b.png"}
    images[2] = {"bytes": b"", "path": "c.png"}
    source = open_pairs(table(tmp_path, images))
    assert source.keys == list(NAMES)
    for key, reason in (("b.png", "missing"), ("c.png", "empty")):
        with pytest.raises(RowError) as caught:
            source.media.read(key)
        assert caught.value.reason == reason


def test_structs_with_paths_only_are_files(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = open_pairs(table(tmp_path, [{"bytes": None, "path": name} for name in NAMES]))
    assert isinstance(source.media, FolderMedia)
    assert source.media.read("b.png") == image_bytes(1)


def test_class_labels_of_hugging_face_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    columns = {"image": structs(), "label": [0, 1, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "t.parquet")
    assert [pair.label for pair in open_pairs(tmp_path / "t.parquet")] == [
        "cat",
        "dog",
        "dog",
        "cat",
        "dog",
    ]


def test_images_are_not_read_to_open_a_table_and_few_groups_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    original = row_groups._read_group
    monkeypatch.setattr(
        row_groups,
        "_read_group",
        lambda path, group, column: read.append(group) or original(path, group, column),
    )
    source = open_pairs(table(tmp_path, structs()))
    assert read == []
    for key in source.keys * 2:
        source.media.read(key)
    assert read == [0, 1, 2] * 2
    assert len(source.media.groups._kept) == 2  # type: ignore[attr-defined]


def test_a_row_group_too_large_to_decode_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_module, "MAX_GROUP_BYTES", 100)
    with pytest.raises(
        ManifestError,
        match=r"row group 0 holds .* GB; write the table with smaller ones",
    ):
        open_pairs(table(tmp_path, structs()))


@pytest.mark.parametrize(
    ("images", "kind"),
    [([1, 2], pa.int64()), ([{"a": 1}], pa.struct([("a", pa.int64())]))],
)
def test_a_column_that_holds_no_images_is_refused(
    images: list[Any],
    kind: Any,
    tmp_path: Path,
) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"image": images}, image=kind)
    with pytest.raises(
        ManifestError,
        match=r"column 'image' is .*; expected paths of images, their bytes",
    ):
        open_pairs(path)


def test_damage_inside_a_table_is_a_bad_row_when_it_is_read(tmp_path: Path) -> None:
    path = table(tmp_path, structs())
    source = open_pairs(path)
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(RowError, match=r"^missing: a\.png: .*t\.parquet: "):
        source.media.read("a.png")


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[parquet\]'"):
        open_pairs(tmp_path / "t.parquet")
