"""Every command that takes a store, a table or images, with these on object storage (moto's S3 on
loopback)."""

import json
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from remote import SECRET, Faults, S3Server
from tiny import tree
from typer.testing import CliRunner, Result

from apecache.storage.open import open_files

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def call_json(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def upload(folder: Path, url: str) -> None:
    files = open_files(url)
    for name, data in tree(folder).items():
        files.write(name, data)


def objects(url: str) -> dict[str, bytes]:
    files = open_files(url)
    names = files.sizes("")
    return dict(zip(names, files.read_all(names), strict=True))


@pytest.fixture
def encoders(tiny_image_encoder: Path, tiny_text_encoder: Path) -> list[str]:
    sizes = ["--image-batch", "4", "--text-batch", "4", "--shard-rows", "5", "--device", "cpu"]
    return ["--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}", *sizes]


def test_the_way_of_the_data_begins_and_ends_on_object_storage(
    bucket: str,
    encoders: list[str],
    tiny_store: Path,
    shapes_once: Path,
    tmp_path: Path,
    load_once: None,
) -> None:
    upload(shapes_once.parent, f"{bucket}/shapes")
    store = f"{bucket}/store"
    table = f"{bucket}/shapes/pairs.tsv"
    planned = call_json("extract", table, "--store", store, *encoders, "--dry-run")
    assert (planned["store"], planned["free_bytes"], planned["fits"]) == (store, None, True)
    assert (
        "0.0 MB; nothing written"
        in call("extract", table, "--store", store, *encoders, "--dry-run").stdout
    )
    assert objects(store) == {}
    extracted = call_json("extract", table, "--store", store, *encoders)
    assert [array["n_encoded"] for array in extracted["arrays"]] == [12, 24]
    assert "nothing to do" in call("extract", table, "--store", store, *encoders).stdout
    # They say where the images are, and when they were changed.
    of_place = {"records/source.json", "records/stamps.bin"}
    local = {name: data for name, data in tree(tiny_store).items() if name not in of_place}
    assert {name: data for name, data in objects(store).items() if name not in of_place} == local
    told = call_json("info", store)
    assert (told["store"], told["origin"], told["n_images"]) == (store, table, 12)
    assert call_json("verify", store)["sound"]

    run = tmp_path / "run"
    index = tmp_path / "index"
    fit = (
        "--recipe",
        "projection",
        "--dev-split",
        "val",
        "--set",
        "schedule.epochs=2",
        "--device",
        "cpu",
    )
    assert call("fit-head", store, *fit, "--out", run).exit_code == 0
    assert call("fit-head", tiny_store, *fit, "--out", tmp_path / "same").exit_code == 0
    assert (run / "head.safetensors").read_bytes() == (
        tmp_path / "same" / "head.safetensors"
    ).read_bytes()
    assert call("fit-head", store, *fit, "--out", f"{bucket}/run").exit_code == 0
    assert objects(f"{bucket}/run")["head.safetensors"] == (run / "head.safetensors").read_bytes()
    again = call("fit-head", store, *fit, "--out", f"{bucket}/run")
    assert (again.exit_code, f"run folder {bucket}/run exists already" in again.stderr) == (
        3,
        True,
    ), again.output
    evaluated = call_json("evaluate", f"{bucket}/run", "--store", store, "--split", "val")
    refused = call("index", f"{bucket}/run", "--store", store, "--out", index)
    assert (refused.exit_code, "this command takes a folder" in refused.stderr) == (3, True)
    assert (
        evaluated["text_to_image"]
        == call_json("evaluate", run, "--store", tiny_store)["text_to_image"]
    )
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.lr" = {log = [1e-4, 1e-2]}\n"schedule.epochs" = {choice = [2]}\n')
    sweep = (
        "--recipe",
        "projection",
        "--space",
        space,
        "--trials",
        "2",
        "--dev-split",
        "val",
        "--device",
        "cpu",
    )
    assert store in call_json("sweep", store, *sweep, "--out", tmp_path / "sweep")["command"]
    assert call("index", run, "--store", store, "--out", index).exit_code == 0
    assert call_json("search", index, "a red circle", "-k", "3")["hits"]
    assert call("export", store, tmp_path / "all.npz", "--npz").exit_code == 0


def test_a_store_there_is_looked_after_as_one_here(
    bucket: str,
    encoders: list[str],
    shapes_once: Path,
    tmp_path: Path,
    load_once: None,
) -> None:
    store = f"{bucket}/store"
    half = tmp_path / "pairs.tsv"
    lines = shapes_once.read_text().splitlines(keepends=True)
    half.write_text("".join(lines[:13]))
    root = ("--root", shapes_once.parent)
    assert call("extract", half, "--store", store, *encoders, *root).exit_code == 0
    half.write_text("".join(lines))
    assert call("extract", half, "--store", store, *encoders, *root).exit_code == 0
    assert call_json("info", store)["segments"] == 2
    before = objects(store)
    files = open_files(store)
    damaged = "features.zarr/image/tiny-vit/features/c.0.0"
    files.write(damaged, b"rotten")
    files.remove("segments/0001/records/text/tiny-bert/commits/00000001.json")
    files.remove("records/segments/0001.json")
    verified = call("verify", store)
    assert (verified.exit_code, damaged in verified.stdout) == (3, True)
    assert f"repair with: apecache repair {store}" in verified.stderr
    repaired = call_json("repair", store)
    assert repaired["sound"]
    assert repaired["shards"] == {"segments/0001/text/tiny-bert": [1], "image/tiny-vit": [0]}
    assert objects(store) == before
    removed = call_json("remove", store, "tiny-bert")
    assert removed["objects"] > 0
    assert [array["name"] for array in call_json("info", store)["arrays"]] == ["tiny-vit"]
    assert call_json("verify", store)["problems"] == []


def test_keys_on_object_storage_never_lead_out_of_the_root(
    bucket: str,
    encoders: list[str],
    shapes_once: Path,
    tmp_path: Path,
    load_once: None,
) -> None:
    upload(shapes_once.parent, f"{bucket}/shapes/in")
    open_files(f"{bucket}/shapes").write(
        "secret.png",
        (shapes_once.parent / "images/red-circle-0.png").read_bytes(),
    )
    open_files(f"{bucket}/shapes").write("in/empty.png", b"")
    table = tmp_path / "pairs.tsv"
    keys = [
        "images/red-circle-0.png",
        "./images/../images/red-square-0.png",
        "images/blue-circle-0.png",
    ]
    keys += [
        "../secret.png",
        "images/../../secret.png",
        "/shapes/secret.png",
        "empty.png",
        "images/none.png",
    ]
    table.write_text("image\tcaption\n" + "".join(f"{key}\ta shape\n" for key in keys))
    image = encoders[:2] + encoders[-2:]
    root = ("--root", f"{bucket}/shapes/in", "--max-bad", "1")
    told = call_json("extract", table, "--store", tmp_path / "store", *image, *root)
    (array,) = told["arrays"]
    assert array["reasons"] == {"outside-root": 3, "empty": 1, "missing": 1}


def test_storage_that_stops_answering_ends_the_run_and_no_row_is_written_off(
    bucket: str, s3_server: S3Server, encoders: list[str], shapes_once: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, load_once: None,
) -> None:  # fmt: skip
    upload(shapes_once.parent, f"{bucket}/shapes")
    monkeypatch.setenv("APECACHE_RETRY_SECONDS", "0.2")
    command = ("extract", f"{bucket}/shapes/pairs.tsv", "--store", tmp_path / "store", *encoders)
    with s3_server.faults(Faults()) as faults:
        faults.told = lambda method, path: "503" if method == "GET" and "blue" in path else None
        stopped = call(*command)
    assert (stopped.exit_code, "does not answer" in stopped.stderr) == (3, True), stopped.output
    report = call_json(*command)
    assert [array["n_quarantined"] for array in report["arrays"]] == [0, 0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [((403, "AccessDenied"), "check AWS_ACCESS_KEY_ID"), ((404, "NoSuchBucket"), "no such bucket")],
)
def test_what_the_storage_refuses_is_one_line_without_secrets(
    bucket: str, s3_server: S3Server, encoders: list[str], shapes_once: Path, answer: tuple[int, str], message: str,
    load_once: None,
) -> None:  # fmt: skip
    with s3_server.faults(Faults()) as faults:
        faults.told = lambda method, path: answer
        results = [
            call("extract", shapes_once, "--store", f"{bucket}/store", *encoders),
            call("info", f"{bucket}/store"),
        ]
    for result in results:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, message in line) == (3, True), result.output
        assert SECRET not in result.output
        assert "AKIATESTS" not in result.output


def test_a_table_that_is_not_there_or_is_wrong_is_named_by_its_url(
    bucket: str,
    tmp_path: Path,
) -> None:
    open_files(bucket).write("wrong.tsv", b"image\ttitel\nx.jpg\ta dog\n")
    for name, message in (
        ("none.tsv", f"{bucket}/none.tsv: no such object"),
        ("wrong.tsv", f"{bucket}/wrong.tsv: no column 'caption'"),
        ("photos", "expected a file that ends in .tsv"),
        ("{00..03}.tar", "download tars and folders"),
    ):
        result = call(
            "extract",
            f"{bucket}/{name}",
            "--store",
            tmp_path / "store",
            "--text",
            "hf:none",
        )
        assert (result.exit_code, message in result.stderr.replace("\n", " ")) == (3, True), (
            result.output
        )
