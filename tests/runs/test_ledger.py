"""The ledger of a fit: what is counted is counted exactly, what is not known is not there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from recipes import SMALL
from typer.testing import CliRunner

from apecache.errors import RunError
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.report.run_page import ledger_table
from apecache.runs.ledger import ExtractionSeconds, load_ledger, runs_until_paid
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

N_TRAIN = 96
N_DEV = 24
IMAGE_DIM = 12
TEXT_DIM = 10
OUT = 8
SPLITS = ["train"] * N_TRAIN + ["dev"] * N_DEV
IMAGE_ROWS = [image for image in range(len(SPLITS)) for _ in range(1 + image % 3)]
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(len(SPLITS), IMAGE_DIM)).astype(np.float16)
    text = rng.normal(size=(len(IMAGE_ROWS), TEXT_DIM)).astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("ledger") / "s",
        image,
        text,
        IMAGE_ROWS,
        SPLITS,
    )
    return made


def make_recipe(*settings: str) -> Recipe:
    short = ["schedule.epochs=3", "schedule.batch_size=32"]
    return load_recipe(SMALL, [*short, *settings])


def linear_flops(batch: int) -> int:
    """Forward and the gradient of the weights of both heads; logits, and their gradients for both
    sides."""
    heads = 2 * 2 * batch * (IMAGE_DIM + TEXT_DIM) * OUT
    return heads + 3 * 2 * batch * batch * OUT


@pytest.mark.parametrize(("batch", "accumulate"), [(32, 1), (16, 1), (16, 3), (96, 1)])
def test_operations_of_linear_heads_are_those_of_the_closed_form(
    batch: int,
    accumulate: int,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    recipe = make_recipe(f"schedule.batch_size={batch}", f"schedule.accumulate={accumulate}")
    ledger = fit_head(store, recipe=recipe, out=tmp_path / "run", spec=CPU).ledger
    assert ledger.step_flops == accumulate * linear_flops(batch)
    assert ledger.n_steps == 3 * (N_TRAIN // batch // accumulate)
    assert ledger.flops == ledger.n_steps * ledger.step_flops
    assert ledger.n_samples == 3 * N_TRAIN
    assert (ledger.n_negatives, ledger.nominal_batch) == (batch - 1, batch * accumulate)


def test_captions_and_mixtures_are_counted_as_they_are(store: FeatureStore, tmp_path: Path) -> None:
    report = fit_head(store, recipe=make_recipe("loss.captions=2"), out=tmp_path / "two", spec=CPU)
    assert report.ledger.n_samples == 2 * 3 * N_TRAIN
    mixed = fit_head(
        store,
        recipe=make_recipe("augmentation.mixup=1"),
        out=tmp_path / "mixed",
        spec=CPU,
    )
    assert mixed.ledger.n_negatives == mixed.n_negatives == 15
    assert mixed.ledger.step_flops == linear_flops(16)


def test_a_closed_form_has_no_steps(store: FeatureStore, tmp_path: Path) -> None:
    ledger = fit_head(store, recipe=load_recipe("ridge"), out=tmp_path / "run", spec=CPU).ledger
    assert (
        ledger.n_steps,
        ledger.flops,
        ledger.n_samples,
        ledger.n_negatives,
        ledger.nominal_batch,
    ) == (0,) * 5


def test_seconds_are_parted_and_what_nobody_measured_is_absent(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    report = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    ledger = report.ledger
    assert ledger == load_ledger(tmp_path / "run")
    assert min(ledger.training_seconds, ledger.evaluation_seconds, ledger.loading_seconds) > 0
    assert ledger.training_seconds + ledger.evaluation_seconds == pytest.approx(report.seconds)
    assert (
        ledger.energy_joules,
        ledger.money,
        ledger.extraction_seconds,
        ledger.runs_until_paid,
    ) == (None,) * 4
    assert ledger.peak_bytes is None  # on a CPU torch counts nothing
    shown = dict(ledger.rows())
    assert "peak bytes" not in shown
    assert dict(replace(ledger, peak_bytes=7).rows())["peak bytes"] == 7
    assert shown["flops"] == ledger.flops
    assert "money" not in shown


def test_bytes_are_those_of_the_files_that_loading_reads(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    ledger = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU).ledger
    read = [
        path
        for path in store.path.rglob("c.*")
        if path.parent.name in ("features", "status") and {"image", "text"} & set(path.parts)
    ]
    assert ledger.store_bytes == sum(path.stat().st_size for path in read)
    assert ledger.store_bytes >= 2 * IMAGE_DIM * len(SPLITS) + 4 * TEXT_DIM * len(IMAGE_ROWS)


def test_a_price_gives_money_for_all_seconds(store: FeatureStore, tmp_path: Path) -> None:
    ledger = fit_head(
        store,
        recipe=make_recipe(),
        out=tmp_path / "run",
        spec=replace(CPU, price_per_hour=7200.0),
    ).ledger
    assert ledger.money == pytest.approx(2 * ledger.seconds)


def test_a_fit_that_was_broken_off_counts_all_of_itself(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    """Steps, operations and seconds of before and after; energy would be only a part."""
    spec = replace(CPU, save_seconds=0)
    whole = fit_head(store, recipe=make_recipe(), out=tmp_path / "whole", spec=spec).ledger

    def stop(line: dict[str, Any]) -> None:
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=spec, progress=stop)
    report = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=spec)
    assert report.resumed_step > 0
    for name in ("n_steps", "step_flops", "flops", "n_samples", "store_bytes"):
        assert getattr(report.ledger, name) == getattr(whole, name), name
    assert report.ledger.training_seconds + report.ledger.evaluation_seconds == pytest.approx(
        report.seconds
    )


# --- extraction -----------------------------------------------------------------------------------


def report_of(folder: Path, image: dict[str, Any], text: dict[str, Any]) -> Path:
    sides = [
        {"modality": "image", "name": "pixels"} | image,
        {"modality": "text", "name": "words"} | text,
    ]
    (folder / "extract.json").write_text(json.dumps({"arrays": sides}))
    return folder / "extract.json"


def whole(rows: int, seconds: float) -> dict[str, Any]:
    return {"rows": rows, "n_encoded": rows, "seconds": seconds}


def test_the_report_of_extract_tells_when_the_cache_has_paid(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    path = report_of(tmp_path, whole(len(SPLITS), 1000.0), whole(len(IMAGE_ROWS), 500.0))
    spec = replace(CPU, extract_report=path)
    ledger = fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=spec).ledger
    assert ledger.extraction_seconds == 1500
    assert ledger.runs_until_paid == 1
    short = fit_head(
        store,
        recipe=make_recipe("schedule.epochs=0", "schedule.steps=1"),
        out=tmp_path / "short",
        spec=spec,
    ).ledger
    seen = 32 * 1000 / len(SPLITS) + 32 * 500 / len(IMAGE_ROWS)
    assert short.runs_until_paid == -(-1500 // (seen - short.loading_seconds))


@pytest.mark.parametrize(
    "changed",
    [{"n_encoded": 3}, {"rows": 7, "n_encoded": 7}, {"name": "other"}],
)
def test_a_report_of_a_part_of_the_rows_tells_nothing(
    changed: dict[str, Any],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    path = report_of(tmp_path, whole(len(SPLITS), 1000.0), whole(len(IMAGE_ROWS), 500.0) | changed)
    ledger = fit_head(
        store,
        recipe=make_recipe(),
        out=tmp_path / "run",
        spec=replace(CPU, extract_report=path),
    ).ledger
    assert (ledger.extraction_seconds, ledger.runs_until_paid) == (None, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arrays": [{"modality": "image"}]}'])
def test_a_file_that_is_no_report_is_refused(
    text: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RunError, match="is not a report of extract"):
        fit_head(
            store,
            recipe=make_recipe(),
            out=tmp_path / "run",
            spec=replace(CPU, extract_report=tmp_path / "x.json"),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loading", "wanted"),
    [(0.0, 1), (50.0, 2), (90.0, 10), (100.0, None), (1000.0, None)],
)
def test_a_cache_that_is_slower_than_the_encoders_never_pays(
    loading: float,
    wanted: int | None,
) -> None:
    assert (
        runs_until_paid(
            ExtractionSeconds(image_seconds=1.0, text_seconds=1.0, seconds=100.0),
            n_images=50,
            n_samples=50,
            loading_seconds=loading,
        )
        == wanted
    )


# --- shown ----------------------------------------------------------------------------------------


def test_the_command_prints_the_ledger_and_the_page_shows_it(
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    sets = [
        "--set",
        "schedule.epochs=1",
        "--dev-split",
        "val",
        "--device",
        "cpu",
        "--price-per-hour",
        "3",
    ]
    command = [
        "fit-head",
        str(tiny_store),
        "--recipe",
        "projection",
        "--out",
        str(tmp_path / "run"),
        *sets,
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["ledger"]
    ledger = load_ledger(tmp_path / "run")
    assert ledger is not None
    assert shown == json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert shown["money"] == pytest.approx(ledger.seconds / 1200)
    (tmp_path / "bare").mkdir()
    table = ledger_table({"first": tmp_path / "run", "bare": tmp_path / "bare"})
    assert table.columns == ("", "first", "bare")
    assert ("flops", ledger.flops, None) in table.rows


@pytest.mark.parametrize(("peak_of", "kept"), [("cuda", 123), ("resident growth", None)])
def test_an_older_ledger_is_read_and_the_growth_of_the_process_is_no_measurement(
    peak_of: str,
    kept: int | None,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=CPU)
    path = tmp_path / "run" / "ledger.json"
    older = {**json.loads(path.read_text()), "peak_bytes": 123, "peak_of": peak_of}
    path.write_text(json.dumps(older))
    ledger = load_ledger(tmp_path / "run")
    assert ledger is not None
    assert ledger.peak_bytes == kept
    table = ledger_table({"run": tmp_path / "run"})
    assert [row[1] for row in table.rows if row[0] == "peak bytes"] == ([kept] if kept else [])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch's counters of memory need a CUDA device",
)
def test_on_a_gpu_the_peak_is_that_of_torchs_allocator(store: FeatureStore, tmp_path: Path) -> None:
    ledger = fit_head(
        store,
        recipe=make_recipe(),
        out=tmp_path / "run",
        spec=replace(CPU, device="cuda"),
    ).ledger
    assert ledger.peak_bytes is not None
    assert 0 < ledger.peak_bytes <= torch.cuda.max_memory_allocated()


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"flops": 1')
    with pytest.raises(RunError, match=r"ledger\.json is damaged"):
        load_ledger(tmp_path)
