"""Heads and losses of one's own: registered under a name, trained, saved, and opened again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apecache
from apecache.errors import OptionError, RecipeError
from apecache.heads import registered as heads
from apecache.heads.build import build_head
from apecache.heads.head import HeadSpec
from apecache.losses import registered as losses
from apecache.losses.contrastive import Groups, info_nce
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.sweeps.population.stacked_heads import structure_of
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

pytestmark = pytest.mark.usefixtures("one_thread")

N_TRAIN = 96
N_DEV = 24
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")


@pytest.fixture(autouse=True)
def empty_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads.HEADS, "by_name", {})
    monkeypatch.setattr(losses.LOSSES, "by_name", {})


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """120 images with one caption each, two linear views of the same six numbers."""
    rng = np.random.default_rng(0)
    n_images = N_TRAIN + N_DEV
    hidden = rng.normal(size=(n_images, 6))
    image = (hidden @ rng.normal(size=(6, 12))).astype(np.float32)
    text = (hidden @ rng.normal(size=(6, 10))).astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("custom") / "s",
        image,
        text,
        list(range(n_images)),
        ["train"] * N_TRAIN + ["dev"] * N_DEV,
    )
    return made


def short_recipe(*settings: str) -> Recipe:
    common = ["schedule.epochs=4", "schedule.batch_size=32", "optimizer.lr=0.02"]
    return load_recipe("projection", [*common, *settings])


class TwoLayers(nn.Sequential):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, 32), nn.GELU(), nn.Linear(32, out_dim))


CUSTOM_HEADS = (
    "image.kind=custom",
    "image.custom=two-layers",
    "image.dim=8",
    "text.kind=linear",
    "text.dim=8",
)


def test_a_registered_head_trains_and_is_opened_again(store: FeatureStore, tmp_path: Path) -> None:
    apecache.register_head("two-layers")(TwoLayers)
    report = fit_head(store, short_recipe(*CUSTOM_HEADS), tmp_path / "run", CPU)
    assert report.dev.mean_recall > report.untrained.mean_recall + 20
    image_head = load_heads(tmp_path / "run").image.head
    features = torch.randn(5, 12)
    embeddings = image_head(features)
    assert embeddings.shape == (5, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    # Standardization before the module and L2 normalization after it are added.
    body: Any = image_head.body
    expected = body((features - image_head.mean) / image_head.deviation)
    torch.testing.assert_close(embeddings, nn.functional.normalize(expected, dim=1))


def test_a_run_whose_head_is_not_registered_names_the_remedy(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apecache.register_head("two-layers")(TwoLayers)
    fit_head(store, short_recipe(*CUSTOM_HEADS), tmp_path / "run", CPU)
    monkeypatch.setattr(heads.HEADS, "by_name", {"two-layer": TwoLayers})
    message = r"not registered .*register_head\('two-layers'\).*did you mean two-layer\?"
    with pytest.raises(RecipeError, match=message):
        load_heads(tmp_path / "run")
    with pytest.raises(RecipeError, match=message):
        fit_head(store, short_recipe(*CUSTOM_HEADS), tmp_path / "other", CPU)


def test_a_registered_loss_is_what_trains(store: FeatureStore, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    @apecache.register_loss("mine")
    def mine(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        seen.append(tuple(image.shape))
        assert groups is None
        return info_nce(image, text, scale)

    small = ("image.dim=8", "text.dim=8")
    own = short_recipe(*small, "loss.kind=custom", "loss.custom=mine")
    by_own = fit_head(store, own, tmp_path / "own", CPU)
    by_infonce = fit_head(store, short_recipe(*small), tmp_path / "infonce", CPU)
    # The checks before a fit take batches too.
    assert set(seen) == {(32, 8)}
    assert len(seen) >= 4 * N_TRAIN // 32
    # The same formula gives the same weights.
    assert by_own.dev.mean_recall == by_infonce.dev.mean_recall


def test_names_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    apecache.register_head("two-layers")(TwoLayers)
    # A module or a notebook's cell that runs again registers the same name once more.
    apecache.register_head("two-layers")(TwoLayers)
    with pytest.raises(OptionError, match="registered already"):
        apecache.register_head("two-layers")(nn.Linear)
    apecache.register_loss("mine")(info_nce)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="registered already"):
        apecache.register_loss("mine")(lambda image, text, scale, groups: image.sum())


@pytest.mark.parametrize(
    "settings",
    [
        ["image.kind=custom"],
        ["image.custom=two-layers"],
        ["loss.kind=custom"],
        ["loss.custom=mine"],
    ],
)
def test_a_name_without_the_kind_and_the_kind_without_a_name_are_refused(
    settings: list[str],
) -> None:
    with pytest.raises(RecipeError, match="go together"):
        short_recipe(*settings)


def test_a_registered_head_never_trains_in_a_stack() -> None:
    """A Sequential with a forward of its own would be taken for its layers."""

    class Reversed(nn.Sequential):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features).flip(1)

    apecache.register_head("reversed")(lambda n, m: Reversed(nn.Linear(n, m)))
    custom = build_head(HeadSpec(kind="custom", custom="reversed", dim=8), 12, 8)
    assert structure_of(custom) is None
    assert structure_of(build_head(HeadSpec(kind="linear", dim=8), 12, 8)) is not None
