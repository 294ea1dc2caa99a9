"""Say what a recipe needs from the cache and how much it trains, by the planner's functions."""

from dataclasses import dataclass

from apecache.encoders.tower import Cut, Tower
from apecache.fingerprint import Modality
from apecache.models.freezing import count_trained, find_cut
from apecache.plan.counting_shared import count_shared_trained
from apecache.plan.plan import match_towers, scalars
from apecache.recipes.recipe import Recipe

TRAINS = "trains the tower"
"""The tower runs in every step. In `needs_of_sides` it may run from the tokens after some block
alone, which the encoder's depth decides."""


@dataclass(frozen=True, kw_only=True)
class RecipeNeeds:
    """Hold the features that a recipe reads from the cache and its number of trained parameters."""

    image: str
    """`pooled`, `tokens`, `tokens after K of N blocks`, or `trains the tower`: nothing of that
    side can be cached."""
    text: str
    n_trained: int | None
    """None: it depends on a teacher."""

    @property
    def summary(self) -> str:
        """Return one name if both sides read the same features, else name both sides."""
        return self.image if self.image == self.text else f"image: {self.image}; text: {self.text}"


def needs_of_sides(recipe: Recipe) -> str:
    """Say for each side which features are cached, or that its tower trains, for any encoders."""
    needs = RecipeNeeds(
        image=_side(recipe, "image"),
        text=_side(recipe, "text"),
        n_trained=None,
    )
    return needs.summary


def _side(recipe: Recipe, side: Modality) -> str:
    spec = recipe.image if side == "image" else recipe.text
    return TRAINS if recipe.towers.may_train(side) else spec.cut


def count_needs(recipe: Recipe, image: Tower, text: Tower) -> RecipeNeeds:
    """Find the same cuts and parameters as `plan`, without counting operations.

    Args:
        image: fresh, on the meta device; the recipe's adapters are put into it.
        text: the same.

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers.
    """
    if recipe.shared is not None:
        return RecipeNeeds(
            image=TRAINS,
            text=TRAINS,
            n_trained=_shared_trained(recipe, image, text),
        )
    _, matches = match_towers(recipe.towers, recipe=recipe, image=image, text=text)
    n_scalars = sum(trained for _, trained, _ in scalars(recipe))
    cuts = [find_cut(matches, tower).cut for tower in (image, text)]
    described = []
    for cut, tower, spec in zip(cuts, (image, text), (recipe.image, recipe.text), strict=True):
        # Where nothing within the tower trains, the head decides whether it reads tokens.
        named: dict[Cut | None, str] = {None: TRAINS, "pooled": spec.cut}
        described.append(named.get(cut, f"tokens after {cut} of {tower.n_blocks} blocks"))
    return RecipeNeeds(
        image=described[0],
        text=described[1],
        n_trained=count_trained(matches) + n_scalars,
    )


def _shared_trained(recipe: Recipe, image: Tower, text: Tower) -> int | None:
    # The distillation layer is as wide as the teacher has classes.
    if recipe.distillation is not None and recipe.distillation.kind == "classes":
        return None
    return count_shared_trained(recipe, (image, text))
