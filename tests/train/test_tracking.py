"""Histories as TensorBoard events, read back by TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apecache.errors import MissingExtraError, RunError
from apecache.recipes.recipe import load_recipe
from apecache.runs.folder import read_history
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.tracking import log_to_tensorboard

RECIPE = load_recipe(
    "projection",
    ["schedule.epochs=4", "schedule.batch_size=4", "image.dim=8", "text.dim=8"],
)
CPU = FitSpec(splits=SplitSpec(dev="val"), device="cpu", save_seconds=0)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {
        name: [(each.step, each.value) for each in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }


def of_history(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What the events should be: a single float for each number of each line."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_history(run):
        numbers = {
            name: line[name] for name in ("loss", "lr", "temperature") if line[name] is not None
        }
        numbers["dev/mean_recall"] = line["dev"]["mean_recall"]
        for way in ("image_to_text", "text_to_image"):
            numbers |= {f"dev/{way}/R@{k}": line["dev"][way][k] for k in ("1", "5", "10")}
        for name, value in numbers.items():
            found.setdefault(name, []).append((line["step"], float(np.float32(value))))
    return found


def test_events_are_the_history(tiny_store: Path, tmp_path: Path) -> None:
    with log_to_tensorboard(tmp_path / "events") as log:
        fit_head(
            FeatureStore.open(tiny_store),
            recipe=RECIPE,
            out=tmp_path / "run",
            spec=CPU,
            progress=log,
        )
    written = of_history(tmp_path / "run")
    assert len(written["loss"]) == 4
    assert len(written["dev/text_to_image/R@10"]) == 5
    assert scalars(tmp_path / "events") == written


def test_a_fit_that_goes_on_shows_no_epoch_twice(tiny_store: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(tiny_store)
    run = tmp_path / "run"
    with log_to_tensorboard(tmp_path / "events") as log:

        def stop(line: dict[str, Any]) -> None:
            log(line)
            if line["epoch"] == 3:  # whose checkpoint is not written yet: it comes again
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_head(store, recipe=RECIPE, out=run, spec=CPU, progress=stop)
    assert len(scalars(tmp_path / "events")["loss"]) == 3
    with log_to_tensorboard(tmp_path / "events") as log:
        report = fit_head(store, recipe=RECIPE, out=run, spec=CPU, progress=log)
    assert report.resumed_step
    assert scalars(tmp_path / "events") == of_history(run)


def test_a_line_is_on_disk_before_the_next_one(tiny_store: Path, tmp_path: Path) -> None:
    with log_to_tensorboard(tmp_path / "events") as log:

        def look(line: dict[str, Any]) -> None:
            log(line)
            assert len(scalars(tmp_path / "events")["lr"]) == line["epoch"] + 1

        fit_head(
            FeatureStore.open(tiny_store),
            recipe=RECIPE,
            out=tmp_path / "run",
            spec=CPU,
            progress=look,
        )


def test_without_a_line_nothing_is_made(tmp_path: Path) -> None:
    with log_to_tensorboard(tmp_path / "events"):
        pass
    assert not (tmp_path / "events").exists()


def test_what_is_no_folder_is_refused_and_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(RunError, match="is on object storage"),
        log_to_tensorboard(Path("s3://bucket/events")),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is not a folder"), log_to_tensorboard(tmp_path / "file"):
        pass
    monkeypatch.setattr("apecache.train.tracking.find_spec", lambda name: None)
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'apecache\[track\]'"),
        log_to_tensorboard(tmp_path),
    ):
        pass
