"""Space files: what they offer, and what is refused."""

from pathlib import Path

import pytest
from recipes import SMALL

from apecache.errors import RecipeError
from apecache.sweeps.space import Space, load_space


def make(folder: Path, text: str, *recipes: str) -> Space:
    (folder / "space.toml").write_text(text)
    return load_space(folder / "space.toml", recipes or (SMALL,))


ALL = """
"optimizer.lr" = {log = [1e-4, 1e-2]}
"image.kind" = {choice = ["linear", "mlp"]}
"image.depth" = {int = [1, 6], if = {"image.kind" = "mlp"}}
"image.dropout" = {float = [0.0, 0.9], if = {"image.kind" = ["mlp", "gated"]}}
"text.depth" = {int = [1, 2], if = {"text.kind" = "mlp"}}
"""


def test_points_lie_in_their_ranges_and_conditions_hold(tmp_path: Path) -> None:
    space = make(tmp_path, ALL)
    points = [space.draw(0, number) for number in range(200)]
    assert {p["image.kind"] for p in points} == {"linear", "mlp"}
    for point in points:
        assert 1e-4 <= point["optimizer.lr"] <= 1e-2 * (1 + 1e-9)
        assert (
            ("image.depth" in point) == ("image.dropout" in point) == (point["image.kind"] == "mlp")
        )
        assert "text.depth" not in point  # the recipe's own text head is linear
        recipe = space.recipe(point)
        assert (recipe.optimizer.lr, recipe.image.kind) == (
            point["optimizer.lr"],
            point["image.kind"],
        )
    assert {p["image.depth"] for p in points if "image.depth" in p} == set(range(1, 7))
    assert 60 < sum(p["optimizer.lr"] < 1e-3 for p in points) < 140


def test_a_point_depends_on_its_number_alone(tmp_path: Path) -> None:
    space = make(tmp_path, ALL)
    assert space.draw(3, 7) == space.draw(3, 7)
    assert space.draw(3, 7) != space.draw(3, 8)
    assert space.draw(3, 7) != space.draw(4, 7)


def test_a_grid_has_every_point_once(tmp_path: Path) -> None:
    points = list(make(tmp_path, ALL).grid())
    assert len(points) == 3 * (1 + 3 * 3)
    assert len({str(sorted(p.items())) for p in points}) == len(points)
    assert sorted({p["optimizer.lr"] for p in points}) == pytest.approx([1e-4, 1e-3, 1e-2])


def test_several_recipes_are_a_choice_too(tmp_path: Path) -> None:
    space = make(
        tmp_path,
        '"text.depth" = {choice = [3], if = {recipe = "ape"}}',
        "projection",
        "ape",
    )
    assert list(space.grid()) == [{"recipe": "projection"}, {"recipe": "ape", "text.depth": 3}]
    assert space.settings({"recipe": "ape", "text.depth": 3}) == ("text.depth=3",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to choose"),
        ("x = {", "not TOML"),
        ('"optimizer.lr" = {log = [0, 1]}', "begins above 0"),
        ('"optimizer.lr" = {float = [2, 1]}', r"a range is \[low, high\]"),
        ('"optimizer.lr" = {float = [0, 1], int = [0, 1]}', "exactly one of"),
        ('"optimizer.lr" = {lgo = [1, 2]}', "Extra inputs"),
        ('a = {int = [0, 1], if = {b = 1}}\nb = {int = [0, 1]}', "a depends on b, which must stand above"),
    ],
)  # fmt: skip
def test_what_is_no_space_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make(tmp_path, text)
    with pytest.raises(RecipeError, match="No such file"):
        load_space(tmp_path / "none.toml", [SMALL])
