"""Several processes train one model: the same loss and weights as one with the whole batch, and one
run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.errors import OptionError
from apecache.recipes.recipe import load_recipe
from apecache.runs.encoders import WEIGHTS, read_tensors
from apecache.runs.folder import read_history
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.ranks import ALONE, Ranks

SETTINGS = [
    *(
        "loss.kind=sigmoid",
        "loss.captions=2",
        "schedule.epochs=2",
        "schedule.batch_size=7",
        "schedule.warmup=0",
    ),
    *("optimizer.lr=1e-3", "optimizer.eps=1e-3", "optimizer.ema=0.5"),
]


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_are_the_whole_in_order_and_even(size: int, more: int) -> None:
    n = size + more
    shares = Ranks(rank=0, size=size).shares(n)
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_items_than_processes_are_refused() -> None:
    with pytest.raises(OptionError, match="2 items for 3 processes"):
        Ranks(rank=0, size=3).shares(2)


def test_alone_nothing_is_exchanged() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert torch.equal(ALONE.gathered(x, 0, 3), x)
    assert not ALONE.gathered(x, 0, 3).requires_grad
    ALONE.add_up([x])
    ALONE.wait()


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--slice", "2"], marks=pytest.mark.slow)],
)
def test_two_processes_train_like_one_with_the_whole_batch(
    tiny_store: Path,
    shapes_once: Path,
    tmp_path: Path,
    more: list[str],
) -> None:
    """Both towers train, and that of the texts with dropout of 0.1, of attention too."""
    media = FolderMedia(root=shapes_once.parent)
    recipe = load_recipe("clip", SETTINGS)
    spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu")
    opened = FeatureStore.open(tiny_store)
    report = fit_encoder(
        opened,
        recipe=recipe,
        out=tmp_path / "one",
        spec=spec,
        open_image=lambda key: load_image(key, media).image,
    )
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "apecache",
    ]
    about = [
        str(tiny_store),
        "--recipe",
        "clip",
        "--root",
        str(shapes_once.parent),
        "--out",
        str(tmp_path / "two"),
    ]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [
        *start,
        "fit-encoder",
        *about,
        "--dev-split",
        "val",
        "--device",
        "cpu",
        "--json",
        *settings,
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (told,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert told["ledger"]["n_steps"] == report.ledger.n_steps
    assert done.stderr.count("epoch   1") == 1
    one, two = (list(read_history(tmp_path / name)) for name in ("one", "two"))
    assert [line["loss"] for line in two[1:]] == pytest.approx(
        [line["loss"] for line in one[1:]],
        rel=1e-5,
    )
    assert [line["dev"] for line in two] == [line["dev"] for line in one]
    whole, shared = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("one", "two"))
    assert any(name.startswith("image.tower.") for name in whole)
    assert any(name.startswith("text.tower.") for name in whole)
    assert whole.keys() == shared.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
