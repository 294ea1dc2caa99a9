"""The teacher of a recipe is the cut that its distillation learns from; else a mismatch with the
command."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.data.sources import open_pairs
from apecache.device import CPU
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import MismatchError, RecipeError
from apecache.extraction.run import ExtractSpec, extract
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.encoder_data import open_teacher

MakeStore = Callable[..., FeatureStore]
CLS = "tiny-vit-cls-layer-1"
RECIPES = (
    ("shared-encoder", "contrastive", "cls@-1"),
    ("shared-encoder", "mse", "cls@-1"),
    ("see-hear-read", "classes", "default"),
)


@pytest.fixture
def own(tiny_image_encoder: Path) -> EncoderSpec:
    return parse_encoder(f"timm:{tiny_image_encoder}", "image")


@pytest.fixture
def make_store(shapes_once: Path, tmp_path: Path) -> MakeStore:
    """Make a store of images with these cuts, each of one encoder."""

    def make(*cuts: EncoderSpec) -> FeatureStore:
        spec = ExtractSpec(image=cuts, device="cpu")
        extract(open_pairs(shapes_once), tmp_path / "store", spec)
        return FeatureStore.open(tmp_path / "store")

    return make


def teacher_name(store: FeatureStore, recipe_name: str, kind: str, *settings: str) -> str:
    recipe = load_recipe(recipe_name, [f"distillation.kind={kind}", *settings])
    teacher = open_teacher(store, recipe, CPU)
    assert teacher is not None
    return teacher.array.name


@pytest.mark.parametrize(("recipe_name", "kind", "cut"), RECIPES)
def test_the_teacher_is_found_among_other_features(
    recipe_name: str,
    kind: str,
    cut: str,
    own: EncoderSpec,
    make_store: MakeStore,
) -> None:
    cls = replace(own, pooling="cls")
    store = make_store(own, cls, replace(cls, layer=-1), replace(own, pooling="mean", layer=-1))
    expected = "tiny-vit" if cut == "default" else CLS
    assert teacher_name(store, recipe_name, kind) == expected


@pytest.mark.parametrize(("recipe_name", "kind", "cut"), RECIPES)
def test_features_of_another_cut_are_refused_with_the_command_that_adds_the_teachers(
    recipe_name: str,
    kind: str,
    cut: str,
    own: EncoderSpec,
    make_store: MakeStore,
    shapes_once: Path,
) -> None:
    store = make_store(replace(own, pooling="cls"))
    with pytest.raises(MismatchError) as caught:
        teacher_name(store, recipe_name, kind)
    assert caught.value.exit_code == 4
    needed = "their encoder's own pooling" if cut == "default" else f"the cut {cut}"
    expected = f"none with {needed}, from which distillation.kind {kind} learns"
    assert expected in str(caught.value)
    command = str(caught.value).split("with: ")[1].replace("SOURCE", str(shapes_once))
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--device", "cpu"])
    assert result.exit_code == 0, result.output
    added = "tiny-vit" if cut == "default" else CLS
    assert teacher_name(FeatureStore.open(store.path), recipe_name, kind) == added


def test_features_that_the_recipe_names_are_taken(own: EncoderSpec, make_store: MakeStore) -> None:
    store = make_store(own)
    setting = "distillation.teacher=tiny-vit"
    assert teacher_name(store, "shared-encoder", "contrastive", setting) == "tiny-vit"
    with pytest.raises(RecipeError, match=r"not the teacher 'dino'.*--image-cut cls@-1"):
        teacher_name(store, "shared-encoder", "mse", "distillation.teacher=dino")


def test_of_two_possible_teachers_one_must_be_named(
    own: EncoderSpec,
    make_store: MakeStore,
    shapes_once: Path,
) -> None:
    cls = replace(own, pooling="cls", layer=-1)
    store = make_store(cls)
    other = ExtractSpec(image=replace(cls, resize="torchvision"), device="cpu", add=True)
    extract(open_pairs(shapes_once), store.path, other)
    both = FeatureStore.open(store.path)
    with pytest.raises(RecipeError, match=r"2 could be the teacher's; set distillation\.teacher"):
        teacher_name(both, "shared-encoder", "contrastive")
    named = f"distillation.teacher={CLS}"
    assert teacher_name(both, "shared-encoder", "contrastive", named) == CLS
