"""The forecast measures nested subsets and what else would help."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_pairs import Planted
from recipes import SMALL

from apecache.auto.fold_fit import select_images
from apecache.auto.forecast import ForecastSpec, forecast, scaled_recipe, subset
from apecache.errors import OptionError, RecipeError
from apecache.recipes.recipe import load_recipe
from apecache.report.auto_page import write_forecast_page
from apecache.train.batches import FeaturePairs, SplitSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_curve_prediction_and_gains(clean: Planted, tmp_path: Path) -> None:
    spec = ForecastSpec(
        recipe="cca",
        image_features="eye0",
        splits=SplitSpec(dev="val"),
        shares=(0.25, 0.5, 1.0),
        seeds=2,
        device="cpu",
    )
    fitted: list[str] = []
    report = forecast(clean.store, tmp_path, spec, lambda what, _: fitted.append(what))
    assert [point.n_images for point in report.curve] == [65, 130, 260]
    assert all(len(point.recalls) == 2 for point in report.curve)
    means = [np.mean(point.recalls) for point in report.curve]
    assert means[-1] > means[0]
    assert [prediction.n_images for prediction in report.predictions] == [520, 1300, 2600]
    assert all(p.low <= p.recall <= p.high for p in report.predictions)
    changes = [gain.change for gain in report.gains]
    assert changes == ["only 1 caption of each image", "image features eye1 beside"]
    assert all(gain.baseline == pytest.approx(means[-1]) for gain in report.gains)
    assert json.loads((tmp_path / "forecast.json").read_text())["n_train_images"] == 260
    assert len(fitted) == 8
    page = write_forecast_page(report, tmp_path / "index.html").read_text()
    assert "What would help cca?" in page


def test_subsets_are_nested() -> None:
    small, large = subset(100, 10, seed=3), subset(100, 50, seed=3)
    assert set(small) < set(large)
    assert not set(subset(100, 10, seed=4)) <= set(large)


def test_a_subset_takes_as_many_steps_as_the_whole() -> None:
    recipe = load_recipe(SMALL, ["schedule.batch_size=1024"])
    assert scaled_recipe(recipe, 0.25).schedule.batch_size == 256
    assert scaled_recipe(recipe, 0.001).schedule.batch_size == 32


def test_selected_images_keep_their_own_texts() -> None:
    pairs = FeaturePairs(
        image=torch.arange(4.0).unsqueeze(1),
        text=torch.tensor([0.0, 1, 1, 2, 2, 2, 3]).unsqueeze(1),
        first_text=torch.tensor([0, 1, 3, 6, 7]),
        content=torch.tensor([0, 1, 2, 1]),
        caption_ids=torch.arange(7),
    )
    chosen = select_images(pairs, np.array([1, 2]))
    assert chosen.text.squeeze(1).tolist() == [1, 1, 2, 2, 2]
    assert chosen.image_of_text.tolist() == [0, 0, 1, 1, 1]
    assert chosen.content is not None
    assert chosen.content.tolist() == [1, 2]
    assert chosen.caption_ids is not None
    assert chosen.caption_ids.tolist() == [1, 2, 3, 4, 5]
    first = select_images(pairs, np.array([2, 3]), max_captions=2)
    assert first.text.squeeze(1).tolist() == [2, 2, 3]


def test_what_makes_no_curve_is_refused(clean: Planted, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least 3 different"):
        forecast(clean.store, tmp_path, ForecastSpec(shares=(0.5, 1.0)))
    spec = ForecastSpec(recipe="cca", image_features="eye0", shares=(0.01, 0.5, 1), device="cpu")
    with pytest.raises(RecipeError, match="at least 40"):
        forecast(clean.store, tmp_path, spec)
    with pytest.raises(RecipeError, match="within the towers"):
        forecast(clean.store, tmp_path, ForecastSpec(recipe="lit", image_features="eye0"))
