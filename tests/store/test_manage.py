"""Views, splits and features are managed by functions that take the place of a store."""

from pathlib import Path

import pytest
from tiny import Grown

import apecache
from apecache.errors import StoreError


def test_splits_by_shares_and_views_by_the_place_of_the_store(grown: Grown) -> None:
    place = str(grown.store)
    n_before = len(apecache.list_views(place))
    record = apecache.split_store(place, {"train": 0.5, "val": 0.5}, seed=1)
    assert apecache.list_views(place)[-1].view == record.view
    assert len(apecache.list_views(place)) > n_before
    splits = apecache.FeatureStore.open(place).pairs.split_counts()
    assert set(splits) == {"train", "val"}
    with pytest.raises(StoreError, match="is the newest view, which is in use"):
        apecache.remove_views(place, record.view)
    first = apecache.list_views(place)[0].view
    assert apecache.remove_views(place, first) == [first]
    assert first not in [view.view for view in apecache.list_views(place)]
    assert apecache.compact_store(place).n_bytes >= 0
    assert apecache.verify_store(place).sound


def test_nothing_is_removed_if_one_of_the_views_cannot_be(grown: Grown) -> None:
    apecache.split_store(grown.store, {"train": 1.0})
    views = [view.view for view in apecache.list_views(grown.store)]
    with pytest.raises(StoreError):
        apecache.remove_views(grown.store, *views)
    assert [view.view for view in apecache.list_views(grown.store)] == views


def test_features_of_one_encoder_are_removed(grown: Grown) -> None:
    (array,) = apecache.FeatureStore.open(grown.store).arrays("text")
    report = apecache.remove_features(grown.store, f"text/{array.name}")
    assert (report.modality, report.name) == ("text", array.name)
    assert report.n_objects > 0
    assert apecache.FeatureStore.open(grown.store).arrays("text") == []


@pytest.mark.parametrize("function", [apecache.list_views, apecache.compact_store])
def test_a_folder_that_is_not_a_store_is_refused(function: object, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        function(tmp_path)  # type: ignore[operator]
    with pytest.raises(StoreError):
        apecache.split_store(tmp_path, {"train": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_names_alone(tiny_image_encoder: Path, tiny_text_encoder: Path) -> None:
    plan = apecache.plan_recipe(
        "lit",
        image=apecache.parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=apecache.parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        spec=apecache.PlanSpec(rows=1000, tokens=16),
        device="H100",
    )
    assert plan.image.cut == "pooled"
    assert plan.text.cut is None
    assert 0 < plan.n_trained < plan.n_parameters


def test_the_names_of_all_recipes_load() -> None:
    names = apecache.recipe_names()
    assert {"projection", "lit", "freeze/Vuf-Tuu"} <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert apecache.load_recipe(name).name == name
