"""Bars for calls that take a `progress`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import extract_tiny, make_shapes

import apecache
from apecache.progress import progress_bar


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that are drawn."""
    import tqdm.auto

    drawn: list[Any] = []

    class Recorded(tqdm.auto.tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            drawn.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorded)
    return drawn


def figures(bar: Any) -> tuple[str, int, int | None]:
    return bar.desc.removesuffix(": "), bar.n, bar.total


def test_an_extraction_has_a_bar_for_each_modality(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    bars: list[Any],
) -> None:
    table = make_shapes(tmp_path / "shapes")
    spec = apecache.ExtractSpec(
        image=apecache.parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=apecache.parse_encoder(f"hf:{tiny_text_encoder}", "text"),
    )
    source = apecache.open_pairs(table)
    apecache.extract(source, tmp_path / "store", spec, progress_bar())
    assert [figures(bar) for bar in bars] == [("image", 12, 12), ("text", 24, 24)]
    # A second call has nothing to do, and its bars are full at once.
    bars.clear()
    apecache.extract(source, tmp_path / "store", spec, progress_bar())
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(12, 12, 12), (24, 24, 24)]


@pytest.mark.usefixtures("one_thread")
def test_a_fit_has_a_bar_of_epochs(tiny_store: Path, tmp_path: Path, bars: list[Any]) -> None:
    recipe = apecache.load_recipe(
        "projection", ["image.dim=16", "text.dim=16", "schedule.epochs=3"]
    )
    apecache.fit_head(
        apecache.FeatureStore.open(tiny_store),
        recipe=recipe,
        out=tmp_path / "run",
        spec=apecache.FitSpec(splits=apecache.SplitSpec(dev="val")),
        progress=progress_bar(3),
    )
    assert [figures(bar) for bar in bars] == [("epochs", 3, 3)]
    assert "loss" in bars[0].postfix
    assert "mean recall on dev" in bars[0].postfix


def test_a_bar_without_a_total_counts(bars: list[Any]) -> None:
    show = progress_bar()
    for number, mean in enumerate((20.0, None)):
        show(SimpleNamespace(number=number, mean=mean))
    assert figures(bars[0]) == ("trials", 2, None)
    assert bars[0].postfix == "failed"
    bars[0].close()


def test_another_progress_is_refused_by_name() -> None:
    with pytest.raises(apecache.ApecacheError, match="str has no known form"):
        progress_bar()("encoder 1")  # type: ignore[arg-type]


def test_an_import_has_bars_too(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    bars: list[Any],
) -> None:
    table = make_shapes(tmp_path / "shapes")
    store = tmp_path / "store"
    extract_tiny(table, store=store, image=tiny_image_encoder, text=tiny_text_encoder)
    features = apecache.FeatureStore.open(store).array("image").load()
    spec = apecache.ImportSpec(image=apecache.FeatureInput(features=features), by_row=True)
    apecache.import_features(
        tmp_path / "imported", spec, apecache.open_pairs(table), progress_bar()
    )
    assert [figures(bar) for bar in bars] == [("image", 12, 12)]
