"""The library logs its stages to `apecache`, and a program that sets up no logging sees nothing."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_shapes

import apecache


def stages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    records = [record for record in caplog.records if record.levelno >= level]
    assert {record.name.split(".")[0] for record in records} <= {"apecache"}
    return [record.getMessage() for record in records]


def spec_of(image: Path, text: Path) -> apecache.ExtractSpec:
    return apecache.ExtractSpec(
        image=apecache.parse_encoder(f"timm:{image}", "image"),
        text=apecache.parse_encoder(f"hf:{text}", "text"),
        max_bad=0.5,
    )


def test_an_extraction_logs_its_stages_and_unreadable_rows(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = make_shapes(tmp_path / "shapes")
    (table.parent / "images" / "red-square-0.png").write_bytes(b"<html>")
    source = apecache.open_pairs(table)
    with caplog.at_level(logging.INFO, logger="apecache"):
        apecache.extract(source, tmp_path / "store", spec_of(tiny_image_encoder, tiny_text_encoder))
    logged = stages(caplog)
    assert logged[0].startswith(f"extracting {table} into")
    assert logged[0].endswith("12 images, 24 captions")
    assert sum(line.startswith("loading ") for line in logged) == 2
    assert any("encoding 12 of 12 rows" in line for line in logged)
    assert any("text features" in line and "24 rows encoded in" in line for line in logged)
    (warning,) = stages(caplog, logging.WARNING)
    assert "1 of 12 rows could not be encoded; the first: row 1" in warning


@pytest.mark.usefixtures("one_thread")
def test_a_fit_logs_every_epoch_and_the_best(
    tiny_store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = apecache.load_recipe(
        "projection", ["image.dim=16", "text.dim=16", "schedule.epochs=2"]
    )
    spec = apecache.FitSpec(splits=apecache.SplitSpec(dev="val"))
    store = apecache.FeatureStore.open(tiny_store)
    with caplog.at_level(logging.INFO, logger="apecache"):
        apecache.fit_head(store, recipe, tmp_path / "run", spec)
    logged = stages(caplog)
    assert any(f"fitting projection in {tmp_path / 'run'}: 8 images, 4 on dev" in x for x in logged)
    epochs = [line for line in logged if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in epochs] == ["epoch 0", "epoch 1", "epoch 2"]
    assert "no step" in epochs[0]
    assert "of 2, " in logged[-1]
    # The dev split is small, which the command line shows as a warning too.
    assert any("dev" in line for line in stages(caplog, logging.WARNING))


def test_an_index_logs_what_is_in_it(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = apecache.FeatureStore.open(tiny_store)
    with caplog.at_level(logging.INFO, logger="apecache.search"):
        apecache.build_index(tiny_run, store, tmp_path / "index")
    assert stages(caplog)[-1] == f"index {tmp_path / 'index'}: 12 images, 24 captions"


def test_an_import_logs_what_was_written(
    tiny_store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    features = apecache.FeatureStore.open(tiny_store).array("image").load()
    spec = apecache.ImportSpec(image=apecache.FeatureInput(features=features))
    with caplog.at_level(logging.INFO, logger="apecache.store"):
        apecache.import_features(tmp_path / "store", spec)
    logged = stages(caplog)
    assert any(line.endswith("importing 12 rows") for line in logged)
    assert any("12 rows imported" in line for line in logged)


def test_a_sweep_logs_its_trials(
    tiny_store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    space = tmp_path / "space.toml"
    lines = ('"schedule.epochs" = {choice = [1]}', '"optimizer.lr" = {choice = [1e-3, 1e-2]}')
    space.write_text("\n".join(lines), encoding="utf-8")
    spec = apecache.SweepSpec(
        n_trials=2,
        sampler="grid",
        fit=apecache.FitSpec(splits=apecache.SplitSpec(dev="val")),
    )
    with caplog.at_level(logging.INFO, logger="apecache.sweeps"):
        apecache.sweep(
            apecache.FeatureStore.open(tiny_store),
            apecache.load_space(space, ["lilt-projection"]),
            tmp_path / "sweep",
            spec,
        )
    logged = stages(caplog)
    assert any(line.endswith("2 trials, 0 of them done") for line in logged)
    assert sum(line.startswith("trial ") for line in logged) == 2
    assert any("the best of 2 trials" in line for line in logged)


def test_nothing_is_printed_where_no_logging_is_set_up() -> None:
    code = (
        "import logging, apecache\n"
        "logging.getLogger('apecache.extraction.report').warning('shown')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
