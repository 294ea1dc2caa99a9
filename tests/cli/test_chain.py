"""The way of the data by its commands: extract, info, fit-head, evaluate, index, search; and how
each one fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from apecache_cli.app import app
from tiny import make_shapes
from typer.testing import CliRunner, Result

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def call_json(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory,
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> dict[str, Path]:
    """A store, a run and an index made by commands."""
    folder = tmp_path_factory.mktemp("chain")
    paths = {
        "store": folder / "store",
        "run": folder / "run",
        "index": folder / "index",
        "table": shapes_once,
    }
    paths |= {"image": tiny_image_encoder, "text": tiny_text_encoder}
    extract(paths)
    fit = (
        "fit-head",
        paths["store"],
        "--recipe",
        "projection",
        "--out",
        paths["run"],
        "--dev-split",
        "val",
    )
    assert call(*fit, "--set", "schedule.epochs=2").exit_code == 0
    assert (
        call("index", paths["run"], "--store", paths["store"], "--out", paths["index"]).exit_code
        == 0
    )
    return paths


def extract(paths: dict[str, Path], *more: object, **changed: object) -> Result:
    use = {**paths, **changed}
    encoders = ("--image", f"timm:{use['image']}", "--text", f"hf:{use['text']}")
    return call("extract", use["table"], "--store", use["store"], *encoders, *more)


def test_a_second_extract_says_nothing_to_do(chain: dict[str, Path]) -> None:
    result = extract(chain)
    assert result.exit_code == 0
    assert "nothing to do" in result.stdout


def test_info_tells_what_is_in_the_store(chain: dict[str, Path]) -> None:
    told = call_json("info", chain["store"])
    assert (told["n_images"], told["n_texts"], told["splits"]) == (12, 24, {"train": 8, "val": 4})
    assert [(a["modality"], a["rows"], a["done"]) for a in told["arrays"]] == [
        ("image", 12, 1.0),
        ("text", 24, 1.0),
    ]
    assert "tiny-vit" in call("info", chain["store"]).stdout


def test_evaluate_reports_recall_counts_and_chance(chain: dict[str, Path]) -> None:
    told = call_json("evaluate", chain["run"], "--store", chain["store"], "--split", "val")
    assert told["task"] == "retrieval"
    assert told["split"] == "val"
    assert list(told["image_to_text"]) == list(told["text_to_image"]) == ["1", "5", "10"]
    assert (told["n_images"], told["n_texts"]) == (4, 8)
    assert told["chance"]["text_to_image"]["1"] == 25.0
    assert "chance" in call("evaluate", chain["run"], "--store", chain["store"]).stdout


def test_evaluate_warns_when_the_split_was_seen(chain: dict[str, Path]) -> None:
    result = call("evaluate", chain["run"], "--store", chain["store"], "--split", "train", "--json")
    assert json.loads(result.stdout)["seen_in_training"] is True
    assert "do not measure generalization" in result.stderr


def test_zeroshot_classifies_labeled_images(chain: dict[str, Path]) -> None:
    told = call_json(
        "evaluate",
        chain["run"],
        "--task",
        "zeroshot",
        "--labels",
        chain["table"],
        "--split",
        "val",
    )
    assert (told["n_images"], told["n_classes"]) == (4, 1)
    told = call_json("evaluate", chain["run"], "--task", "zeroshot", "--labels", chain["table"])
    assert (told["n_images"], told["n_classes"]) == (12, 3)
    assert 0 <= told["top1"] <= told["top5"] == 100


def test_search_finds_images_by_text_captions_by_photo_and_turned_round(
    chain: dict[str, Path],
) -> None:
    photo = chain["table"].parent / "images" / "red-circle-0.png"
    by_text = call_json("search", chain["index"], "a red circle", "-k", "3")["hits"]
    assert [hit["rank"] for hit in by_text] == [1, 2, 3]
    assert len({hit["key"] for hit in by_text}) == 3
    by_photo = call_json("search", chain["index"], photo, "-k", "24")["hits"]
    assert len({hit["caption"] for hit in by_photo}) == 24
    turned = call_json("search", chain["index"], photo, "--target", "images")["hits"]
    assert turned[0]["key"] == "images/red-circle-0.png"
    assert turned[0]["score"] == pytest.approx(1, abs=1e-3)


def test_a_moved_encoder_folder_is_found_by_override(
    chain: dict[str, Path],
    tmp_path: Path,
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(chain["text"], moved)
    plain = call_json("search", chain["index"], "a blue square")
    assert call_json("search", chain["index"], "a blue square", "--text", f"hf:{moved}") == plain


def one_line_error(result: Result, code: int) -> str:
    """The error line, after checking that it is one and that the command ended with `code`."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


def test_no_such_table(chain: dict[str, Path], tmp_path: Path) -> None:
    wrong = chain["table"].with_name("pair.tsv")
    line = one_line_error(extract(chain, table=wrong, store=tmp_path / "new"), 3)
    assert "no such file; did you mean pairs.tsv?" in line
    assert not (tmp_path / "new").exists()


def test_a_missing_column_names_those_found(chain: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    table.write_text("image\ttitel\nx.jpg\ta dog\n")
    line = one_line_error(extract(chain, table=table, store=tmp_path / "new"), 3)
    assert "no column 'caption'; columns found: image, titel" in line


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("--image", "timm:vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("--image", "tim:resnet18", "timm"),
        (
            "--text",
            "hf:sentence-transformers/all-MiniLM-L6-v9",
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
        ("--text", "hf:/no/such/folder", "no folder /no/such/folder"),
    ],
)
def test_an_unknown_encoder_names_near_ones(
    chain: dict[str, Path],
    tmp_path: Path,
    option: str,
    value: str,
    near: str,
) -> None:
    store = tmp_path / "new"
    line = one_line_error(
        call("extract", chain["table"], "--store", store, option, value, "--device", "cpu"),
        3,
    )
    assert near in line
    assert not store.exists()


def test_an_empty_table(chain: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n")
    assert "no rows" in one_line_error(extract(chain, table=table, store=tmp_path / "new"), 3)


@pytest.mark.parametrize(("limit", "code"), [("0.2", 0), ("0.01", 3)])
def test_a_corrupt_image_is_reported_and_the_run_goes_on(
    chain: dict[str, Path],
    shapes: Path,
    limit: str,
    code: int,
) -> None:
    (shapes.parent / "images" / "blue-square-0.png").write_bytes(b"<html>404</html>")
    result = extract(chain, "--max-bad", limit, table=shapes, store=shapes.parent / "store")
    assert result.exit_code == code, result.output
    assert "images/blue-square-0.png" in result.stderr
    assert "not-an-image" in result.stderr
    (image, _) = call_json("info", shapes.parent / "store")["arrays"]
    assert (image["complete"], image["quarantined"], image["reasons"]) == (
        True,
        1,
        {"not-an-image": 1},
    )


def test_a_wrong_root_is_refused_before_anything_is_written(
    chain: dict[str, Path],
    tmp_path: Path,
) -> None:
    line = one_line_error(extract(chain, "--root", tmp_path, store=tmp_path / "new"), 3)
    assert "--root" in line
    assert not (tmp_path / "new").exists()


def test_an_existing_run_folder(chain: dict[str, Path]) -> None:
    line = one_line_error(
        call("fit-head", chain["store"], "--recipe", "ape", "--out", chain["run"]),
        3,
    )
    assert "exists already" in line
    assert "--overwrite" in line


def test_a_store_made_by_another_encoder(chain: dict[str, Path], other_text_encoder: Path) -> None:
    result = extract(chain, text=other_text_encoder)
    line = one_line_error(result, 4)
    assert "encoder.weights" in line
    assert "--add" in line
    assert "encoder.weights" in result.stderr.split("difference", 1)[1]


def test_a_changed_table_costs_what_is_new_in_it(
    chain: dict[str, Path],
    shapes: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    assert extract(chain, store=store).exit_code == 0
    shapes.write_text(shapes.read_text().replace("a red circle", "a red disc"))
    result = extract(chain, table=shapes, store=store)
    assert result.exit_code == 0, result.output
    assert "1 row encoded" in result.stdout


def test_a_run_on_a_store_of_other_features(chain: dict[str, Path], tmp_path: Path) -> None:
    result = extract(chain, "--text-cut", "cls", store=tmp_path / "cls")
    assert result.exit_code == 0, result.output
    line = one_line_error(
        call("evaluate", chain["run"], "--store", tmp_path / "cls", "--split", "val"),
        4,
    )
    assert "inputs.pooling" in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "no-such-store"], 3, "is not a store"),
        (["fit-head", "no-such-store", "--recipe", "ape", "--out", "x"], 3, "is not a store"),
        (["evaluate", "no-such-run", "--store", "{store}"], 3, "not a finished run"),
        (["evaluate", "{run}", "--store", "{store}", "--split", "vall"], 3, "did you mean val"),
        (["evaluate", "{run}"], 2, "--store is missing"),
        (["evaluate", "{run}", "--task", "zeroshot"], 2, "--labels is missing"),
        (
            ["evaluate", "{run}", "--task", "zeroshot", "--store", "{store}"],
            2,
            "--store has no effect on --task zeroshot",
        ),
        (
            ["evaluate", "{run}", "--task", "probe", "--folds", "2"],
            2,
            "--folds has no effect on --task probe",
        ),
        (
            ["evaluate", "{run}", "--store", "{store}", "--labels", "{table}"],
            2,
            "--labels has no effect on --task retrieval",
        ),
        (["evaluate", "{run}", "--task", "zero"], 2, "did you mean zeroshot"),
        (
            ["fit-head", "{store}", "--recipe", "projecton", "--out", "x"],
            3,
            "did you mean projection",
        ),
        (
            ["fit-head", "{store}", "--recipe", "ape", "--out", "x", "--set", "optimizr.lr=1"],
            3,
            "optimizer",
        ),
        (
            ["fit-head", "{store}", "--recipe", "ape", "--out", "x", "--device", "cuda:99"],
            2,
            "cuda:99",
        ),
        (["search", "no-such-index", "dog"], 3, "is not an index"),
        (["search", "{index}", " "], 2, "empty"),
        (["search", "{index}", "missing.jpg"], 3, "no such file"),
        (["search", "{index}", "dog", "--target", "image"], 2, "did you mean images"),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    chain: dict[str, Path],
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*(argument.format(**chain) for argument in arguments))
    assert words in one_line_error(result, code)
    assert not list(tmp_path.iterdir())


def test_evaluate_tells_intervals_languages_and_folds(chain: dict[str, Path]) -> None:
    plain = call_json(
        "evaluate",
        chain["run"],
        "--store",
        chain["store"],
        "--split",
        "val",
        "--by-language",
    )
    for side in ("image_to_text", "text_to_image"):
        for k, (low, high) in plain["intervals"][side].items():
            assert low <= plain[side][k] <= high
    assert plain["languages"]["en"]["n_texts"] == plain["n_texts"]
    folded = call_json(
        "evaluate",
        chain["run"],
        "--store",
        chain["store"],
        "--split",
        "val",
        "--folds",
        "2",
    )
    assert (folded["n_images"], folded["folds_of"], folded["intervals"]) == (2, 2, None)
    refused = call(
        "evaluate",
        chain["run"],
        "--store",
        chain["store"],
        "--split",
        "val",
        "--folds",
        "5000",
    )
    assert refused.exit_code == 3
    assert "fewer than one fold of 5000" in refused.output


def test_csls_is_a_row_of_its_own(chain: dict[str, Path]) -> None:
    asked = ("evaluate", chain["run"], "--store", chain["store"], "--split", "val")
    plain = call_json(*asked)
    corrected = call_json(*asked, "--csls")
    assert plain["csls"] is None
    assert corrected.pop("csls")["n_texts"] == 8
    plain.pop("csls")
    assert plain == corrected
    assert "with CSLS" in call(*asked, "--csls").stdout
    assert "with CSLS" not in call(*asked).stdout
    assert call_json(*asked, "--csls", "--folds", "2")["csls"]["n_images"] == 2


def test_search_by_key_and_arithmetic_and_csls(chain: dict[str, Path]) -> None:
    key = "images/red-circle-0.png"
    by_key = call_json("search", chain["index"], "--key", key, "--target", "images")
    assert (by_key["hits"][0]["key"], by_key["score"], by_key["keys"]) == (key, "cosine", [key])
    terms = ("--like", "a red circle", "--like", "a blue square", "--unlike", "a green triangle")
    assert len(call_json("search", chain["index"], *terms, "-k", "3")["hits"]) == 3
    shown = call(
        "search",
        chain["index"],
        "a red circle",
        "--unlike",
        "a blue square",
        "--csls",
    ).stdout
    assert "CSLS" in shown
    assert "cosine" not in shown
    assert "a red circle - a blue square" in shown
    assert call_json("search", chain["index"], "a red circle", "--csls")["score"] == "CSLS"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "{index}"], 2, "the query is empty"),
        (
            ["search", "{index}", "--key", "images/red-circel-0.png"],
            3,
            "did you mean images/red-circle-0.png",
        ),
        (["search", "{index}", "dog", "--unlike", "dog"], 2, "cancel out"),
        (["search", "{index}", "dog", "--nprobe", "4"], 2, "has no use for it"),
        (["search", "{index}", "dog", "--device", "cuda:99"], 2, "cuda:99"),
        (
            ["index", "{run}", "--store", "{store}", "--out", "x", "--kind", "ivf"],
            3,
            "use --kind flat",
        ),
        (
            ["index", "{run}", "--store", "{store}", "--out", "x", "--kind", "fla"],
            2,
            "FAISS refuses fla",
        ),
        (["index", "{run}", "--store", "{store}", "--out", "x", "--update"], 3, "is not an index"),
        (
            ["index", "{run}", "--store", "{store}", "--out", "{index}", "--update", "--overwrite"],
            2,
            "exclude each other",
        ),
        (
            [
                "index",
                "{run}",
                "--store",
                "{store}",
                "--out",
                "{index}",
                "--update",
                "--kind",
                "hnsw",
            ],
            2,
            "has flat",
        ),
    ],
)
def test_wrong_searches_and_indexes_are_one_line(
    chain: dict[str, Path],
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in one_line_error(
        call(*(argument.format(**chain) for argument in arguments)),
        code,
    )
    assert not list(tmp_path.iterdir())


def test_an_index_of_another_kind_shows_its_recall_and_an_update_its_changes(
    chain: dict[str, Path],
    tmp_path: Path,
) -> None:
    make = ("index", chain["run"], "--store", chain["store"], "--out", tmp_path / "index")
    shown = call(*make, "--kind", "hnsw").stdout
    assert "recall@10" in shown
    assert "100.0" in shown
    assert "0 added, 0 removed" in call(*make, "--update").stdout
    told = call_json(*make, "--update")
    assert (told["kind"], told["n_added"], told["images"]["recall_at_10"]) == ("hnsw", 0, 1.0)


def test_scout_ranks_cuts_and_draws_them(chain: dict[str, Path], tmp_path: Path) -> None:
    table = make_shapes(tmp_path / "shapes", copies=4)
    ask = (
        "scout",
        table,
        "--image",
        f"timm:{chain['image']}",
        "--text",
        f"hf:{chain['text']}",
        "--text-cut",
        "cls",
    )
    told = call_json(
        *ask,
        "--image-cut",
        "default",
        "--image-cut",
        "mean@-2",
        "--heat-map",
        tmp_path / "scout.svg",
    )
    assert {row["image"] for row in told["rows"]} == {"tiny-vit", "tiny-vit-mean-layer-2"}
    assert {"cka", "mutual_knn", "image_to_text", "text_to_image"} <= told["rows"][0].keys()
    drawn = (tmp_path / "scout.svg").read_text()
    assert drawn.count("tiny-bert-cls") == 3
    shown = call(*ask, "--split", "train").stdout
    assert "chance" in shown
    assert "mutual kNN" in shown
    assert "did you mean val" in one_line_error(call(*ask, "--split", "vall"), 3)
    assert "one vector" in one_line_error(call(*ask, "--image-cut", "tokens"), 2)
    assert "has 6 blocks" in one_line_error(call(*ask, "--image-cut", "mean@9"), 3)


def test_zeroshot_takes_class_names_and_templates_from_files(
    chain: dict[str, Path],
    tmp_path: Path,
) -> None:
    names = tmp_path / "names.tsv"
    templates = tmp_path / "templates.txt"
    names.write_text("circle\tround thing\nsquare\tbox\ntriangle\ttriangle\nstar\tstar\n")
    templates.write_text("a photo of {c}\na drawing of {}\n")
    asked = (
        "evaluate",
        chain["run"],
        "--task",
        "zeroshot",
        "--labels",
        chain["table"],
        "--class-names",
        names,
    )
    result = call(*asked, "--templates", templates, "--json")
    told = json.loads(result.stdout)
    assert (told["classes"], told["counts"]) == (
        ["round thing", "box", "triangle", "star"],
        [4, 4, 4, 0],
    )
    assert told["templates"] == ["a photo of {}", "a drawing of {}"]
    assert "1 of 4 classes have no image; they can still be predicted: star" in result.stderr
    assert "most frequent confusions" in call(*asked).stdout
    one_line_error(call(*asked, "--templates", templates, "--template", "a {}"), 2)
    names.write_text("circle\nsquare\n")
    assert "'triangle'" in one_line_error(call(*asked), 2)
    templates.write_text("a photo\n")
    names.write_text("circle\nsquare\ntriangle\n")
    assert "line 1" in one_line_error(call(*asked, "--templates", templates), 2)
    names.write_text("Kreis\nQuadrat\nDreieck\n")
    assert "sorted labels were matched" in call(*asked).stderr


def test_zeroshot_by_the_name_of_a_benchmark(chain: dict[str, Path]) -> None:
    pytest.importorskip("open_clip", reason="the extra open-clip is not installed")
    asked = ("evaluate", chain["run"], "--task", "zeroshot", "--labels", chain["table"])
    assert "none of ImageNet's 1000 classes" in one_line_error(
        call(*asked, "--dataset", "imagenet"),
        2,
    )
    assert len(call_json(*asked, "--templates", "clip-7")["templates"]) == 7
