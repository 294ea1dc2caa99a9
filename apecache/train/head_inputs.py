"""Open what a fit of heads reads: a store, the features of both sides, and the recipe for them."""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from apecache.arguments import as_path
from apecache.device import resolve_device
from apecache.fingerprint import Fingerprint, Json
from apecache.recipes.recipe import Recipe
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.keep_list import digest_keep_list
from apecache.train.model import AlignmentModel
from apecache.train.pooling import cached_arrays
from apecache.train.pretrained import with_own_scale


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """Hold what a fit of heads reads. The features are open; `load` reads them into memory."""

    store: FeatureStore
    recipe: Recipe
    """With the temperature and bias of the encoders' own model, if its `init` is `pretrained`."""
    spec: FitSpec
    image: FeatureArray
    text: FeatureArray

    @property
    def arrays(self) -> tuple[FeatureArray, FeatureArray]:
        """Return the features of images and of texts."""
        return self.image, self.text

    @cached_property
    def device(self) -> torch.device:
        """Return the device that the fit runs on."""
        return resolve_device(self.spec.device)

    def load(self) -> tuple[FeaturePairs, FeaturePairs]:
        """Read the training and the dev pairs; raises as `load_splits` does."""
        return load_splits(
            self.store,
            image=self.image,
            text=self.text,
            spec=self.spec.splits,
            device=self.device,
            recipe=self.recipe,
            keep=self.spec.keep,
        )

    def identity(self) -> Fingerprint:
        """Return the identity of the fit, which its checkpoints carry."""
        return Fingerprint(
            fields={
                **self.settings(),
                "image_features": self.image.record.encoder.digest,
                "text_features": self.text.record.encoder.digest,
            }
        )

    def settings(self) -> dict[str, Json]:
        """Return recipe, seed, splits, data and keep list, as checkpoints and runs record them."""
        recorded: dict[str, Json] = {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.spec.seed,
            "splits": asdict(self.spec.splits),
            "data": self.store.digest,
        }
        if self.spec.keep is not None:
            recorded["keep"] = digest_keep_list(as_path(self.spec.keep, "keep"))
        return recorded

    def heads(self, model: AlignmentModel) -> TrainedHeads:
        """Return the heads of a model, each with the encoder of the features that it reads."""
        image, text = (
            TrainedSide(
                head=head,
                encoder=asdict(array.record.spec),
                fingerprint=array.record.encoder,
            )
            for head, array in zip((model.image, model.text), self.arrays, strict=True)
        )
        return TrainedHeads(
            image=image,
            text=text,
            scale=float(model.temperature.scale().detach()),
            bias=model.temperature.bias_value(),
        )


def open_inputs(store: FeatureStore, recipe: Recipe, spec: FitSpec) -> HeadInputs:
    """Open the features that a fit reads.

    Raises:
        StoreError, MismatchError: As `cached_array`.
        EncoderError: As `with_own_scale`.
    """
    image, text = cached_arrays(
        store,
        recipe=recipe,
        image_name=spec.image_features,
        text_name=spec.text_features,
    )
    return HeadInputs(
        store=store,
        recipe=with_own_scale(recipe, image.record.spec, text.record.spec),
        spec=spec,
        image=image,
        text=text,
    )
