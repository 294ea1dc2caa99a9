"""Offer any recipe on pooled features as a scikit-learn estimator of paired arrays.

Its interface is that of `sklearn.cross_decomposition.CCA`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from apecache.device import resolve_device
from apecache.errors import RecipeError
from apecache.heads.head import embed
from apecache.metrics.retrieval import RetrievalReport, retrieval_report
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import run_training
from apecache.train.model import AlignmentModel
from apecache.train.recorded_steps import recorded_steps

if TYPE_CHECKING:
    from sklearn.utils import Tags

LEAST_ROWS = 4
"""Two rows to train on and two to choose the epoch on."""
Array = NDArray[np.float32]


class AlignmentHead(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fit heads that bring row i of X and row i of y together.

    X and y are float [n, width]; a vector y is one column. Embeddings are float32 [n, dim],
    L2-normalized. Rows with equal X are not treated as one image.

    Args:
        recipe: a name or a file, as `load_recipe` takes it, or a Recipe.
        settings: overrides of the recipe.
        dev_fraction: share of the rows that chooses the epoch, or the free settings of a closed
            form; at least 2 rows, at most half. They are drawn by `random_state`. The other rows
            are fitted.
        random_state: seed, or a generator.
        device: where the heads are trained: auto, cpu, cuda or cuda:N.

    Attributes:
        model_: heads and temperature.
        dev_report_: recall on the dev rows.
        history_: the report of each epoch.
        n_features_in_: width of X.
        n_features_y_: width of y.
    """

    def __init__(
        self,
        recipe: str | Recipe = "projection",
        settings: Sequence[str] = (),
        dev_fraction: float = 0.1,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        self.dev_fraction = dev_fraction
        self.random_state = random_state
        self.device = device

    def fit(self, X: ArrayLike, y: ArrayLike) -> "AlignmentHead":
        """Fit the heads.

        Raises:
            RecipeError: the recipe needs tokens or trains towers. It is a ValueError.
            ValueError: arrays that do not fit each other, or a wrong `dev_fraction`.
        """
        options = {
            "dtype": np.float32,
            "multi_output": True,
            "y_numeric": True,
            "ensure_min_samples": LEAST_ROWS,
        }
        images, raw_texts = validate_data(self, X, y, **options)
        texts = _columns(raw_texts)
        recipe = _recipe(self.recipe, self.settings)
        if not 0 < self.dev_fraction <= 0.5:
            raise ValueError(
                f"dev_fraction {self.dev_fraction}: expected a share above 0, at most 0.5"
            )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        train, dev = _split(
            images,
            y=texts,
            fraction=self.dev_fraction,
            seed=seed,
            device=resolve_device(self.device),
        )
        model, _ = initial_model(recipe, train=train, dev=dev, seed=seed)
        training = HeadFit(model, recipe, seed)
        # Another seed than that of the weights, so that the two draws are independent.
        with seeded(seed + 1, train.place):
            plan = StepCount.of(recipe, train)
            run_training(
                training,
                train=train,
                dev=dev,
                plan=plan,
                log=lambda _: None,
                save=lambda _: None,
                recorded=recorded_steps(training, train, plan),
            )
        model.load_state_dict(training.best.weights)
        self.model_: AlignmentModel = model.eval().requires_grad_(False)
        self.history_ = training.history
        self.n_features_y_ = texts.shape[1]
        dev_image = self._embed("image", dev.image)
        dev_text = self._embed("text", dev.text)
        self.dev_report_ = _report(dev_image, dev_text)
        self._n_features_out = model.image.out_dim
        return self

    def transform(self, X: ArrayLike, y: ArrayLike | None = None) -> Array | tuple[Array, Array]:
        """Embed X, or X and y."""
        check_is_fitted(self)
        image = self._embed_image(X)
        if y is None:
            return image.cpu().numpy()
        text = self._embed_text(y)
        return image.cpu().numpy(), text.cpu().numpy()

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return the mean R@1 of both directions among these rows, a share in [0, 1]."""
        check_is_fitted(self)
        image = self._embed_image(X)
        text = self._embed_text(y)
        if len(image) != len(text):
            raise ValueError(
                f"X has {len(image)} rows and y {len(text)}; row i of one belongs to row i of "
                "the other"
            )
        return _report(image, text).mean_recall_at_1 / 100

    def _embed_image(self, X: ArrayLike) -> torch.Tensor:
        checked = validate_data(self, X, dtype=np.float32, reset=False)
        return self._embed("image", _tensor(checked))

    def _embed_text(self, y: ArrayLike) -> torch.Tensor:
        return self._embed("text", _tensor(self._checked(y)))

    def _checked(self, y: ArrayLike) -> Array:
        """Return y as float32 [n, width], with the width of the fit."""
        texts = _columns(check_array(y, dtype=np.float32, ensure_2d=False, input_name="y"))
        if texts.shape[1] != self.n_features_y_:
            raise ValueError(
                f"y has {texts.shape[1]} features, but {type(self).__name__} was fitted with "
                f"{self.n_features_y_}"
            )
        return texts

    def _embed(self, side: str, features: torch.Tensor) -> torch.Tensor:
        return embed(getattr(self.model_, side), features)

    def __sklearn_tags__(self) -> "Tags":
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _recipe(recipe: str | Recipe, settings: Sequence[str]) -> Recipe:
    """Load a recipe, and refuse one that needs more than pooled features."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings)
    if not loaded.trains_heads_alone or loaded.cut != "pooled":
        raise RecipeError(
            f"recipe {loaded.name} needs more than pooled features; choose another (apecache "
            "recipes)"
        )
    return loaded


def _columns(y: NDArray[Any]) -> Array:
    """Return [n, width]; a vector becomes one column."""
    return np.asarray(y, np.float32).reshape(len(y), -1)


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    """Convert to a tensor with memory of its own."""
    # A copy: Torch warns of memory that cannot be written.
    return torch.from_numpy(np.array(values, np.float32, order="C"))


def _split(
    X: Array,
    y: Array,
    fraction: float,
    seed: int,
    device: torch.device,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Split rows into training and dev pairs; both keep the order of the rows."""
    n_dev = min(max(2, round(fraction * len(X))), len(X) // 2)
    is_dev = np.zeros(len(X), bool)
    is_dev[np.random.default_rng(seed).choice(len(X), n_dev, replace=False)] = True
    train = _pairs(X[~is_dev], y[~is_dev], device)
    dev = _pairs(X[is_dev], y[is_dev], device)
    return train, dev


def _pairs(X: Array, y: Array, device: torch.device) -> FeaturePairs:
    # Every image has one caption, so the caption of image i is in row i.
    first = torch.arange(len(X) + 1)
    return FeaturePairs(image=_tensor(X).to(device), text=_tensor(y).to(device), first_text=first)


def _report(image: torch.Tensor, text: torch.Tensor) -> RetrievalReport:
    return retrieval_report(image, text, torch.arange(len(text), device=text.device))
