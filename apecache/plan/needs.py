"""What a recipe needs of the cache and how much it trains, from the planner's own functions."""

from dataclasses import dataclass

from apecache.encoders.tower import Cut, Tower
from apecache.fingerprint import Modality
from apecache.models.freezing import count_trained, find_cut
from apecache.plan.counting_shared import count_shared_trained
from apecache.plan.plan import match_towers, scalars
from apecache.recipes.recipe import Recipe

LIVE = "live tower"
TRAINS = "tower trains"
"""Live, or from the tokens after some block: that depends on the encoder's depth."""


@dataclass(frozen=True, kw_only=True)
class RecipeNeeds:
    image: str
    """`pooled`, `tokens`, `tokens after K of N blocks`, or `live tower`: nothing of that side can
    be cached."""
    text: str
    n_trained: int | None
    """None: it depends on a teacher."""

    @property
    def summary(self) -> str:
        """One word where both sides are alike, else both named."""
        return self.image if self.image == self.text else f"image: {self.image}; text: {self.text}"


def needs_of_sides(recipe: Recipe) -> str:
    """Say for each side which features are cached, or that its tower trains, which holds for all
    encoders."""
    return RecipeNeeds(
        image=_side(recipe, "image"),
        text=_side(recipe, "text"),
        n_trained=None,
    ).summary


def _side(recipe: Recipe, side: Modality) -> str:
    spec = recipe.image if side == "image" else recipe.text
    return TRAINS if recipe.towers.may_train(side) else spec.cut


def count_needs(recipe: Recipe, image: Tower, text: Tower) -> RecipeNeeds:
    """Say what `plan` says of cuts and parameters, without counting operations.

    Args:
        image: fresh, on the meta device, as is `text`; adapters are put into them.

    Raises:
        RecipeError: rules, adapters or widths do not fit the towers.
    """
    if recipe.shared is not None:
        return RecipeNeeds(image=LIVE, text=LIVE, n_trained=_shared_trained(recipe, image, text))
    _, matches = match_towers(recipe.towers, recipe=recipe, image=image, text=text)
    n_scalars = sum(trained for _, trained, _ in scalars(recipe))
    cuts = [find_cut(matches, tower).cut for tower in (image, text)]
    described = []
    for cut, tower, spec in zip(cuts, (image, text), (recipe.image, recipe.text), strict=True):
        named: dict[Cut | None, str] = {None: LIVE, "pooled": spec.cut}
        described.append(named.get(cut, f"tokens after {cut} of {tower.n_blocks} blocks"))
    return RecipeNeeds(
        image=described[0],
        text=described[1],
        n_trained=count_trained(matches) + n_scalars,
    )


def _shared_trained(recipe: Recipe, image: Tower, text: Tower) -> int | None:
    if recipe.distillation is not None and recipe.distillation.kind == "classes":
        return None
    return count_shared_trained(recipe, (image, text))
