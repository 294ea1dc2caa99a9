"""Looking after a store by commands: info, verify, repair, remove, export, upgrade; and every bad
input's one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apecache_cli.app as cli
import numpy as np
import pytest
import torch
import typer
from tiny import Grown, damaged, draw_shape, loaded_once, put, tree
from typer.testing import CliRunner, Result

import apecache.extraction.run as extraction
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import PAIRS
from apecache.store.reader import FeatureStore
from apecache.store.records import read_record, seal_record

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")

CHUNK = "features.zarr/image/tiny-vit/features/c.1.0"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def call_json(*arguments: object, code: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def error_of(result: Result, code: int) -> str:
    """The error line, after checking that it is one and that the command ended with `code`."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


def hit(store: Path, name: str, how: str = "flip") -> None:
    put(store, damaged(tree(store), name, how))


# info


def test_info_counts_all_segments_and_says_what_could_not_be_read(grown_once: Grown) -> None:
    told = call_json("info", grown_once.store)
    assert (told["n_images"], told["n_texts"], told["segments"]) == (16, 16, 2)
    assert told["splits"] == {"train": 11, "val": 5}
    image, text = told["arrays"]
    assert (image["rows"], image["done"], image["complete"]) == (16, 1.0, True)
    assert image["reasons"] == {"missing": 1, "not-an-image": 1}
    assert (text["quarantined"], text["reasons"]) == (1, {"empty": 1})
    shown = call("info", grown_once.store).stdout
    assert "16 images, 16 captions; images by split: train 11, val 5" in shown
    assert "1 missing, 1 not-an-image" in shown


def test_info_says_how_far_an_array_is_and_whether_it_is_sealed(grown: Grown) -> None:
    (grown.store / "records/image/tiny-vit/seal.json").unlink()
    assert "100%, not sealed" in call("info", grown.store).stdout
    (grown.store / "records/image/tiny-vit/commits/00000002.json").unlink()
    assert "87%" in call("info", grown.store).stdout
    assert call_json("info", grown.store)["arrays"][0]["done"] == 13 / 15


# verify


def test_verify_of_a_sound_store(grown_once: Grown) -> None:
    told = call_json("verify", grown_once.store)
    assert (told["sound"], told["problems"]) == (True, [])
    assert f"sound; {told['n_objects']} objects" in call("verify", grown_once.store).stdout


def test_verify_of_a_damaged_store_names_what_is_damaged_and_ends_with_3(grown: Grown) -> None:
    hit(grown.store, CHUNK)
    (problem,) = call_json("verify", grown.store, code=3)["problems"]
    assert problem["object"] == CHUNK
    assert (problem["kind"], problem["array"], problem["shard"]) == (
        "damaged",
        ["image", "tiny-vit"],
        1,
    )
    result = call("verify", grown.store)
    line = error_of(result, 3)
    assert f"1 object damaged; repair with: apecache repair {grown.store}" in line
    assert CHUNK in result.stdout
    assert "damaged" in result.stdout


def test_verify_lists_harmless_strangers_and_ends_with_0(grown: Grown) -> None:
    put(grown.store, {".tmp-1-ab": b"x", "notes.txt": b"mine", "odd\x1b[31m.txt": b"x"})
    result = call("verify", grown.store)
    assert result.exit_code == 0
    assert "sound" in result.stdout
    assert all(word in result.stdout for word in ("temporary", "foreign", "notes.txt"))
    assert "\x1b[31m" not in result.stdout


# repair


def test_repair_finds_the_table_and_the_encoders_by_itself(grown: Grown) -> None:
    before = tree(grown.store)
    hit(grown.store, CHUNK)
    hit(grown.store, "README.md", "delete")
    told = call_json("repair", grown.store, "--device", "cpu")
    assert told["shards"] == {"image/tiny-vit": [1]}
    assert (told["objects"], told["sound"], told["nothing_to_do"]) == (["README.md"], True, False)
    assert tree(grown.store) == before
    result = call("repair", grown.store)
    assert result.exit_code == 0
    assert "nothing to do" in result.stdout


def test_repair_says_what_it_made_again(grown: Grown) -> None:
    hit(grown.store, CHUNK)
    hit(grown.store, "records/text/tiny-bert/seal.json", "delete")
    hit(grown.store, "records/pairs.json", "empty")
    shown = call("repair", grown.store, "--device", "cpu").stdout
    assert "image/tiny-vit: shards encoded again: 1" in shown
    assert "text/tiny-bert: shards encoded again: none" in shown
    assert "file written again: records/pairs.json" in shown
    assert "sound" in shown


def test_repair_asks_for_the_table_when_the_store_has_forgotten_it(grown: Grown) -> None:
    before = tree(grown.store)
    hit(grown.store, "records/source.json", "delete")
    assert "--pairs SOURCE" in error_of(call("repair", grown.store), 3)
    assert call("repair", grown.store, "--pairs", grown.table).exit_code == 0
    assert tree(grown.store) == before


def test_repair_of_moved_inputs_and_encoders(
    grown: Grown,
    tmp_path: Path,
    tiny_image_encoder: Path,
    other_text_encoder: Path,
) -> None:
    before = tree(grown.store)
    hit(grown.store, CHUNK)
    table = shutil.copytree(grown.table.parent, tmp_path / "moved" / "shapes") / "pairs.tsv"
    image = shutil.copytree(tiny_image_encoder, tmp_path / "moved" / "vit")
    wrong = call("repair", grown.store, "--pairs", table, "--image", f"timm:{image}x")
    assert "no folder" in error_of(wrong, 3)
    assert call("repair", grown.store, "--pairs", table, "--image", f"timm:{image}").exit_code == 0
    assert tree(grown.store) == before
    hit(grown.store, CHUNK.replace("image/tiny-vit", "text/tiny-bert"))
    line = error_of(call("repair", grown.store, "--text", f"hf:{other_text_encoder}"), 4)
    assert "weights" in line


def test_repair_takes_any_table_with_the_images_but_not_for_a_lost_table(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    before = tree(store)
    shapes.write_text(shapes.read_text().replace("a blue circle", "a blue disc"))
    hit(store, CHUNK)
    assert call("repair", store, "--pairs", shapes).exit_code == 0
    assert tree(store) == before
    hit(store, "features.zarr/pairs/text_caption/c/0")
    damaged_files = tree(store)
    line = error_of(call("repair", store, "--pairs", shapes), 4)
    assert "is not the table that it was made from" in line
    assert tree(store) == damaged_files


# remove


@pytest.mark.parametrize("name", ["tiny-vit", "image/tiny-vit"])
def test_remove_and_extract_again_give_the_same_bytes(
    grown: Grown,
    name: str,
    tiny_image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree(grown.store)
    told = call_json("remove", grown.store, name)
    mine = [path for path in before if "/image/tiny-vit/" in path]
    assert (told["removed"], told["objects"]) == ("image/tiny-vit", len(mine))
    assert told["bytes"] == sum(len(before[path]) for path in mine)
    assert tree(grown.store) == {path: data for path, data in before.items() if path not in mine}
    assert call("verify", grown.store).exit_code == 0
    encoder = ("--image", f"timm:{tiny_image_encoder}", "--device", "cpu", "--max-bad", "1")
    options = ("--image-batch", "4", "--shard-rows", "5")
    assert call("extract", grown.table, "--store", grown.store, *encoder, *options).exit_code == 0
    assert tree(grown.store) == before


def test_remove_of_a_near_name(grown: Grown) -> None:
    line = error_of(call("remove", grown.store, "image/tiny-vitt"), 3)
    assert "did you mean image/tiny-vit" in line
    assert "removed image/tiny-vit: " in call("remove", grown.store, "tiny-vit").stdout


def test_remove_of_a_name_in_both_modalities(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
) -> None:
    features = np.ones((4, 2), np.float16)
    write_store(
        tmp_path / "store",
        features,
        features,
        list(range(4)),
        [""] * 4,
        names=("same", "same"),
    )
    line = error_of(call("remove", tmp_path / "store", "same"), 3)
    assert "several arrays are called 'same'; there are image/same, text/same" in line
    assert call("remove", tmp_path / "store", "text/same").exit_code == 0
    assert [array.record.modality for array in FeatureStore.open(tmp_path / "store").arrays()] == [
        "image"
    ]


@pytest.mark.parametrize("stop", [0, 1])
def test_a_removal_interrupted_between_segments_can_be_repeated(
    grown: Grown,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    import apecache.store.manage as mend

    real = mend.remove_array
    calls = iter(range(stop))

    def interrupted(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mend, "remove_array", interrupted)
        assert call("remove", grown.store, "tiny-vit").exit_code == 130
    assert call("remove", grown.store, "tiny-vit").exit_code == 0
    assert not [name for name in tree(grown.store) if "tiny-vit" in name]
    assert call("verify", grown.store).exit_code == 0


# export and upgrade


def test_export_writes_what_is_served_and_overwrites_nothing(
    grown_once: Grown,
    tmp_path: Path,
) -> None:
    told = call_json("export", grown_once.store, tmp_path / "f.npz", "--npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        assert sorted(found) == sorted(told["wrote"])
        assert len(found["image.tiny-vit"]) == 16
    shown = call("export", grown_once.store, tmp_path / "deep" / "folder", "--parquet")
    assert "images.parquet, texts.parquet" in shown.stdout
    for arguments in ((tmp_path / "f.npz", "--npz"), (tmp_path / "deep" / "folder", "--parquet"),
                      (tmp_path / "f.npz", "--parquet")):  # fmt: skip
        before = tree(tmp_path)
        assert "exists already and is not overwritten" in error_of(
            call("export", grown_once.store, *arguments),
            3,
        )
        assert tree(tmp_path) == before


@pytest.mark.parametrize("kinds", [[], ["--npz", "--parquet"]])
def test_export_wants_one_kind(grown_once: Grown, tmp_path: Path, kinds: list[str]) -> None:
    line = error_of(call("export", grown_once.store, tmp_path / "out", *kinds), 2)
    assert "exactly one of --npz and --parquet" in line


def test_upgrade_of_the_newest_format(grown: Grown, tmp_path: Path) -> None:
    before = tree(grown.store)
    assert call_json("upgrade", grown.store, "--out", tmp_path / "new")["written"] is False
    assert "nothing to do" in call("upgrade", grown.store, "--out", tmp_path / "new").stdout
    assert tree(grown.store) == before


# Bad input, row by row of the contract


Bad = tuple[str, Callable[[Path], None], str]
HEADER = "image\tcaption\n"


def write(text: str | bytes, name: str = "t.tsv") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("t.tsv", lambda folder: None, "no such file"),
        ("t.tsv", write(""), "the file is empty"),
        ("t.tsv", write(HEADER), "header but no rows"),
        ("t.tsv", write("imagee\tcaption\nx\ty\n"), "no column 'image'; columns found: imagee, caption; did you mean"),
        ("t.tsv", write("image\timage\tcaption\nx\ty\tz\n"), "line 1: column 'image' appears twice"),
        ("t.tsv", write(b"image\tcaption\nx\t\xff\n"), "not UTF-8 (line 2, byte 3)"),
        ("t.tsv", write(HEADER + "x\ty\tz\n"), "line 2: 3 columns, the header has 2"),
        ("t.parquet", write(b"PAR1", "t.parquet"), "no Parquet table that can be read"),
        ("t.tsv", write("image\tcaption\tsplit\nx\ta\ttrain\nx\tb\ttest\n"), "has split 'test' here and 'train'"),
    ],
    ids=["missing", "empty", "header only", "missing column", "column twice",
         "not UTF-8", "ragged row", "truncated Parquet", "one image in two splits"],
)  # fmt: skip
def test_bad_manifests(
    tmp_path: Path, tiny_text_encoder: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path)
    result = call(
        "extract",
        tmp_path / name,
        "--store",
        tmp_path / "store",
        "--text",
        f"hf:{tiny_text_encoder}",
    )
    assert said in error_of(result, 3)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def extract_images(tiny_image_encoder: Path) -> Callable[..., Result]:
    encoder = (
        "--image",
        f"timm:{tiny_image_encoder}",
        "--device",
        "cpu",
        "--image-batch",
        "4",
        "--shard-rows",
        "5",
    )
    return lambda table, store, *more: call("extract", table, "--store", store, *encoder, *more)


def test_a_manifest_that_changed_is_a_new_view_and_append_is_not_needed(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
    extract_images: Callable[..., Result],
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    lines = shapes.read_text().splitlines()
    shapes.write_text("\n".join([lines[0], *lines[:0:-1], ""]))
    result = extract_images(shapes, store)
    assert result.exit_code == 0, result.output
    told = call_json("info", store)
    assert (told["view"], len(told["views"])) == (told["views"][-1], 2)
    views = call_json("views", "list", store)["views"]
    assert [view["view"] for view in views] == told["views"]
    assert call_json("info", store, "--view", "0000")["view"] == told["views"][0]
    newest = told["views"][-1]
    assert "is the newest view" in error_of(call("views", "remove", store, newest), 3)
    assert call("views", "remove", store, "0000").exit_code == 0
    assert call("compact", store).exit_code == 0
    assert call_json("info", store)["views"] == [newest]


def test_splits_are_assigned_and_kept_and_unreadable_rows_are_listed(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
    extract_images: Callable[..., Result],
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    table = "\n".join("\t".join(line.split("\t")[:2]) for line in shapes.read_text().splitlines())
    shapes.write_text(table + "\n")
    assert extract_images(shapes, store).exit_code == 0
    assert call_json("info", store)["splits"] == {"": 12}
    told = call_json("split", store, "--fraction", "train=.5,val=.5")
    assert sum(told["splits"].values()) == 12
    assert set(told["splits"]) == {"train", "val"}
    views = call_json("info", store)["views"]
    assert extract_images(shapes, store).exit_code == 0
    assert call_json("info", store)["views"] == views  # the same table: its splits stay
    (shapes.parent / "images" / "red-circle-0.png").unlink()
    assert extract_images(shapes, store, "--max-bad", "0.1").exit_code == 0
    assert call_json("info", store)["splits"] == told["splits"]
    (bad,) = call_json("info", store, "--bad")["bad"]
    assert (bad["key"], bad["reason"]) == ("images/red-circle-0.png", "missing")
    assert call("info", store, "--bad", "--csv", tmp_path / "bad.csv").exit_code == 0
    assert "images/red-circle-0.png,missing" in (tmp_path / "bad.csv").read_text()


def test_splits_keep_the_values_of_any_column_of_the_table_together(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
    extract_images: Callable[..., Result],
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    # The column is the color, which stands in the name of each file.
    header, *rows = (line.split("\t")[:2] for line in shapes.read_text().splitlines())
    rows = [[*row, row[0].rpartition("/")[2].partition("-")[0]] for row in rows]
    lines = ["\t".join([*header, "shoot"]), *("\t".join(row) for row in rows)]
    shapes.write_text("\n".join(lines) + "\n")
    assert extract_images(shapes, store).exit_code == 0
    problem = error_of(call("split", store, "--fraction", "train=.5,val=.5", "--by", "shot"), 3)
    assert "no column 'shot'" in problem
    assert "did you mean shoot" in problem
    told = call_json("split", store, "--fraction", "train=.5,val=.5", "--by", "shoot")
    assert set(told["splits"]) == {"train", "val"}
    by_color = splits_of_colors(store)
    assert all(len(splits) == 1 for splits in by_color.values())
    # A new picture follows those that have its value.
    shutil.copy(shapes.parent / rows[0][0], shapes.parent / "images" / "late.png")
    draw_shape("green", "circle", 50).save(shapes.parent / "images" / "late.png")
    shapes.write_text("\n".join([*lines, f"images/late.png\ta late one\t{rows[-1][2]}"]) + "\n")
    assert extract_images(shapes, store).exit_code == 0
    pairs = FeatureStore.open(store).pairs
    assert {str(pairs.splits[pairs.row_of_key["images/late.png"]])} == by_color[rows[-1][2]]


def splits_of_colors(store: Path) -> dict[str, set[str]]:
    pairs = FeatureStore.open(store).pairs
    splits: dict[str, set[str]] = {}
    for key, split in zip(pairs.keys, pairs.splits, strict=True):
        color = str(key).rpartition("/")[2].partition("-")[0]
        splits.setdefault(color, set()).add(str(split))
    return splits


def test_a_view_is_named_and_chosen_by_its_name(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    call_json("split", store, "--fraction", "train=.5,val=.5")
    assert call("views", "name", store, "0000", "first").exit_code == 0
    views = call_json("views", "list", store)["views"]
    assert [view["name"] for view in views] == ["first", ""]
    assert call_json("info", store, "--view", "first")["view"] == views[0]["view"]
    assert call_json("info", store)["view"] == views[1]["view"]
    assert "needs a VIEW and its new name" in error_of(call("views", "name", store, "0000"), 2)


READING = (
    "info",
    "export",
    "fit-head",
    "fit-encoder",
    "lint",
    "sweep",
    "auto",
    "forecast",
    "curate",
    "evaluate",
    "compare",
    "report",
    "index",
    "export-embeddings",
)
"""Commands that read the features of a store."""


@pytest.mark.parametrize("command", READING)
def test_every_command_that_reads_a_store_takes_a_view(command: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    options = {name for option in group.commands[command].params for name in option.opts}
    assert "--view" in options


def test_an_older_view_is_exported_and_stands_in_the_command_of_a_sweep(
    tiny_store: Path,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    call_json("delete", store, "--key", "images/red-circle-0.png")
    older = ("--view", "0000")
    for name, view, n_images in (("new", (), 11), ("old", older, 12)):
        told = call_json("export-embeddings", tiny_run, tmp_path / name, "--store", store, *view)
        assert told["n_images"] == n_images
    (tmp_path / "space.toml").write_text('"optimizer.lr" = {log = [1e-3, 1e-2]}\n')
    recipe = tmp_path / "one.toml"
    recipe.write_text('extends = "projection"\nname = "one"\n[schedule]\nepochs = 1\n')
    given = ("--recipe", recipe, "--space", tmp_path / "space.toml", "--trials", "1")
    out = ("--dev-split", "val", "--out", tmp_path / "sweep")
    command = call_json("sweep", store, *given, *out, *older)["command"]
    assert "--view 0000-" in command


def test_images_are_added_and_deleted(
    tiny_store: Path,
    shapes: Path,
    tmp_path: Path,
    load_once: None,
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    new = shapes.parent / "images" / "new.png"
    draw_shape("red", "circle", 60).save(new)
    root = ("--root", shapes.parent)
    told = call_json("add", store, new, "--caption", "a new circle", "--split", "val", *root)
    assert told["encoded"] == {"image/tiny-vit": 1, "text/tiny-bert": 1}
    opened = FeatureStore.open(store)
    assert opened.pairs.keys.tolist()[-1] == "images/new.png"
    assert opened.pairs.captions.tolist()[-1] == "a new circle"
    assert opened.array("image").load_ok().all()
    assert "has images/new.png already" in error_of(call("add", store, new, *root), 3)
    outside = tmp_path / "outside.png"
    shutil.copy(new, outside)
    assert "is not below" in error_of(call("add", store, outside, *root), 3)
    told = call_json("delete", store, "--key", "images/new.png", "--where", "label=circle")
    assert told["n_images"] == 8
    assert set(FeatureStore.open(store).pairs.labels) == {"square", "triangle"}
    assert "has no image 'images/x.png'" in error_of(
        call("delete", store, "--key", "images/x.png"), 3
    )


def test_a_further_column_is_kept_added_to_and_deleted_by(
    shapes: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
    load_once: None,
) -> None:
    header, *lines = shapes.read_text(encoding="utf-8").splitlines()
    table = shapes.with_name("priced.tsv")
    priced = [f"{line}\t{20 if '/red' in line else 10}" for line in lines]
    table.write_text("\n".join([f"{header}\tprice", *priced]) + "\n", encoding="utf-8")
    store = tmp_path / "store"
    image = ("--image", f"timm:{tiny_image_encoder}")
    told = call_json("extract", table, "--store", store, *image, "--column", "price")
    assert told["columns"]["further"] == ["price"]
    assert "price" not in told["columns"]["unused"]
    # The next run keeps the column without being told.
    told = call_json("extract", table, "--store", store, *image)
    assert told["columns"]["further"] == ["price"]
    assert "further columns: price" in call("extract", table, "--store", store, *image).output
    assert call_json("info", store)["columns"] == ["price"]
    assert "further columns: price" in call("info", store).output
    assert call_json("views", "list", store)["views"][-1]["columns"] == ["price"]
    new = shapes.parent / "images" / "priced.png"
    draw_shape("red", "circle", 60).save(new)
    twice = ("--column", "price=20", "--column", "price=30")
    assert "one name has two values" in error_of(call("add", store, new, *twice), 2)
    call_json("add", store, new, "--column", "price=20", "--root", shapes.parent)
    pairs = FeatureStore.open(store).pairs
    assert pairs.columns["price"].tolist()[-1] == "20"
    told = call_json("delete", store, "--where", "price=20")
    assert told["n_images"] == (pairs.columns["price"] != "20").sum()
    for command in (
        ("add", store, new, "--column", "price"),
        ("delete", store, "--where", "price"),
    ):
        assert "expected COLUMN=VALUE" in error_of(call(*command), 2)
    assert "--column" in error_of(
        call("extract", table, "--store", store, *image, "--column", "prize"), 3
    )


def link_outside(image: Path) -> None:
    shutil.copy(image, image.parents[2] / "outside.png")
    image.unlink()
    image.symlink_to(image.parents[2] / "outside.png")


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        (
            "../outside.png",
            lambda image: shutil.copy(image, image.parents[2] / "outside.png"),
            "outside-root",
        ),
        ("images/red-square-0.png", link_outside, "outside-root"),
        ("images/red\\u0000square-0.png", lambda image: None, "outside-root"),
        ("images", lambda image: None, "not-a-file"),
        ("images/red-square-0.png", lambda image: (image.unlink(), os.mkfifo(image)), "not-a-file"),
    ],
    ids=["../", "symbolic link", "NUL byte", "folder", "FIFO"],
)
def test_an_image_that_is_no_file_below_the_root_is_quarantined(
    shapes: Path, tmp_path: Path, extract_images: Callable[..., Result],
    key: str, change: Callable[[Path], Any], reason: str,
) -> None:  # fmt: skip
    """Row 1 of 12; a JSON table, for a NUL byte."""
    change(shapes.parent / "images" / "red-square-0.png")
    keys = [line.split("\t")[0] for line in shapes.read_text().splitlines()[1::2]]
    lines = [f'{{"image": "{key if row == 1 else other}"}}' for row, other in enumerate(keys)]
    (shapes.parent / "pairs.jsonl").write_text("\n".join(lines))
    result = extract_images(shapes.parent / "pairs.jsonl", tmp_path / "store", "--max-bad", "0.1")
    assert result.exit_code == 0, result.output
    assert f"warning: image row 1: {reason}" in result.stderr
    assert call_json("info", tmp_path / "store")["arrays"][0]["reasons"] == {reason: 1}


@pytest.mark.parametrize(("limit", "code"), [("0.1", 0), ("0.01", 3)])
def test_an_output_that_is_not_finite_is_quarantined(
    shapes: Path, tmp_path: Path, extract_images: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
    limit: str, code: int,
) -> None:  # fmt: skip
    spoil_first_row(monkeypatch, float("nan"))
    result = extract_images(shapes, tmp_path / "store", "--max-bad", limit)
    assert result.exit_code == code, result.output
    assert "warning: image row 0: not-finite" in result.stderr or "1 not-finite" in error_of(
        result,
        3,
    )
    assert call_json("info", tmp_path / "store")["arrays"][0]["reasons"] == {"not-finite": 1}


def spoil_first_row(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    from dataclasses import replace

    batches = iter(range(100))

    def load(*arguments: Any) -> Any:
        encoder = loaded_once("image")(*arguments)[0]

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            features = encoder.forward(pixels).clone()
            if next(batches) == 0:
                features[0, 0] = value
            return features

        return [replace(encoder, forward=forward)]

    monkeypatch.setattr(extraction, "load_image_encoders", load)


def test_out_of_memory_is_halved_away(
    shapes: Path,
    tmp_path: Path,
    extract_images: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    def load(*arguments: Any) -> Any:
        encoder = loaded_once("image")(*arguments)[0]

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("too much")
            features: torch.Tensor = encoder.forward(pixels)
            return features

        return [replace(encoder, forward=forward)]

    monkeypatch.setattr(extraction, "load_image_encoders", load)
    assert extract_images(shapes, tmp_path / "store").exit_code == 0
    assert call_json("info", tmp_path / "store")["arrays"][0]["complete"]


COMMANDS = (
    ("info",),
    ("verify",),
    ("repair",),
    ("remove", "{store}", "tiny-vit"),
    ("export", "{store}", "{out}", "--npz"),
    ("upgrade", "{store}", "--out", "{out}"),
)


def on(command: tuple[str, ...], store: Path, out: Path) -> Result:
    name, *rest = command
    return call(name, *(part.format(store=store, out=out) for part in rest or ["{store}"]))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("kind", ["nowhere", "a folder", "a file"])
def test_what_is_no_store(tmp_path: Path, command: tuple[str, ...], kind: str) -> None:
    place = tmp_path / "place"
    if kind != "nowhere":
        put(tmp_path, {"place/x.txt" if kind == "a folder" else "place": b"x"})
    before = tree(tmp_path)
    line = error_of(on(command, place, tmp_path / "out"), 3)
    assert "is not a store" in line
    assert tree(tmp_path) == before


def test_repair_makes_no_store_out_of_another_folder(shapes: Path) -> None:
    before = tree(shapes.parent)
    assert "is not a store" in error_of(call("repair", shapes.parent, "--pairs", shapes), 3)
    assert tree(shapes.parent) == before


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_newer_format(grown: Grown, tmp_path: Path, command: tuple[str, ...]) -> None:
    for name in ("records/source.json", PAIRS, "records/image/tiny-vit/fingerprint.json"):
        body = read_record(LocalFiles(grown.store), name)
        (grown.store / name).write_bytes(seal_record(name, {**body, "format": 3}))
    before = tree(grown.store)
    line = error_of(on(command, grown.store, tmp_path / "out"), 3)
    assert "has format 3; this apecache reads up to 2: upgrade apecache" in line
    assert tree(grown.store) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "fit-head"])
def test_an_incomplete_store_says_how_far_it_is_and_what_goes_on(
    grown: Grown,
    tmp_path: Path,
    command: str,
) -> None:
    (grown.store / "records/image/tiny-vit/seal.json").unlink()
    (grown.store / "records/image/tiny-vit/commits/00000002.json").unlink()
    line = error_of(reading(command, grown.store, tmp_path), 3)
    assert "image/tiny-vit is 87% done; resume with the same apecache extract" in line


@pytest.mark.parametrize("command", ["export", "fit-head"])
def test_a_damaged_shard_is_named_with_the_command_that_repairs_it(
    grown: Grown,
    tmp_path: Path,
    command: str,
) -> None:
    hit(grown.store, CHUNK)
    line = error_of(reading(command, grown.store, tmp_path), 3)
    assert CHUNK in line
    assert "(shard 1)" in line
    assert "apecache repair" in line


def reading(command: str, store: Path, folder: Path) -> Result:
    if command == "export":
        return call("export", store, folder / "f.npz", "--npz")
    return call(
        "fit-head",
        store,
        "--recipe",
        "projection",
        "--out",
        folder / "run",
        "--device",
        "cpu",
    )


def test_too_little_disk(
    shapes: Path,
    tmp_path: Path,
    extract_images: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10))  # type: ignore[attr-defined]
    line = error_of(extract_images(shapes, tmp_path / "store"), 3)
    assert "needed for the features" in line


def test_another_fingerprint_is_shown_field_by_field(
    tiny_store: Path,
    shapes_once: Path,
    extract_images: Callable[..., Result],
) -> None:
    result = extract_images(shapes_once, tiny_store, "--image-cut", "cls")
    line = error_of(result, 4)
    assert "encoder.inputs.pooling" in line
    assert "cls" in result.stderr.split("difference", 1)[1]
