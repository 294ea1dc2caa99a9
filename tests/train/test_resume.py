"""A fit that is broken off, killed or interrupted: the same call goes on, and ends with the same
bytes."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import SMALL
from safetensors.torch import load_file, save_file

from apecache.errors import DataError, MismatchError, RunError
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from apecache.runs.folder import locked, read_history
from apecache.storage.replace import HEADER_KEY
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ["train"] * 96 + ["dev"] * 24
IMAGE_ROWS = [image for image in range(len(SPLITS)) for _ in range(1 + image % 3)]
ALWAYS = FitSpec(splits=SplitSpec(dev="dev"), device="cpu", save_seconds=0)

EVERYTHING = {
    "plain": [],
    "random numbers": [
        "text.kind=mlp",
        "text.width=16",
        "text.dropout=0.2",
        "augmentation.noise=0.1",
    ],
    "mixtures and captions": ["augmentation.mixup=1", "loss.captions=2", "image.input_dropout=0.1"],
    "average, accumulation": [
        "optimizer.ema=0.9",
        "schedule.accumulate=2",
        "schedule.batch_size=16",
    ],
    "lion": ["optimizer.kind=lion", "loss.kind=sigmoid", "loss.temperature=0.05"],
    "sgd": ["optimizer.kind=sgd", "schedule.steps=13"],
    "batch norm": [
        "text={kind='mlp', residual=false, norm='batch', width=16, dim=8}",
        "schedule.patience=3",
    ],
    "temperature itself": [
        "loss.temperature_parameter=temperature",
        "loss.temperature=0.07",
        "loss.min_temperature=0.001",
        "optimizer.decay_scalars=true",
        "optimizer.lr=0.002",
    ],
    "closed form first": ["init=cca", "image.dim=6", "text.dim=6", "image.input_dropout=0.1"],
}


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(len(SPLITS), 6))
    image = hidden @ rng.normal(size=(6, 12)) + 0.5 * rng.normal(size=(len(SPLITS), 12))
    text = hidden[IMAGE_ROWS] @ rng.normal(size=(6, 10)) + 0.5 * rng.normal(
        size=(len(IMAGE_ROWS), 10)
    )
    features = image.astype(np.float32), text.astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("planted") / "s",
        *features,
        IMAGE_ROWS,
        SPLITS,
    )
    return made


def make_recipe(*settings: str) -> Recipe:
    short = ["schedule.epochs=5", "schedule.batch_size=32", "optimizer.lr=0.01"]
    return load_recipe(SMALL, [*short, *settings])


def weights(run: Path) -> bytes:
    return (run / "head.safetensors").read_bytes()


def timeless(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_history(run)
    ]


class StoppedError(Exception):
    pass


def stop_after(n_saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break off right after checkpoint number `n_saves`, as a kill would: nothing more is
    written."""
    count = [0]

    def save(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        count[0] += 1
        if count[0] >= n_saves:
            raise StoppedError

    monkeypatch.setattr("apecache.train.session.save_checkpoint", save)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_fit_broken_off_at_any_checkpoint_ends_with_the_same_bytes(
    name: str,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(*EVERYTHING[name])
    fit_head(store, recipe=recipe, out=tmp_path / "whole", spec=replace(ALWAYS, save_seconds=1e9))
    out = tmp_path / "broken"
    n_stops = 0
    for n_saves in (1, 2, 1, 3, 1, 4, 2):
        with monkeypatch.context() as patch:
            stop_after(n_saves, patch)
            try:
                fit_head(store, recipe=recipe, out=out, spec=ALWAYS)
            except StoppedError:
                n_stops += 1
                torch.rand(5)
    if not (out / "head.json").exists():
        assert fit_head(store, recipe=recipe, out=out, spec=ALWAYS).resumed_step > 0
    assert n_stops >= 5
    assert weights(out) == weights(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def broken_off(store: FeatureStore, out: Path, patch: pytest.MonkeyPatch, n_saves: int = 5) -> Path:
    with patch.context() as context:
        stop_after(n_saves, context)
        with pytest.raises(StoppedError):
            fit_head(store, recipe=make_recipe(), out=out, spec=ALWAYS)
    return out


def test_how_often_checkpoints_are_written_changes_nothing(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    for name, seconds in (("always", 0.0), ("never", 1e9)):
        fit_head(
            store,
            recipe=make_recipe(),
            out=tmp_path / name,
            spec=replace(ALWAYS, save_seconds=seconds),
        )
    assert weights(tmp_path / "always") == weights(tmp_path / "never")


@pytest.mark.parametrize(
    ("recipe", "spec", "field"),
    [
        (("optimizer.lr=0.02",), ALWAYS, "recipe.optimizer.lr is 0.02, there 0.01"),
        ((), replace(ALWAYS, seed=3), "seed is 3, there 0"),
        (
            (),
            replace(ALWAYS, splits=SplitSpec(dev_images=9)),
            "splits.dev is None, there dev; splits.dev_images is 9",
        ),
    ],
)
def test_another_fit_is_not_gone_on_with(
    recipe: tuple[str, ...],
    spec: FitSpec,
    field: str,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = broken_off(store, tmp_path / "run", monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(MismatchError, match=field) as caught:
        fit_head(store, recipe=make_recipe(*recipe), out=out, spec=spec)
    assert caught.value.exit_code == 4
    assert caught.value.differences
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    fit_head(store, recipe=make_recipe(*recipe), out=out, spec=replace(spec, overwrite=True))
    fit_head(store, recipe=make_recipe(*recipe), out=tmp_path / "fresh", spec=spec)
    assert weights(out) == weights(tmp_path / "fresh")


def test_features_of_another_store_are_not_gone_on_with(
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = broken_off(store, tmp_path / "run", monkeypatch)
    features = np.ones((len(SPLITS), 12), np.float32), np.ones((len(IMAGE_ROWS), 10), np.float32)
    other = write_store(tmp_path / "s", *features, IMAGE_ROWS, SPLITS, names=("other", "words"))
    with pytest.raises(MismatchError, match="image_features is"):
        fit_head(other, recipe=make_recipe(), out=out, spec=ALWAYS)


def test_a_fit_killed_between_its_head_and_the_end_only_finishes(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # The checkpoint is removed last.
        patch.setattr(
            "apecache.train.fit_head.remove_tensors",
            lambda _: (_ for _ in ()).throw(StoppedError()),
        )
        with pytest.raises(StoppedError):
            fit_head(store, recipe=make_recipe(), out=out, spec=ALWAYS)
    assert (out / "head.json").exists()
    before = weights(out)
    report = fit_head(store, recipe=make_recipe(), out=out, spec=ALWAYS)
    assert report.resumed_step == 15
    assert weights(out) == before
    assert not (out / CHECKPOINT).exists()
    with pytest.raises(RunError, match="exists already"):
        fit_head(store, recipe=make_recipe(), out=out, spec=ALWAYS)


def test_only_the_lock_says_that_another_process_is_fitting(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="a pipe is full"), locked(tmp_path):
        raise BlockingIOError(errno.EAGAIN, "a pipe is full")
    # The lock was released.
    with locked(tmp_path):
        pass


def test_two_processes_never_fit_into_one_folder(store: FeatureStore, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from apecache.runs.folder import locked\n"
    )
    program += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is fitting into"):
            fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=ALWAYS)
        other.kill()
    fit_head(store, recipe=make_recipe(), out=tmp_path / "run", spec=ALWAYS)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "other tensors", "newer"])
def test_a_damaged_checkpoint_is_refused(
    damage: str,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = broken_off(store, tmp_path / "run", monkeypatch)
    path = out / CHECKPOINT
    data = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(data[: len(data) // 2])
        case "noise":
            path.write_bytes(os.urandom(len(data)))
        case "other tensors":
            _, state = load_checkpoint(out)
            tensors = {
                name: value
                for name, value in load_file(path).items()
                if name != "model/text.body.weight"
            }
            save_checkpoint(out, tensors, state)
        case _:
            save_file(load_file(path), path, {HEADER_KEY: json.dumps({"format": 9})})
    with pytest.raises(
        RunError,
        match="upgrade" if damage == "newer" else "begin anew with --overwrite",
    ):
        fit_head(store, recipe=make_recipe(), out=out, spec=ALWAYS)
    fit_head(store, recipe=make_recipe(), out=out, spec=replace(ALWAYS, overwrite=True))


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    recipe = make_recipe("optimizer.lr=3e38", "schedule.warmup=0")
    with pytest.raises(
        DataError,
        match=r"not finite at step 2; the last good checkpoint is that of step 1;",
    ):
        fit_head(store, recipe=recipe, out=tmp_path / "run", spec=ALWAYS)
    tensors, state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 1
    assert torch.isfinite(tensors["losses/epoch"]).all()


PROGRAM = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from apecache.recipes.recipe import Recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.head_data import FitSpec
from apecache.train.fit_head import fit_head

warnings.simplefilter("ignore")
store, out, recipe, n_kills = sys.argv[1], Path(sys.argv[2]), Recipe.model_validate_json(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
spec = FitSpec(splits=SplitSpec(dev="dev"), device="cpu", save_seconds=0)
killed = 0
while True:
    child = os.fork()
    if not child:
        fit_head(FeatureStore.open(store), recipe, out, spec)
        os._exit(0)
    if killed < n_kills:
        time.sleep(random.Random(killed).uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
        continue
    print(json.dumps([killed, os.waitstatus_to_exitcode(status)]))
    break
"""


@pytest.mark.slow
def test_a_fit_killed_ten_times_ends_with_the_same_bytes(
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    settings = [
        "text.kind=mlp",
        "text.width=32",
        "text.dropout=0.2",
        "augmentation.noise=0.1",
        "schedule.epochs=120",
    ]
    recipe = make_recipe(
        *settings,
        "optimizer.ema=0.9",
        "schedule.batch_size=24",
        "schedule.evaluate_every=4",
    )
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(store.path),
        str(tmp_path / "killed"),
        recipe.model_dump_json(),
        "10",
    ]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **threads},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [10, 0], done.stderr
    fit_head(store, recipe=recipe, out=tmp_path / "whole", spec=replace(ALWAYS, save_seconds=1e9))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
