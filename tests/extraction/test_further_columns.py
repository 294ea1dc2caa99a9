"""Further columns of a table: a view holds them, and every edit keeps them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from inputs import samples, write_tar
from pyarrow import parquet
from tiny import COLORS, SHAPES, draw_shape, tree

from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import parse_encoder
from apecache.errors import ManifestError, OptionError
from apecache.extraction.additions import add_images, delete_images
from apecache.extraction.repair import repair
from apecache.extraction.run import ExtractReport, ExtractSpec, extract
from apecache.storage.local_files import LocalFiles
from apecache.store.export import export_npz, export_parquet
from apecache.store.reader import FeatureStore
from apecache.store.table import stored_name
from apecache.store.verify import verify_store
from apecache.store.view_edits import split_store
from apecache.store.views import view_ids

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """A table of 12 pictures, each with a caption and a split."""
    (tmp_path / "images").mkdir()
    rows = ["image\tcaption\tsplit"]
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        key = f"images/{color}-{shape}.png"
        draw_shape(color, shape, 48).save(tmp_path / key)
        rows.append(f"{key}\ta {color} {shape}\t{'val' if number % 3 == 2 else 'train'}")
    return write_rows(tmp_path / "table.tsv", rows)


def write_rows(table: Path, rows: list[str]) -> Path:
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


def colored(products: Path, value: Callable[[str], str]) -> Path:
    """Write the table of products anew, with a column `color`."""
    header, *lines = products.read_text(encoding="utf-8").splitlines()
    if "color" in header:
        lines = [line.rpartition("\t")[0] for line in lines]
    rows = [f"{line}\t{value(line)}" for line in lines]
    return write_rows(products, ["image\tcaption\tsplit\tcolor", *rows])


def color_of(line: str) -> str:
    return line.split("/")[1].split("-")[0]


def extract_colored(table: Path, store: Path, encoder: Path, *columns: str) -> ExtractReport:
    spec = ExtractSpec(
        image=parse_encoder(f"timm:{encoder}", "image"),
        image_batch=4,
        shard_rows=5,
        device="cpu",
    )
    return extract(open_pairs(table, OpenSpec(columns=columns)), store, spec)


@pytest.fixture
def colored_store(products: Path, tiny_image_encoder: Path, tmp_path: Path) -> Path:
    """A store of the table with colors, whose view holds them."""
    table = colored(products, color_of)
    extract_colored(table, tmp_path / "store", tiny_image_encoder, "color")
    return tmp_path / "store"


def colors_of(store: Path, view: str | None = None) -> dict[str, str]:
    pairs = FeatureStore.open(store, view).pairs
    values = pairs.columns["color"].tolist()
    return dict(zip(pairs.keys.tolist(), values, strict=True))


def test_a_view_keeps_columns_of_its_table_when_the_table_is_gone(
    colored_store: Path,
    products: Path,
) -> None:
    store = colored_store
    products.unlink()
    expected = {key: color_of(key) for key in FeatureStore.open(store).pairs.keys}
    assert colors_of(store) == expected
    record = split_store(store, {"train": 0.5, "val": 0.5}, by="color")
    assert record.columns == ("color",)
    pairs = FeatureStore.open(store).pairs
    splits_of_color: dict[str, set[str]] = {}
    for color, split in zip(pairs.columns["color"], pairs.splits, strict=True):
        splits_of_color.setdefault(color, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_color.values())
    delete_images(store, where=[("color", "red")])
    assert "red" not in colors_of(store).values()
    with pytest.raises(OptionError, match=r"colour.*color.*extract --column"):
        delete_images(store, where=[("colour", "red")])


def test_a_table_without_new_values_changes_nothing_and_a_new_value_is_a_new_view(
    colored_store: Path,
    products: Path,
    tiny_image_encoder: Path,
) -> None:
    store = colored_store
    table = products
    before = tree(store)
    # The columns of the newest view are kept without being named again.
    for columns in (("color",), ()):
        report = extract_colored(table, store, tiny_image_encoder, *columns)
        assert report.nothing_to_do
        assert tree(store) == before
    colored(products, lambda line: color_of(line).upper())
    report = extract_colored(table, store, tiny_image_encoder)
    assert sum(array.n_encoded for array in report.arrays) == 0
    ids = view_ids(LocalFiles(store))
    assert len(ids) == 2
    assert set(colors_of(store).values()) == {color.upper() for color in COLORS}
    assert set(colors_of(store, ids[0]).values()) == set(COLORS)
    colored(products, lambda line: "other")
    extract_colored(table, store, tiny_image_encoder)
    ids = view_ids(LocalFiles(store))
    # Each table has an identity of its own, which runs record.
    digests = {FeatureStore.open(store, view_id).digest for view_id in ids}
    assert len(digests) == 3
    # A table that was extracted before has its identity again.
    colored(products, lambda line: color_of(line).upper())
    extract_colored(table, store, tiny_image_encoder)
    assert FeatureStore.open(store).digest == FeatureStore.open(store, ids[1]).digest


def test_columns_stay_when_the_table_lacks_them_and_when_images_are_added(
    colored_store: Path,
    products: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    store = colored_store
    lines = products.read_text(encoding="utf-8").splitlines()
    known = colors_of(store)
    draw_shape("red", "circle", 90).save(tmp_path / "images" / "new.png")
    # What the table says meanwhile is not read: an edit of a view changes nothing else.
    colored(products, lambda line: "other")
    add_images(store, [tmp_path / "images" / "new.png"], split="train", device="cpu")
    assert colors_of(store) == {**known, "images/new.png": ""}
    draw_shape("red", "circle", 91).save(tmp_path / "images" / "newer.png")
    newer = tmp_path / "images" / "newer.png"
    add_images(store, [newer], split="train", columns={"color": "red"}, device="cpu")
    assert colors_of(store) == {**known, "images/new.png": "", "images/newer.png": "red"}
    unknown = shutil.copy(newer, newer.with_name("newest.png"))
    with pytest.raises(OptionError, match=r"no column 'colour'; found: color"):
        add_images(store, [unknown], columns={"colour": "red"}, device="cpu")
    # The table is written without the column.
    write_rows(products, [line.rpartition("\t")[0] for line in lines])
    extract_colored(products, store, tiny_image_encoder)
    assert colors_of(store) == known


def test_a_store_gets_columns_without_encoding_anything(
    products: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    table = colored(products, color_of)
    extract_colored(table, store, tiny_image_encoder)
    assert not FeatureStore.open(store).pairs.columns
    before = FeatureStore.open(store).array("image").load()
    report = extract_colored(table, store, tiny_image_encoder, "color")
    assert sum(array.n_encoded for array in report.arrays) == 0
    assert set(colors_of(store).values()) == set(COLORS)
    assert np.array_equal(FeatureStore.open(store).array("image").load(), before)


def test_lost_columns_are_mended_from_the_table(
    colored_store: Path,
    products: Path,
) -> None:
    store = colored_store
    before = tree(store)
    last = view_ids(LocalFiles(store))[-1]
    shutil.rmtree(store / "views" / last / "image_column_color")
    assert verify_store(store).problems
    repair(store, open_pairs(products, OpenSpec()))
    assert tree(store) == before


def test_plain_files_and_plain_zarr_have_the_columns(
    colored_store: Path,
    tmp_path: Path,
) -> None:
    store = colored_store
    opened = FeatureStore.open(store)
    colors = opened.pairs.columns["color"].tolist()
    export_npz(opened, tmp_path / "plain.npz")
    assert np.load(tmp_path / "plain.npz")["image_column_color"].tolist() == colors
    export_parquet(opened, tmp_path / "plain")
    table = parquet.read_table(tmp_path / "plain" / "images.parquet")
    assert table.column("column_color").to_pylist() == colors
    last = view_ids(LocalFiles(store))[-1]
    view = zarr.open_group(str(store / "views" / last), mode="r")
    assert list(view["image_column_color"][:]) == colors


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        ("split", OptionError, "a meaning of its own"),
        ("label", OptionError, "a meaning of its own"),
        ("a=b", OptionError, "without ="),
        ("a\nb", OptionError, "printable"),
        ("", OptionError, "printable"),
        ("x" * 201, OptionError, "too long"),
        # Nine characters each in the name of a folder.
        ("名" * 23, OptionError, "too long"),
        ("colour", ManifestError, "--column"),
    ],
)
def test_columns_that_no_store_can_hold_are_refused(
    products: Path,
    column: str,
    error: type[Exception],
    message: str,
) -> None:
    table = colored(products, color_of)
    with pytest.raises(error, match=message):
        open_pairs(table, OpenSpec(columns=(column,)))


def test_an_image_with_two_values_of_a_column_is_refused(products: Path) -> None:
    lines = colored(products, color_of).read_text(encoding="utf-8").splitlines()
    twice = lines[1].replace("\ta ", "\tanother ").rpartition("\t")[0] + "\tgreen-ish"
    table = write_rows(products, [*lines, twice])
    with pytest.raises(ManifestError, match=r"has color 'green-ish' here.*give one color per"):
        open_pairs(table, OpenSpec(columns="color"))


@pytest.mark.parametrize("name", ["Größe (cm)", "a/b", "..", "100%", "x" * 200, "名" * 22])
def test_any_printable_name_is_kept(
    products: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
    name: str,
) -> None:
    table = colored(products, color_of)
    text = table.read_text(encoding="utf-8").replace("\tcolor\n", f"\t{name}\n", 1)
    table.write_text(text, encoding="utf-8")
    extract_colored(table, tmp_path / "store", tiny_image_encoder, name)
    columns = FeatureStore.open(tmp_path / "store").pairs.columns
    assert list(columns) == [name]
    last = view_ids(LocalFiles(tmp_path / "store"))[-1]
    view = zarr.open_group(str(tmp_path / "store" / "views" / last), mode="r")
    # A column of any name lies beside the others.
    assert "/" not in stored_name(name)
    assert set(view[stored_name(name)][:]) == set(COLORS)
    assert set(columns[name]) == set(COLORS)
    assert not verify_store(tmp_path / "store").problems


def test_a_source_without_columns_leaves_those_of_the_view_as_they_are(
    colored_store: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    store = colored_store
    extract_colored(tmp_path / "images", store, tiny_image_encoder)
    pairs = FeatureStore.open(store).pairs
    assert list(pairs.columns) == ["color"]
    # The names of the images are others in the folder.
    assert set(pairs.columns["color"]) == {""}
    with pytest.raises(OptionError, match="--column says nothing about this kind of source"):
        open_pairs(tmp_path / "images", OpenSpec(columns=("color",)))


def test_a_kept_column_that_cannot_be_read_is_no_reason_to_keep_old_values(
    colored_store: Path,
    products: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    store = colored_store
    table = products
    lines = table.read_text(encoding="utf-8").splitlines()
    twice = lines[1].replace("\ta ", "\tanother ").rpartition("\t")[0] + "\tgreen-ish"
    write_rows(table, [*lines, twice])
    with pytest.raises(ManifestError, match=r"keeps column 'color'.*has color 'green-ish' here"):
        extract_colored(table, store, tiny_image_encoder)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(colored(products, lambda line: "new"), sep="\t")
    spec = ExtractSpec(image=parse_encoder(f"timm:{tiny_image_encoder}", "image"), device="cpu")
    opened = open_pairs(frame, OpenSpec(root=tmp_path))
    with pytest.raises(ManifestError, match=r"keeps column 'color'.*OpenSpec\(columns"):
        extract(opened, store, spec)
    extract(open_pairs(frame, OpenSpec(root=tmp_path, columns="color")), store, spec)
    assert set(colors_of(store).values()) == {"new"}


def test_a_kept_column_is_read_again_from_the_json_of_a_tar(
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    for color in ("red", "blue"):
        members = samples()
        for name in list(members):
            if name.endswith(".png"):
                fields = json.dumps({"color": color}).encode()
                members[name.replace(".png", ".json")] = fields
        columns = ("color",) if color == "red" else ()
        tar = write_tar(tmp_path / "shard.tar", members)
        extract_colored(tar, tmp_path / "store", tiny_image_encoder, *columns)
        assert set(colors_of(tmp_path / "store").values()) == {color}


def test_the_order_of_columns_is_no_change(
    products: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    table = colored(products, color_of)
    lines = table.read_text(encoding="utf-8").splitlines()
    write_rows(table, [f"{line}\t{'size' if line == lines[0] else 'big'}" for line in lines])
    extract_colored(table, store, tiny_image_encoder, "color", "size")
    before = tree(store)
    extract_colored(table, store, tiny_image_encoder, "size", "color")
    assert tree(store) == before


@pytest.mark.parametrize("columns", [5, [5], ("color", None)])
def test_columns_that_are_no_texts_are_named(products: Path, columns: Any) -> None:
    with pytest.raises(OptionError, match="columns"):
        open_pairs(colored(products, color_of), OpenSpec(columns=columns))


def test_a_column_of_truth_values_is_named(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"image": "a.png", "caption": "a", "new": true}\n', encoding="utf-8")
    with pytest.raises(ManifestError, match="new is a bool"):
        open_pairs(table, OpenSpec(columns="new"))
