"""`apecache recipes` and `apecache plan` say the same of every recipe; every name is listed and
suggested."""

import json

import pytest
import torch
from apecache_cli.app import app
from small_towers import small_bert, small_vit
from typer.testing import CliRunner

from apecache.encoders.reference import reference_towers
from apecache.encoders.tower import Tower
from apecache.errors import RecipeError
from apecache.plan import counting, counting_shared
from apecache.plan.counting import PlanSpec
from apecache.plan.needs import TRAINS, count_needs, needs_of_sides
from apecache.plan.plan import count_model
from apecache.recipes.recipe import (
    count_parameters,
    freeze_names,
    load_recipe,
    tower_zoo_names,
    zoo_names,
)

ALL = [*zoo_names(), *tower_zoo_names(), *freeze_names()]
SPEC = PlanSpec(rows=10)
runner = CliRunner()


def deep_towers() -> tuple[Tower, Tower]:
    """As deep as the reference encoders, and narrow."""
    with torch.device("meta"):
        return small_vit(depth=12), small_bert(num_hidden_layers=12)


@pytest.mark.parametrize("name", ALL)
def test_recipes_and_plan_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cuts and parameters; operations, which take the planner most of its time, are left out."""
    for module in (counting, counting_shared):
        monkeypatch.setattr(module, "measure", lambda *_, **__: (0, 0, 0))
    recipe = load_recipe(name)
    needs = count_needs(recipe, *deep_towers())
    image, text = deep_towers()
    if needs.n_trained is None:
        with pytest.raises(RecipeError, match="depends on the teacher"):
            count_model(recipe, image=lambda: image, text=lambda: text, spec=SPEC)
        return
    model = count_model(recipe, image=lambda: image, text=lambda: text, spec=SPEC)
    assert needs.n_trained == model.n_trained
    listed = needs_of_sides(recipe)
    sides = zip(
        (needs.image, needs.text),
        model.sides,
        (recipe.image, recipe.text),
        ("image", "text"),
        strict=True,
    )
    for said, side, head, modality in sides:
        expected = {None: TRAINS, "pooled": head.cut}.get(
            side.cut,
            f"tokens after {side.cut} of 12 blocks",
        )
        assert said == expected
        of_side = (
            listed
            if ";" not in listed
            else dict(part.split(": ") for part in listed.split("; "))[modality]
        )
        assert (of_side == TRAINS) == (side.cut != "pooled")
    if recipe.trains_heads_alone:
        assert needs.n_trained == count_parameters(recipe, image.output_dim, text.output_dim)


@pytest.mark.parametrize("name", ["sharelock", "cca", "asif"])
def test_heads_with_batch_norm_and_closed_forms_are_planned(name: str) -> None:
    with torch.device("meta"):
        image = small_vit(depth=1)
        text = small_bert(num_hidden_layers=1)
    model = count_model(load_recipe(name), image=lambda: image, text=lambda: text, spec=SPEC)
    assert model.n_trained == count_parameters(load_recipe(name), 16, 16)


def test_a_named_recipe_is_counted_with_the_reference_encoders() -> None:
    result = runner.invoke(app, ["recipes", "lilt-i", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["recipes"]
    recipe = load_recipe("lilt-i")
    pooling = (recipe.towers.image_pooling, recipe.towers.text_pooling)
    model = count_model(
        recipe,
        image=lambda: reference_towers(*pooling)[0],
        text=lambda: reference_towers(*pooling)[1],
        spec=SPEC,
    )
    assert row["n_trained_parameters"] == model.n_trained
    assert row["counted_with"] == "timm:vit_base_patch16_224 and hf:bert-base-uncased"
    assert [side.cut for side in model.sides] == [None, None]
    assert row["cut"] == TRAINS


def test_the_reference_encoders_have_their_published_sizes() -> None:
    """ViT-B/16 without its classifier 85.8 M (Dosovitskiy et al. 2021), BERT-base without its
    pooler 108.9 M."""
    image, text = reference_towers()
    counts = [sum(p.numel() for p in tower.parameters()) for tower in (image, text)]
    assert counts == [85_798_656, 108_891_648]


def test_a_recipe_that_depends_on_its_teacher_gives_no_figure() -> None:
    result = runner.invoke(app, ["recipes", "see-hear-read"])
    assert result.exit_code == 0, result.output
    assert "depends on the" in result.stderr


def test_every_name_is_listed() -> None:
    found = json.loads(runner.invoke(app, ["recipes", "--json"]).stdout)
    assert {row["name"] for row in found["recipes"]} | set(found["encoder_recipes"]) == set(ALL)
    assert len(freeze_names()) == 36


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("freeze/Vuf-Tu", "freeze/Vuf-Tuu"),
        ("lilt_a", "lilt-a"),
        ("Vuf-Tuu", "freeze/Vuf-Tuu"),
        ("V_u^f T_u^u", "freeze/Vuf-Tuu"),
        ("freze/Vcf-Tcu", "freeze/Vcf-Tcu"),
    ],
)
def test_a_misspelled_name_is_answered_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean .*{right}"):
        load_recipe(wrong)
