"""Open what the encoder trainer reads.

Of each side that is the store's features, an encoder, or cached tokens and an encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.arguments import AnyPath
from apecache.data.recorded import RecordedImages
from apecache.device import free_memory_bytes
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.layers import resolve_layer
from apecache.encoders.load import load_classifier, load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.encoders.tower import tower_of
from apecache.errors import MismatchError, OptionError, RecipeError
from apecache.fingerprint import Fingerprint, Modality
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
    SplitSpec,
    choose_splits,
    require_images,
)
from apecache.train.live import (
    CachedInputs,
    ImageInputs,
    Inputs,
    OpenImage,
    TextInputs,
    TokenInputs,
)
from apecache.train.paired_rows import Features, select_pairs
from apecache.train.pooling import cached_array, teacher_array

CACHED_SHARE = 0.25
"""Share of the free device memory that cached features may take. Towers, their gradients and
activations need the rest, and how much is known only when they run."""


@dataclass(frozen=True)
class FitEncoderSpec:
    """Say what a fit within the towers reads, and how it runs."""

    image: EncoderSpec | None = None
    """Image encoder, if its tower runs; None: the encoder of the store's features."""
    text: EncoderSpec | None = None
    """Text encoder, as `image`."""
    image_features: str | None = None
    """Name of the image features; needed if the store has several."""
    text_features: str | None = None
    """Name of the text features, as `image_features`."""
    splits: SplitSpec = field(default_factory=SplitSpec)
    """Training and dev split."""
    seed: int = 0
    """Seed of weights, batches, dropout and image views."""
    slice_size: int | None = None
    """Images, with their captions, that are in memory at once; None: the whole batch.

    Gradients stay those of the whole batch.
    """
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which the towers compute. Parameters stay float32. `auto`: bfloat16 on CUDA, else
    float32."""
    compile: bool = False
    """Whether torch.compile compiles the towers for training.

    Weights change by rounding only, so that a fit may be resumed with or without it.
    """
    device: str = "auto"
    """Device of the fit."""
    overwrite: bool = False
    """Whether a finished run in the folder may be replaced."""
    cache: bool = True
    """Whether frozen sides are read from the store.

    False only to measure what the cache saves: they run from their inputs, to the same result.
    """
    save_seconds: float = 30.0
    """Least time between two checkpoints."""
    report_split: str = "test"
    """Split that results will be reported on. A fit that trains or chooses on it is refused."""
    price_per_hour: float | None = None
    """Price of this machine in any currency, for the ledger."""
    init_from: AnyPath | None = None
    """Finished run of fit-head with whose heads and temperature the fit begins.

    See `apecache.train.warm_start`.
    """

    def uses_bfloat16(self, device: torch.device) -> bool:
        """Check whether the towers compute in bfloat16 on a device."""
        if self.autocast == "auto":
            return device.type == "cuda"
        return self.autocast == "bfloat16"


@dataclass(frozen=True, kw_only=True)
class SideSource:
    """Hold what one side is read from: cached features, an encoder, or cached tokens and both."""

    side: Modality
    """Modality of the side."""
    features: Tensor | None
    """Features [rows, dim] on the device or, where they do not fit, on the host; or tokens
    [rows, tokens, dim] on the host."""
    encoder: ImageEncoder | TextEncoder | None
    """Encoder whose tower runs; None: the side is read from `features`."""
    encoder_spec: EncoderSpec
    """Spec of the encoder, also where it is not opened."""
    fingerprint: Fingerprint
    """Fingerprint of the encoder, also where it is not opened."""
    ok: NDArray[np.bool_] | None
    """Rows with usable features; None: no features were looked at."""
    cut: int | None = None
    """Number of blocks after which `features` are the tokens; None: no cached tokens."""
    lengths: Tensor | None = None
    """int64 [rows], number of valid tokens; None: all are valid."""
    array: FeatureArray | None = None
    """Array that `features` were read from."""

    @property
    def dim(self) -> int:
        """Width of the head's input."""
        if self.encoder is not None:
            return tower_of(self.encoder).output_dim
        assert self.features is not None
        return self.features.shape[1]


def open_source(
    store: FeatureStore,
    recipe: Recipe,
    side: Modality,
    spec: FitEncoderSpec,
    device: torch.device,
) -> SideSource:
    """Open one side of a fit.

    Args:
        store: Store of the pairs.
        recipe: Recipe, which says whether the tower may train.
        side: Modality of the side.
        spec: Settings of the fit.
        device: Device of the encoder and of pooled features.

    Raises:
        RecipeError: The features are not of the kind that the side needs.
        EncoderError: The encoder cannot be loaded.
        MismatchError: Cached tokens are of other weights than the encoder's, or cached features are
            pooled in another way than the recipe says.
        OptionError: A side that trains has both its encoder and its features named.
    """
    named = spec.image if side == "image" else spec.text
    name = spec.image_features if side == "image" else spec.text_features
    live = recipe.towers.may_train(side) or not spec.cache
    if live and named and name and spec.cache:
        raise OptionError(
            f"--{side} and --{side}-features are both given, but the {side} tower trains, and its "
            "features would not be read; give the encoder alone, or cached tokens alone"
        )
    # A live side whose encoder is named does not need features in the store.
    array: FeatureArray | None = None
    if not live:
        array = cached_array(store, recipe=recipe, side=side, name=name)
    elif not named:
        array = store.array(side, name)
    ok = array.load_ok() if array else None
    if not live:
        assert array is not None
        if array.tokens is not None or array.views is not None:
            raise RecipeError(
                f"{side} features {array.name} are no pooled features of one view; choose others"
            )
        return SideSource(
            side=side,
            features=_placed(torch.from_numpy(array.load()), device),
            encoder=None,
            encoder_spec=array.record.spec,
            fingerprint=array.record.encoder,
            ok=ok,
            array=array,
        )
    base_spec = named or (array.record.spec if array else None)
    assert base_spec is not None
    pooling = recipe.towers.image_pooling if side == "image" else recipe.towers.text_pooling
    tokens = (
        array is not None
        and named is None
        and base_spec.pooling == "tokens"
        and base_spec.layer is not None
    )
    # The tower runs to its end in float32, also where the store's features are of an inner layer
    # or of half precision.
    array_pooling: Pooling = "default" if tokens else base_spec.pooling
    encoder_spec = replace(
        base_spec,
        dtype="float32",
        layer=None,
        pooling=array_pooling if pooling == "default" else pooling,
    )
    load: Any = load_image_encoder if side == "image" else load_text_encoder
    encoder = load(encoder_spec, str(device))
    source = SideSource(
        side=side,
        features=None,
        encoder=encoder,
        encoder_spec=encoder_spec,
        fingerprint=encoder.fingerprint,
        ok=ok,
    )
    if tokens and array is not None and spec.cache:
        return _with_tokens(source, array, encoder)
    return source


def _placed(features: Tensor, device: torch.device) -> Tensor:
    """Return pooled features on the device if they leave enough of it, else on the host."""
    free_bytes = free_memory_bytes(device)
    if free_bytes is not None and features.nbytes > CACHED_SHARE * free_bytes:
        return features
    return features.to(device)


def _with_tokens(
    source: SideSource,
    array: FeatureArray,
    encoder: ImageEncoder | TextEncoder,
) -> SideSource:
    """Add cached tokens to a source, so that the tower starts behind them.

    Raises:
        MismatchError: The tokens are of other weights than the encoder's.
        RecipeError: They are not the tokens of one layer and one view.
    """
    # Only the weights are compared: pooling and dtype of the encoder differ on purpose.
    encoder_weights = Fingerprint(fields={"weights": encoder.fingerprint.fields["weights"]})
    array_weights = Fingerprint(fields={"weights": array.record.encoder.fields["weights"]})
    if encoder_weights != array_weights:
        raise MismatchError(
            f"{encoder.spec} is not what {source.side} features {array.name} were made with; "
            "extract again"
        )
    if tower_of(encoder).sees_padding:
        raise RecipeError(
            f"{source.side} features {array.name} leave out the padding of the texts, which "
            f"{encoder.spec} sees; choose pooled features, or name the encoder with --text"
        )
    cut = resolve_layer(encoder.module, array.record.spec)
    if not isinstance(cut, int) or array.views is not None:
        raise RecipeError(
            f"{source.side} features {array.name} are no tokens of a layer and one view; "
            "choose others"
        )
    lengths = array.load_lengths()
    token_counts = None if lengths is None else torch.from_numpy(lengths.astype(np.int64))
    return replace(
        source,
        features=torch.from_numpy(array.load()),
        cut=cut,
        lengths=token_counts,
        array=array,
    )


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """Hold the cached outputs of a teacher."""

    array: FeatureArray
    """Features of the teacher."""
    taught: Tensor
    """Features [n_images, dim], or class distributions [n_images, n_classes] made of them."""
    ok: NDArray[np.bool_]
    """bool [n_images]: usable features."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the teacher's encoder."""
        return self.array.record.encoder


def open_teacher(store: FeatureStore, recipe: Recipe, device: torch.device) -> TeacherSource | None:
    """Open the features of the recipe's teacher; None for a recipe without a teacher.

    Raises:
        RecipeError, MismatchError: As `teacher_array`; or the features are not pooled ones of one
            view.
        EncoderError: The teacher's classifier cannot be loaded.
    """
    spec = recipe.distillation
    if spec is None:
        return None
    array = teacher_array(store, spec, recipe.name)
    if array.tokens is not None or array.views is not None:
        raise RecipeError(
            f"image features {array.name} are no pooled features of one view, which a teacher's are"
        )
    taught = torch.from_numpy(array.load()).to(device)
    if spec.kind == "classes":
        taught = _distributions(taught, array.record.spec)
    return TeacherSource(array=array, taught=taught, ok=array.load_ok())


@torch.no_grad()
def _distributions(features: Tensor, spec: EncoderSpec) -> Tensor:
    """Return the teacher's class distributions, [n, n_classes]; each row sums to 1."""
    classifier = load_classifier(spec).to(features.device)
    # In blocks: logits of all images at once can exceed the device's memory.
    blocks = features.split(8192)
    return torch.cat([classifier(block.float()).softmax(-1) for block in blocks])


def split_rows(
    store: FeatureStore,
    sources: Sequence[SideSource],
    spec: FitEncoderSpec,
    teacher: TeacherSource | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Return training and dev pairs that hold rows of the store's table instead of features.

    Rows are int64 [n] and [m], on the CPU. Pairs without usable inputs are left out.
    """
    pairs = store.pairs
    image_source, text_source = sources
    ok_images = np.ones(len(pairs.keys), dtype=bool)
    if image_source.ok is not None:
        ok_images = image_source.ok
    if teacher is not None:
        ok_images = ok_images & teacher.ok
    ok_texts = np.array([bool(caption.strip()) for caption in pairs.captions], dtype=bool)
    if text_source.ok is not None:
        ok_texts = ok_texts & text_source.ok
    # Any image features will do: equal content is recorded by file, not by encoder.
    content = next((equal_images(array) for array in store.arrays("image")), None)

    def pairs_of(mask: NDArray[np.bool_]) -> FeaturePairs:
        return select_pairs(
            Features(torch.arange(len(pairs.keys))),
            text=Features(torch.arange(len(pairs.captions))),
            image_rows=pairs.image_rows,
            keep_images=mask & ok_images,
            ok_texts=ok_texts,
            content=content,
            caption_ids=pairs.caption_ids,
        )

    train_mask, dev_mask = choose_splits(pairs, spec.splits, content)
    train = pairs_of(train_mask)
    dev = pairs_of(dev_mask)
    require_images(train, dev)
    return train, dev


def open_inputs(
    source: SideSource,
    store: FeatureStore,
    open_image: OpenImage | None,
    device: torch.device,
) -> Inputs:
    """Open the inputs of a side: cached features, cached tokens, texts or images.

    Raises:
        OptionError: The side runs from pixels, and the images are not where the store recorded
            them.
    """
    encoder = source.encoder
    if source.features is not None:
        if encoder is None:
            return CachedInputs(features=source.features, device=device)
        return TokenInputs(
            features=source.features,
            n_valid=source.lengths,
            device=device,
        )
    if isinstance(encoder, TextEncoder):
        return TextInputs.of(encoder, [str(caption) for caption in store.pairs.captions])
    assert encoder is not None
    images = open_image or RecordedImages(store.last_source)
    if isinstance(images, RecordedImages):
        # An early error: the first image is read after the encoders are loaded.
        images.require()
    return ImageInputs(
        keys=list(store.pairs.keys),
        open_image=images,
        preprocess=encoder.preprocess,
        device=encoder.device,
    )
