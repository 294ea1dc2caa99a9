"""Sources of every kind by commands: extract, repair with the same options, and zero-shot
labels."""

import json
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from tiny import damaged, draw_shape, put, tree
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")
runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def call_json(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """classes/circle/red.png and so on: eight images of two classes."""
    for shape in ("circle", "square"):
        (tmp_path / "classes" / shape).mkdir(parents=True)
        for color in ("red", "green", "blue", "yellow"):
            draw_shape(color, shape).save(tmp_path / "classes" / shape / f"{color}.png")
    return tmp_path / "classes"


def damage_images(store: Path) -> str:
    """Damage the first shard of the image features; returns its name."""
    files = tree(store)
    name = next(
        name
        for name in sorted(files)
        if name.startswith("features.zarr/image/") and "/features/c." in name
    )
    put(store, damaged(files, name, "flip"))
    return name


def test_a_folder_per_class_with_shares_of_splits_is_extracted_and_repaired(
    classes: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
) -> None:
    store = tmp_path / "store"
    splits = ("--split-fraction", "train=.5,val=.5,seed=3")
    encoder = ("--image", f"timm:{tiny_image_encoder}", "--device", "cpu")
    assert call("extract", classes, "--store", store, *encoder, *splits).exit_code == 0
    told = call_json("info", store)
    assert told["n_images"] == 8
    assert sum(told["splits"].values()) == 8
    assert set(told["splits"]) == {"train", "val"}
    assert call_json("extract", classes, "--store", store, *encoder, *splits)["nothing_to_do"]
    files = tree(store)
    # The store has recorded how its source was opened. Any table with the images will do.
    for options in ((), ("--split-fraction", "train=.5,val=.5,seed=4")):
        damage_images(store)
        assert call("repair", store, *options).exit_code == 0
        assert tree(store) == files


def test_repair_finds_the_images_of_a_table_where_they_were(
    classes: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
) -> None:
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "t.csv"
    store = tmp_path / "store"
    rows = [
        f"{path.relative_to(classes)},x,{path.parent.name}"
        for path in sorted(classes.rglob("*.png"))
    ]
    table.write_text("\n".join(["file,id,path", *rows]))
    encoder = ("--image", f"timm:{tiny_image_encoder}", "--device", "cpu")
    options = ("--image-column", "file")
    assert (
        call("extract", table, "--store", store, *encoder, "--root", classes, *options).exit_code
        == 0
    )
    files = tree(store)
    damage_images(store)
    assert call("repair", store, *options).exit_code == 0
    assert tree(store) == files


def test_splits_from_a_file(classes: Path, tmp_path: Path, tiny_image_encoder: Path) -> None:
    (tmp_path / "splits.tsv").write_text("circle/red.png\tval\nsquare/red.png\ttrain\n")
    store = tmp_path / "store"
    encoder = ("--image", f"timm:{tiny_image_encoder}", "--device", "cpu")
    given = ("--split-file", tmp_path / "splits.tsv")
    assert call("extract", classes, "--store", store, *encoder, *given).exit_code == 0
    assert call_json("info", store)["splits"] == {"": 6, "train": 1, "val": 1}


def test_zero_shot_takes_a_folder_per_class(classes: Path, tiny_run: Path) -> None:
    task = ("evaluate", tiny_run, "--task", "zeroshot", "--device", "cpu", "--labels", classes)
    told = call_json(*task)
    assert (told["n_images"], told["classes"]) == (8, ["circle", "square"])
    told = call_json(*task, "--split-fraction", "a=.5,b=.5", "--split", "a")
    assert 0 < told["n_images"] < 8


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (
            ["--split", "a", "--split-fraction", "train=1"],
            2,
            "says nothing about this kind of source",
        ),
        (["--split-file", "s.tsv", "--split-fraction", "train=1"], 2, "give one of --split"),
        (["--split-fraction", "train=.5"], 2, "add to 0.5; expected fractions"),
        (["--no-restval"], 2, "--no-restval is for Karpathy's JSON"),
        (["--root", "."], 2, "--root says nothing about this kind of source"),
        (["--split-file", "nowhere.tsv"], 3, "no such split file"),
        (["--text", "hf:nothing"], 3, "has no captions, only images, labels"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    more: list[str],
    code: int,
    said: str,
    classes: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
) -> None:
    encoder = ("--image", f"timm:{tiny_image_encoder}")
    result = call("extract", classes, "--store", tmp_path / "store", *encoder, *more)
    assert said in error_of(result, code)
    assert not (tmp_path / "store").exists()


def test_restval_can_be_left_out(
    shapes_once: Path,
    tmp_path: Path,
    tiny_text_encoder: Path,
) -> None:
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"a {split}"}]}
        for n, split in enumerate(("train", "restval", "test"))
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    call_json("extract", tmp_path / "dataset.json", "--store", tmp_path / "store",
              "--text", f"hf:{tiny_text_encoder}", "--no-restval")  # fmt: skip
    about = call_json("info", tmp_path / "store")
    assert [array["rows"] for array in about["arrays"]] == [2]


def test_captions_alone_have_no_images_to_encode(tmp_path: Path, tiny_image_encoder: Path) -> None:
    (tmp_path / "captions.txt").write_text("a dog\n")
    encoder = ("--image", f"timm:{tiny_image_encoder}")
    line = error_of(
        call("extract", tmp_path / "captions.txt", "--store", tmp_path / "store", *encoder),
        3,
    )
    assert "has no images, only captions" in line


def test_standard_input_is_refused(tmp_path: Path, tiny_image_encoder: Path) -> None:
    line = error_of(
        call(
            "extract",
            "-",
            "--store",
            tmp_path / "store",
            "--image",
            f"timm:{tiny_image_encoder}",
        ),
        3,
    )
    assert "save it as a file" in line
