"""Images of a store are read again from the source that it recorded, of every kind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import (
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

from apecache.data.media import NoMedia
from apecache.data.pairs import PairSource
from apecache.data.recorded import (
    RecordedImages,
    options_to_record,
    recorded_column,
    recorded_media,
)
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec, recorded_options, spec_of_options
from apecache.errors import ManifestError, OptionError


def record_of(source: PairSource) -> dict[str, Any]:
    """The fields of a store's source record, after a round trip through JSON."""
    options = options_to_record(source)
    record = {"origin": source.origin, "root": source.media.place, "options": options}
    return dict(json.loads(json.dumps(record)))


def table(folder: Path) -> tuple[str, OpenSpec]:
    write_images(folder)
    write_table(folder / "t.csv", ["image"], [[name] for name in NAMES])
    return "t.csv", OpenSpec()


def table_with_keys(folder: Path) -> tuple[str, OpenSpec]:
    write_images(folder / "images")
    rows = [[f"sku-{name}", name] for name in NAMES]
    write_table(folder / "t.csv", ["sku", "image"], rows)
    return "t.csv", OpenSpec(key_column="sku", root="images")


def tars(folder: Path) -> tuple[str, OpenSpec]:
    write_tar(folder / "tars" / "0.tar", samples([0, 1]))
    write_tar(folder / "tars" / "1.tar", samples([2, 3, 4]))
    return "tars/{0..1}.tar", OpenSpec()


def parquet(folder: Path) -> tuple[str, OpenSpec]:
    pytest.importorskip("pyarrow")
    columns = {"id": list("abcde"), "picture": structs([None] * 5)}
    write_parquet(folder / "t.parquet", columns, picture=struct_type())
    return "t.parquet", OpenSpec(image_column="picture", key_column="id")


def saved_data_set(folder: Path) -> tuple[str, OpenSpec]:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": structs([None] * 5)}, features=features)
    dataset.save_to_disk(folder / "saved")
    return "hf-datasets:./saved", OpenSpec()


def links(folder: Path) -> tuple[str, OpenSpec]:
    write_images(folder / "elsewhere")
    (folder / "given").mkdir()
    for name in NAMES:
        (folder / "given" / name).symlink_to(folder / "elsewhere" / name)
    return "given", OpenSpec(allow_root=("elsewhere",))


KINDS = [table, table_with_keys, tars, parquet, saved_data_set, links]


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_of_source_is_found_again(
    make: Callable[[Path], tuple[str, OpenSpec]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    uri, spec = make(tmp_path / "data")
    source = open_pairs(uri, spec)
    expected = [source.media.read(key) for key in source.keys]
    assert expected == [image_bytes(number) for number in range(5)]
    record = record_of(source)
    # A later command may run in another folder.
    monkeypatch.chdir(tmp_path)
    media = recorded_media(record)
    assert [media.read(key) for key in source.keys] == expected


@pytest.mark.parametrize("make", KINDS)
def test_a_source_that_has_moved_is_named_again(
    make: Callable[[Path], tuple[str, OpenSpec]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    uri, spec = make(tmp_path / "data")
    source = open_pairs(uri, spec)
    record = record_of(source)
    monkeypatch.chdir(tmp_path)
    os.rename(tmp_path / "data", tmp_path / "moved")
    images = RecordedImages(record)
    with pytest.raises(OptionError, match=r"needs the images.*--source.*--root"):
        images(source.keys[0])
    monkeypatch.chdir(tmp_path / "moved")
    if make in (table_with_keys, links):
        # Folders that were named by their paths have moved too.
        root = "images" if make is table_with_keys else "elsewhere"
        moved = RecordedImages(record, root=root)
    else:
        moved = RecordedImages(record, source=uri)
    if make is not table_with_keys:
        assert np.asarray(moved(source.keys[3])).any()


def test_the_scale_of_a_source_is_recorded(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.int32)).save(tmp_path / "a.tif")
    spec = OpenSpec(scale=(0.0, 2000.0))
    source = open_pairs(write_table(tmp_path / "t.csv", ["image"], [["a.tif"]]), spec)
    image = RecordedImages(record_of(source))("a.tif")
    assert np.asarray(image).max() == 127
    assert source.digest != open_pairs(tmp_path / "t.csv").digest


def test_tars_with_rules_of_pixels_that_have_moved_are_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, _ = tars(tmp_path)
    source = open_pairs(uri, OpenSpec(max_pixels=10**6))
    record = record_of(source)
    os.rename(tmp_path / "tars", tmp_path / "moved")
    assert recorded_media(record) == NoMedia()
    with pytest.raises(OptionError, match=r"needs the images.*--source.*--root"):
        RecordedImages(record).require()


def test_a_table_of_the_same_name_elsewhere_is_not_read_for_the_recorded_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder, column in (("data", "shop"), ("home", "color")):
        (tmp_path / folder).mkdir()
        write_table(tmp_path / folder / "t.csv", ["image", column], [["a.png", "x"]])
    monkeypatch.chdir(tmp_path / "data")
    record = record_of(open_pairs("t.csv"))
    monkeypatch.chdir(tmp_path / "home")
    assert recorded_column(record, "shop") == {"a.png": "x"}
    with pytest.raises(ManifestError, match=r"'color'; columns found: image, shop.*--by"):
        recorded_column(record, "color")
    os.remove(tmp_path / "data" / "t.csv")
    assert recorded_column(record, "color") == {"a.png": "x"}


def test_a_record_of_an_earlier_version_has_only_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert recorded_media({"root": str(tmp_path)}).read("a.png") == image_bytes(0)
    shutil.rmtree(tmp_path)
    assert recorded_media({"root": str(tmp_path)}) == NoMedia()
    assert recorded_media({}) == NoMedia()


def test_options_survive_a_record(tmp_path: Path) -> None:
    spec = OpenSpec(
        caption_column=("a", "b"),
        split_fraction=(("train", 0.9), ("val", 0.1)),
        allow_root=(tmp_path,),
        scale=(0.0, 1.0),
        root="s3://bucket/x",
        caption_lines=True,
    )
    recorded = json.loads(json.dumps(recorded_options(spec)))
    again = spec_of_options({**recorded, "of a later version": 1})
    assert recorded_options(again) == recorded_options(spec)
    assert again.split_fraction == spec.split_fraction
    assert recorded_options(OpenSpec()) == {}
