"""Open and load the features that the trials of a sweep read."""

from dataclasses import dataclass, field

from apecache.device import resolve_device
from apecache.encoders.spec import Pooling
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.sweeps.population.population import STANDARDIZED_BYTES
from apecache.train.batches import FeaturePairs
from apecache.train.head_data import FitSpec, load_splits, require_kind
from apecache.train.pooling import asked_pooling, cached_arrays
from apecache.train.pretrained import with_own_scale

Arrays = tuple[FeatureArray, FeatureArray]
"""Features of images, and of texts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepSplits:
    """Hold the pairs of a sweep's splits, in memory.

    Compared by identity, so that it can be a key.
    """

    train: FeaturePairs
    dev: FeaturePairs


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """Give each trial the features that `fit_head` reads for its recipe.

    Recipes that ask for different poolings read different features. Each set is loaded once.
    """

    store: FeatureStore
    fit: FitSpec
    """Settings of the fits."""
    memory_bytes: int
    """Memory that heads which train together may take."""
    opened: dict[tuple[Pooling, Pooling], Arrays] = field(default_factory=dict)
    """By the poolings that recipes ask for, image before text."""
    loaded: dict[tuple[str, str], SweepSplits] = field(default_factory=dict)
    """By the names of the features."""

    def arrays(self, recipe: Recipe) -> Arrays:
        """Open the features that a recipe reads; raises as `cached_array` does."""
        poolings = asked_pooling(recipe, "image"), asked_pooling(recipe, "text")
        # Trials are many and poolings few: records are read once.
        if poolings not in self.opened:
            self.opened[poolings] = cached_arrays(
                self.store,
                recipe=recipe,
                image_name=self.fit.image_features,
                text_name=self.fit.text_features,
            )
        return self.opened[poolings]

    def completed(self, recipe: Recipe) -> Recipe:
        """Return a recipe as `fit_head` fits it; raises as `with_own_scale` does."""
        image, text = self.arrays(recipe)
        return with_own_scale(recipe, image.record.spec, text.record.spec)

    def require_kinds(self, recipe: Recipe) -> None:
        """Raise RecipeError if a head of the recipe does not take the kind of its features."""
        image, text = self.arrays(recipe)
        require_kind(image, recipe.image, recipe.name)
        require_kind(text, recipe.text, recipe.name)

    def splits(self, recipe: Recipe) -> SweepSplits:
        """Load the pairs that a recipe trains and is measured on. Raises as `fit_head` does."""
        image, text = self.arrays(recipe)
        names = image.name, text.name
        if names not in self.loaded:
            train, dev = load_splits(
                self.store,
                image=image,
                text=text,
                spec=self.fit.splits,
                device=resolve_device(self.fit.device),
                reserved_bytes=self.memory_bytes + STANDARDIZED_BYTES,
                keep=self.fit.keep,
            )
            self.loaded[names] = SweepSplits(train=train, dev=dev)
        return self.loaded[names]
