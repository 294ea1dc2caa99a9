"""The shift of norms: what moved, by how much, and how it goes with depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from apecache_cli.app import app
from small_towers import small_bert, small_vit
from typer.testing import CliRunner

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.errors import RunError
from apecache.evaluate.analysis import bar_chart, correlation, layernorm_shift, norm_shifts
from apecache.recipes.recipe import load_recipe
from apecache.runs.load import load_run
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder


def test_a_shift_is_the_sum_of_absolute_differences_in_the_order_of_the_data() -> None:
    before = small_vit()
    after = small_vit()
    assert all(norm.l1_weight == norm.l1_bias == 0 for norm in norm_shifts(before, after))
    with torch.no_grad():
        after.module.blocks[1].norm2.weight[:3] -= 0.5
        after.module.norm.bias += 0.25
        after.module.blocks[0].mlp.fc1.weight += 1
    found = norm_shifts(before, after)
    names = [f"blocks.{block}.norm{norm}" for block in range(3) for norm in (1, 2)]
    assert [norm.norm for norm in found] == [*names, "norm"]
    assert [norm.depth for norm in found] == [0, 0, 1, 1, 2, 2, 3]
    assert [norm.l1_weight for norm in found] == pytest.approx([0, 0, 0, 1.5, 0, 0, 0])
    assert found[-1].l1_bias == pytest.approx(16 * 0.25, rel=1e-5)
    text = norm_shifts(small_bert(), small_bert(1))
    assert (text[0].norm, text[0].depth, len(text)) == ("embeddings.LayerNorm", -1, 7)


def test_correlation_with_depth() -> None:
    assert correlation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(1)
    assert correlation([4.0, 1.0, 3.0]) == pytest.approx(-0.32732683535)
    assert correlation([1.0, 1.0, 1.0]) is None
    assert correlation([1.0, 2.0]) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, shapes_once: Path) -> Path:
    """All norms trained, of both towers."""
    media = FolderMedia(root=shapes_once.parent)
    out = tmp_path_factory.mktemp("norms") / "run"
    recipe = load_recipe(
        "lilt-d",
        ["schedule.epochs=1", "schedule.batch_size=4", "optimizer.lr=1e-2"],
    )
    spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu")
    fit_encoder(
        FeatureStore.open(tiny_store),
        recipe=recipe,
        out=out,
        spec=spec,
        open_image=lambda key: load_image(key, media).image,
    )
    return out


def test_a_run_that_trained_its_norms(run: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["analyze", str(run), "--layernorm-shift", "--device", "cpu", "--json"],
    )
    assert done.exit_code == 0, done.output
    value: Any = json.loads(done.stdout.splitlines()[-1])
    assert [side["side"] for side in value["sides"]] == ["image", "text"]
    for side in value["sides"]:
        assert all(norm["l1_weight"] > 0 and norm["l1_bias"] > 0 for norm in side["norms"])
        assert -1 <= side["correlation_weight"] <= 1
    chart = (run / "layernorm-shift-text.svg").read_text()
    assert chart.count("<rect") == len(value["sides"][1]["norms"]) == 5
    shown = CliRunner().invoke(app, ["analyze", str(run), "--layernorm-shift", "--device", "cpu"])
    assert "correlation with depth" in shown.output
    assert CliRunner().invoke(app, ["analyze", str(run)]).exit_code == 2


def test_a_run_of_heads_is_refused(tiny_run: Path) -> None:
    with pytest.raises(RunError, match="no tower of this run was trained"):
        layernorm_shift(load_run(tiny_run), "cpu")


def test_the_longest_bar_is_the_largest_shift(run: Path) -> None:
    report = layernorm_shift(load_run(run), "cpu")[0]
    assert f'width="{640 - 260 - 70:.1f}"' in bar_chart(report)
